// How linear_rows.cuh forms its products: on the tensor cores for 16-bit elements, else by fused
// multiply-adds.
#pragma once

#include <initializer_list>

#include "cuda/linear_rows.cuh"
#include "cuda/ptx.cuh"
#include "cuda/vector.cuh"

namespace he::cuda {

// Up to 16 rows against 8 kTiles columns. mma.sync sums over its inner dimension in any order, as
// long as both operands have the same: a lane loads 8 neighbouring elements of a row by one 16-byte
// access and hands them to two instructions as they are, so neither operand goes through shared
// memory. Rows of x come from the caches, the matrix streams past them.
template <int kTiles_>
struct MmaEngine {
  static constexpr int kTiles = kTiles_, kRows = 16, kColumns = 8 * kTiles, kThreads = 256;
  static constexpr int kBlocks = 2;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kWidth = 8;                    // elements of one load
  static constexpr int kDepth = 4 * kWidth;           // of the inner dimension, of a step
  static constexpr int kSteps = kTiles == 1 ? 4 : 2;  // whose loads are under way together

  template <typename T>
  __device__ __forceinline__ static uint4 load(const T* source, bool exists) {
    return exists ? *reinterpret_cast<const uint4*>(source) : uint4{};
  }

  template <typename T>
  struct Fragments {
    uint4 x[2], matrix[kTiles];

    __device__ __forceinline__ void load_step(const LinearParams<T>& p, int64_t first_row,
                                              const T* source, int columns, int k) {
      const int row = threadIdx.x % kWarpSize / 4;
      const bool inside = k < p.in_dim;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int column = t * 8 + row;
        matrix[t] =
            load(source + static_cast<int64_t>(column) * p.in_dim + k, inside && column < columns);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t x_row = first_row + row + half * 8;
        x[half] = load(p.x + x_row * p.in_dim + k, inside && x_row < p.rows);
      }
    }

    __device__ __forceinline__ void multiply(float (&sums)[kTiles][4]) const {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_m16n8k16<T>(sums[t], {x[0].x, x[1].x, x[0].y, x[1].y}, {matrix[t].x, matrix[t].y});
        mma_m16n8k16<T>(sums[t], {x[0].z, x[1].z, x[0].w, x[1].w}, {matrix[t].z, matrix[t].w});
      }
    }
  };

  template <typename T>
  __device__ __forceinline__ static void multiply(const LinearParams<T>& p, int64_t first_row,
                                                  const T* matrix, int columns,
                                                  float (&products)[kRows][kColumns]) {
    __shared__ float partials[kWarps][kRows][kColumns + 1];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    float sums[kTiles][4] = {};
    constexpr int kBlockDepth = kWarps * kSteps * kDepth;
    for (int begin = 0; begin < p.in_dim; begin += kBlockDepth) {
      Fragments<T> fragments[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int k = begin + (s * kWarps + warp) * kDepth + lane % 4 * kWidth;
        fragments[s].load_step(p, first_row, matrix, columns, k);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) fragments[s].multiply(sums);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partials[warp][lane / 4 + i / 2 * 8][t * 8 + lane % 4 * 2 + i % 2] = sums[t][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      const int row = i / kColumns, column = i % kColumns;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partials[w][row][column];
      products[row][column] = sum;
    }
    __syncthreads();
  }
};

// Sums each of kCount values, a power of two up to 32, over the warp. The sum of value i goes to
// the lanes whose upper bits are i: lane 32 i / kCount and those after it. Halving what a lane
// still has with each shuffle takes one for a value instead of five.
template <int kCount>
__device__ __forceinline__ float warp_sums(const float (&values)[kCount], int lanes = kWarpSize) {
  const int distance = lanes / 2;
  if constexpr (kCount == 1) {
    float sum = values[0];
    for (int d = distance; d > 0; d /= 2) sum += __shfl_xor_sync(kFullMask, sum, d);
    return sum;
  } else {
    const bool upper = threadIdx.x & distance;
    float halves[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float low = values[i], high = values[i + kCount / 2];
      halves[i] = (upper ? high : low) + __shfl_xor_sync(kFullMask, upper ? low : high, distance);
    }
    return warp_sums(halves, distance);
  }
}

// Any element type, any alignment: each thread multiplies its packs of kRows rows and of kColumns.
template <int kRows_>
struct FmaEngine {
  static constexpr int kRows = kRows_, kColumns = 4, kThreads = 128;
  static constexpr int kBlocks = 3;
  static constexpr int kWarps = kThreads / kWarpSize;

  template <typename T>
  __device__ __forceinline__ static void multiply(const LinearParams<T>& p, int64_t first_row,
                                                  const T* matrix, int columns,
                                                  float (&products)[kRows][kColumns]) {
    constexpr int kWidth = Pack<T>::kSize;
    constexpr int kSums = kRows * kColumns;
    __shared__ float partials[kWarps][kSums];
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    float sums[kSums] = {};  // [kRows, kColumns]
    for (int k = threadIdx.x * kWidth; k < p.in_dim; k += kThreads * kWidth) {
      float weights[kColumns][kWidth] = {};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (c >= columns) continue;
        load_floats(weights[c], matrix + int64_t{c} * p.in_dim + k, p.in_dim - k, p.aligned);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first_row + r >= p.rows) continue;
        float x[kWidth];
        load_floats(x, p.x + (first_row + r) * p.in_dim + k, p.in_dim - k, p.aligned);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          float& sum = sums[r * kColumns + c];
#pragma unroll
          for (int j = 0; j < kWidth; ++j) sum = fmaf(x[j], weights[c][j], sum);
        }
      }
    }
    constexpr int kLanesEach = kWarpSize / kSums;
    const float sum = warp_sums(sums);
    if (lane % kLanesEach == 0) partials[warp][lane / kLanesEach] = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < kSums; i += kThreads) {
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += partials[w][i];
      products[i / kColumns][i % kColumns] = total;
    }
    __syncthreads();
  }
};

}  // namespace he::cuda
