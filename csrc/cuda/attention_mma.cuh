// Attention on the tensor cores, for 16-bit elements: FlashAttention-2 (arXiv 2307.08691) over a
// paged cache. A block keeps its rows of q in shared memory and walks its keys tile by tile; its
// warps take different rows or, in decoding, where rows are few, different keys of the same rows,
// and then merge their sums in shared memory at the end.
#pragma once

#include "cuda/attention_warp.cuh"

namespace he::cuda {

template <typename Shape, typename T>
__global__ void __launch_bounds__(Shape::kThreads)
    attention_mma_kernel(const __grid_constant__ AttentionParams<T> p) {
  const AttentionTile tile = this_tile<Shape::kRows>(p);
  if (tile.row_begin >= tile.row_end) return;
  if (tile.key_begin >= tile.key_end && p.num_splits > 1) return store_nothing(p, tile);

  extern __shared__ __align__(16) unsigned char smem_raw[];
  const MmaTiles<Shape, T> tiles(smem_raw);
  const int warp = threadIdx.x / kWarpSize;
  const int key_warp = Shape::kKeyWarps == 1 ? 0 : warp / Shape::kRowWarps;
  const int row_warp = warp % Shape::kRowWarps;
  WarpRows<Shape, T> rows(tile, row_warp, key_warp);

  tiles.describe_rows(p, tile);
  if (tile.key_begin < tile.key_end) {
    tiles.load_queries(p, tile);
    tiles.find_keys(p, tile, tile.key_begin, 0);
    tiles.find_keys(p, tile, tile.key_begin + Shape::kKeys, 1);
  }
  __syncthreads();
  if (tile.key_begin < tile.key_end) {
    tiles.load_keys(p, 0);
    cp_async_commit();
  }
  int stage = 0;
  for (int key = tile.key_begin; key < tile.key_end; key += Shape::kKeys, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is complete, and every warp is done with the other stage
    if (key + Shape::kKeys < tile.key_end) {
      tiles.load_keys(p, stage ^ 1);
      cp_async_commit();
      tiles.find_keys(p, tile, key + 2 * Shape::kKeys, stage);
    }
    rows.visit(p, tile, tiles, stage, key);
  }

  if constexpr (Shape::kKeyWarps == 1) {
    rows.store(p, tiles, tile.split);
  } else {
    // [kKeyWarps, kRows, kMergeStride], where the tiles were
    float* partials = reinterpret_cast<float*>(smem_raw);
    __syncthreads();
    float2* statistics = reinterpret_cast<float2*>(partials + Shape::kMergeFloats);
    const int part_row = warp * Shape::kWarpRows;
    rows.store_part(partials + part_row * Shape::kMergeStride, statistics + part_row);
    __syncthreads();
    merge_and_store<Shape::kKeyWarps, Shape::kRows, Shape::kDim, Shape::kMergeStride>(
        p, tile, true, partials, statistics);
  }
}

}  // namespace he::cuda
