// Merges the splits of each row: one block a row, whose warps share the splits and whose lanes
// share the columns. It reads every partial result once, and those of splits without keys not at
// all.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/reduce.cuh"

namespace he::cuda {

struct CombineShape {
  static constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
  static constexpr int kMaxSplits = kThreads;  // a thread for each
  static constexpr int kMaxDim = 256, kWidth = 4;
  static constexpr int kLoads = kMaxDim / (kWarpSize * kWidth);
};

template <typename T>
__global__ void __launch_bounds__(CombineShape::kThreads)
    attention_combine_kernel(const __grid_constant__ AttentionParams<T> p) {
  using Shape = CombineShape;
  __shared__ float weights[Shape::kMaxSplits];
  __shared__ __align__(16) float sums[Shape::kWarps][Shape::kMaxDim];
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

  float2 own = make_float2(-INFINITY, 0.f);
  if (threadIdx.x < p.num_splits) own = p.statistics[row * p.num_splits + threadIdx.x];
  const float weight = part_weight(own, softmax_base(block_max(own.x)));
  weights[threadIdx.x] = weight;
  const float scale = inverse_or_zero(block_sum(weight * own.y));

  float partial[Shape::kLoads][Shape::kWidth] = {};
  for (int split = warp; split < p.num_splits; split += Shape::kWarps) {
    const float weight_of_split = weights[split];
    if (weight_of_split == 0.f) continue;
    const float* source = p.partials + (row * p.num_splits + split) * p.partial_stride;
#pragma unroll
    for (int l = 0; l < Shape::kLoads; ++l) {
      const int column = (l * kWarpSize + lane) * Shape::kWidth;
      if (column >= p.head_dim) continue;
      const Pack<float> pack = load_pack(source + column);
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) partial[l][i] += weight_of_split * pack[i];
    }
  }
#pragma unroll
  for (int l = 0; l < Shape::kLoads; ++l) {
    store_elements(&sums[warp][(l * kWarpSize + lane) * Shape::kWidth], partial[l], 1, true);
  }
  __syncthreads();
  for (int column = threadIdx.x; column < p.head_dim; column += Shape::kThreads) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) total += sums[w][column];
    p.out[row * p.head_dim + column] = from_float<T>(total * scale);
  }
}

}  // namespace he::cuda
