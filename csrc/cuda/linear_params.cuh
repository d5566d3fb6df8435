// One linear launch as its kernels see it: out = x weight^T + bias, and for the rows of an adapter
// + scale * (x a^T) b^T.
#pragma once

#include "cuda/common.cuh"

namespace he::cuda {

template <typename T>
struct Adapter {
  const T* a;  // [rank, in_dim]
  const T* b;  // [out_dim, rank]
  int rank;
  float scale;
};

template <typename T>
struct LinearParams {
  T* out;                        // [rows, out_dim]
  const T* x;                    // [rows, in_dim]
  const T* weight;               // [out_dim, in_dim]
  const T* bias;                 // [out_dim] or null
  const int32_t* adapter_index;  // [rows] or null: every row uses all adapters
  int64_t rows, out_dim;
  int in_dim;
  bool aligned;        // every row of x, weight and a starts at a multiple of 16 bytes
  bool aligned_pairs;  // every row of out starts at a multiple of two elements
  int num_adapters;
  Adapter<T> adapters[kMaxLoraAdapters];

  __device__ __forceinline__ bool uses(int64_t row, int adapter) const {
    return adapter_index == nullptr || adapter_index[row] == adapter;
  }

  // The adapters that rows [first_row, first_row + kRows) use, a bit for each. All lanes of the
  // warp must call it.
  template <int kRows>
  __device__ __forceinline__ unsigned used_adapters(int64_t first_row) const {
    static_assert(kMaxLoraAdapters <= 32, "a bit for each adapter");
    if (adapter_index == nullptr) {
      return static_cast<unsigned>((uint64_t{1} << num_adapters) - 1);
    }
    unsigned used = 0;
    for (int row = threadIdx.x % kWarpSize; row < kRows; row += kWarpSize) {
      if (first_row + row >= rows) break;
      const int index = adapter_index[first_row + row];
      if (index >= 0 && index < num_adapters) used |= 1u << index;
    }
    return __reduce_or_sync(kFullMask, used);
  }
};

}  // namespace he::cuda
