// How a block hands over the rows of its tile: merged over the parts that its warps worked on, then
// written as results, or as partial results when other blocks work on other splits.
#pragma once

#include "cuda/attention_params.cuh"
#include "cuda/elements.cuh"
#include "cuda/softmax.cuh"

namespace he::cuda {

// Stores columns [column, column + kCount) of a row; `aligned` as in store_elements. The thread
// with column 0 also stores the statistics that partial results are merged by.
template <int kCount, typename T>
__device__ __forceinline__ void store_columns(const AttentionParams<T>& p, int64_t packed_row,
                                              int split, int column, float (&sums)[kCount],
                                              float2 statistics, bool aligned) {
  const int columns = p.head_dim - column;
  if (p.num_splits > 1) {
    const int64_t part = packed_row * p.num_splits + split;
    store_elements(p.partials + part * p.partial_stride + column, sums, columns, true);
    if (column == 0) p.statistics[part] = statistics;
    return;
  }
  const float scale = inverse_or_zero(statistics.y);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] *= scale;
  store_elements(p.out + packed_row * p.head_dim + column, sums, columns, aligned);
}

// For a split without keys: the merge passes over its partial results.
template <typename T>
__device__ __forceinline__ void store_nothing(const AttentionParams<T>& p,
                                              const AttentionTile& tile) {
  for (int row = tile.row_begin + static_cast<int>(threadIdx.x); row < tile.row_end;
       row += static_cast<int>(blockDim.x)) {
    const int64_t part = tile.packed_row(p, row) * p.num_splits + tile.split;
    p.statistics[part] = make_float2(-INFINITY, 0.f);
  }
}

// Merges and stores the rows of the tile, with all threads of the block.
template <int kParts, int kRows, int kDim, int kStride, typename T>
__device__ __forceinline__ void merge_and_store(
    const AttentionParams<T>& p, const AttentionTile& tile, bool aligned,
    const float* partials,       // [kParts, kRows, kStride], shared
    const float2* statistics) {  // [kParts, kRows], shared
  constexpr int kCount = 4, kColumns = kDim / kCount;
  for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x) {
    const int row = i / kColumns, column = i % kColumns * kCount;
    if (tile.row_begin + row >= tile.row_end) continue;
    float most = -INFINITY;
#pragma unroll
    for (int part = 0; part < kParts; ++part) most = fmaxf(most, statistics[part * kRows + row].x);
    float sums[kCount] = {}, total = 0.f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float2 own = statistics[part * kRows + row];
      const float weight = part_weight(own, softmax_base(most));
      const Pack<float> values = load_pack(partials + (part * kRows + row) * kStride + column);
      total += weight * own.y;
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[j] += weight * values[j];
    }
    const int64_t packed_row = tile.packed_row(p, tile.row_begin + row);
    store_columns(p, packed_row, tile.split, column, sums, make_float2(most, total), aligned);
  }
}

}  // namespace he::cuda
