// The shared memory of an attention block on the tensor cores: its queries, and tiles of keys and
// values that cp.async gathers through the block table, two of each so that one is on its way while
// the other is worked on.
#pragma once

#include "cuda/attention_params.cuh"
#include "cuda/ptx.cuh"

namespace he::cuda {

template <int kDim_, int kRowWarps_, int kKeyWarps_, int kRowTiles_, int kKeys_>
struct MmaShape {
  static constexpr int kDim = kDim_;            // head_dim rounded up
  static constexpr int kRowWarps = kRowWarps_;  // warps on different rows
  static constexpr int kKeyWarps = kKeyWarps_;  // times warps on the same rows and different keys
  static constexpr int kRowTiles = kRowTiles_;  // of 16 rows, of a warp
  static constexpr int kKeys = kKeys_;          // of a tile
  static constexpr int kThreads = kRowWarps * kKeyWarps * kWarpSize;
  static constexpr int kWarpRows = 16 * kRowTiles, kRows = kRowWarps * kWarpRows;
  static constexpr int kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kKeyFragments = kWarpKeys / 8, kDimFragments = kDim / 8;
  static constexpr int kPiece = 8;               // elements of 16 bytes
  static constexpr int kPieces = kDim / kPiece;  // of a row
  static constexpr int kStages = 2;
  static constexpr int kTileElements = kKeys * kDim;
  static constexpr int kSharedBytes =
      2 * (kRows * kDim + kStages * 2 * kTileElements) + 8 * kStages * kKeys + 12 * kRows;
  static constexpr int kMergeStride = kDim + 8;  // floats; 8 spread a fragment over all banks
  static constexpr int kMergeFloats = kKeyWarps == 1 ? 0 : kKeyWarps * kRows * kMergeStride;
  static constexpr int kMergeBytes = kMergeFloats * 4 + kKeyWarps * kRows * 8;
  static_assert(kWarpKeys % 16 == 0 && kDim % 16 == 0, "mma.sync reads 16 by 16");
  static_assert(kKeys <= kThreads && kRows <= kThreads, "a thread looks up one key, and one row");
  static_assert(kSharedBytes <= 99 * 1024, "what every device since sm_80 grants a block");
  static_assert(kMergeBytes <= kSharedBytes, "the merge reuses the tiles");

  // Where a piece of a row is kept, in elements: moved within the row such that the 8 rows that
  // ldmatrix reads at once lie in different banks.
  __device__ static __forceinline__ unsigned element(unsigned row, unsigned piece) {
    constexpr unsigned kSpread = kPieces % 8 == 0 ? 8 : kPieces % 4 == 0 ? 4 : 2;
    return row * kDim + (piece ^ row / (8 / kSpread) % kSpread) * kPiece;
  }
};

template <typename Shape, typename T>
struct MmaTiles {
  T* q;              // [kRows, kDim]
  T* keys;           // [kStages, kKeys, kDim]
  T* values;         // as keys
  int64_t* places;   // [kStages, kKeys], where in the cache a tile's rows start
  int* positions;    // [kRows], in the sequence
  float* slopes;     // [kRows], of ALiBi
  int* packed_rows;  // [kRows], among all (token, query head) pairs

  __device__ __forceinline__ explicit MmaTiles(unsigned char* shared)
      : q(reinterpret_cast<T*>(shared)),
        keys(q + Shape::kRows * Shape::kDim),
        values(keys + Shape::kStages * Shape::kTileElements),
        places(reinterpret_cast<int64_t*>(values + Shape::kStages * Shape::kTileElements)),
        positions(reinterpret_cast<int*>(places + Shape::kStages * Shape::kKeys)),
        slopes(reinterpret_cast<float*>(positions + Shape::kRows)),
        packed_rows(reinterpret_cast<int*>(slopes + Shape::kRows)) {}

  // Rows that do not exist are as the last one.
  __device__ __forceinline__ void describe_rows(const AttentionParams<T>& p,
                                                const AttentionTile& tile) const {
    if (threadIdx.x >= Shape::kRows) return;
    const int row = min(tile.row_begin + static_cast<int>(threadIdx.x), tile.row_end - 1);
    positions[threadIdx.x] = tile.position(p, row);
    packed_rows[threadIdx.x] = static_cast<int>(tile.packed_row(p, row));
    if (p.alibi_slopes) slopes[threadIdx.x] = alibi_slope(p, tile.query_head(p, row));
  }

  // Rows and dimensions that do not exist become zero.
  __device__ __forceinline__ void load_queries(const AttentionParams<T>& p,
                                               const AttentionTile& tile) const {
    for_each_piece<Shape::kRows>([&](int row, int piece) {
      const int wanted = tile.row_begin + row, column = piece * Shape::kPiece;
      const bool exists = wanted < tile.row_end && column < p.head_dim;
      const int64_t source = tile.packed_row(p, min(wanted, tile.row_end - 1)) * p.head_dim;
      cp_async_16(q + Shape::element(row, piece), p.q + source + (exists ? column : 0), exists);
    });
  }

  // Looks the tile that starts at `first_key` up in the block table, each key once. The last key
  // stands in for those past the end: what the cache holds there may be NaN, even times 0.
  __device__ __forceinline__ void find_keys(const AttentionParams<T>& p, const AttentionTile& tile,
                                            int first_key, int stage) const {
    if (threadIdx.x >= Shape::kKeys) return;
    const int key = min(first_key + static_cast<int>(threadIdx.x), tile.key_end - 1);
    places[stage * Shape::kKeys + threadIdx.x] = p.cached_row(tile.sequence, tile.kv_head, key);
  }

  // Loads what find_keys found, before the last barrier.
  __device__ __forceinline__ void load_keys(const AttentionParams<T>& p, int stage) const {
    for_each_piece<Shape::kKeys>([&](int row, int piece) {
      const int column = piece * Shape::kPiece;
      const bool exists = column < p.head_dim;
      const int64_t source = places[stage * Shape::kKeys + row] + (exists ? column : 0);
      const unsigned target = stage * Shape::kTileElements + Shape::element(row, piece);
      cp_async_16(keys + target, p.k_cache + source, exists);
      cp_async_16(values + target, p.v_cache + source, exists);
    });
  }

 private:
  // Calls body(row, piece) for this thread's share of kTileRows rows. A thread stays at its column.
  template <int kTileRows, typename Body>
  __device__ __forceinline__ static void for_each_piece(const Body& body) {
    constexpr int kPassRows = Shape::kThreads / Shape::kPieces;
    const int piece = threadIdx.x % Shape::kPieces, first_row = threadIdx.x / Shape::kPieces;
    if (first_row >= kPassRows) return;
#pragma unroll
    for (int pass = 0; pass < ceil_div(kTileRows, kPassRows); ++pass) {
      const int row = first_row + pass * kPassRows;
      if (kTileRows % kPassRows == 0 || row < kTileRows) body(row, piece);
    }
  }
};

}  // namespace he::cuda
