// What one warp does with a tile: scores of its rows against its slice of the keys by mma.sync,
// online softmax in registers, and the weights, rounded to T, straight into the second mma.sync.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/attention_tiles.cuh"

namespace he::cuda {

// The rows of a warp, as mma.sync leaves them: lane l holds rows l / 4 + 8 r for r < kOwnRows, and
// of each fragment of 8 columns those at 2 (l % 4) and 2 (l % 4) + 1. Row r lies in row tile r / 2,
// at elements 2 (r % 2) and 2 (r % 2) + 1.
template <typename Shape, typename T>
class WarpRows {
 public:
  static constexpr int kOwnRows = 2 * Shape::kRowTiles;
  using Scores = float[Shape::kRowTiles][Shape::kKeyFragments][4];

  __device__ __forceinline__ WarpRows(const AttentionTile& tile, int row_warp, int key_warp)
      : row_offset_(row_warp * Shape::kWarpRows),
        key_offset_(key_warp * Shape::kWarpKeys),
        rows_(min(Shape::kWarpRows, tile.row_end - tile.row_begin - row_offset_)) {}

  // Takes in the warp's slice of the tile that starts at `tile_key`. All lanes must call it.
  __device__ __forceinline__ void visit(const AttentionParams<T>& p, const AttentionTile& tile,
                                        const MmaTiles<Shape, T>& tiles, int stage, int tile_key) {
    if (rows_ <= 0) return;
    // A row further down sees keys further on.
    const int begin = tile_key + key_offset_, end = begin + Shape::kWarpKeys;
    const KeyRange first = tile.visible(p, tiles.positions[row_offset_]);
    const KeyRange last = tile.visible(p, tiles.positions[row_offset_ + rows_ - 1]);
    if (end <= first.begin || last.end <= begin) return;
    const bool partly_seen = begin < last.begin || first.end < end;
    const T* keys = tiles.keys + stage * Shape::kTileElements;
    const T* values = tiles.values + stage * Shape::kTileElements;
    Scores scores = {};
    multiply_keys(scores, tiles.q, keys);
    // A scale alone is left to the exponential, unless it turns the order of the scores around.
    const bool scaled = p.cap > 0.f || p.alibi_slopes || p.score_scale <= 0.f;
    if (p.cap > 0.f) {
      for_each(scores, [&](float product) { return p.cap * tanh(product * p.score_scale); });
    } else if (scaled) {
      for_each(scores, [&](float product) { return product * p.score_scale; });
    }
    if (p.alibi_slopes) add_alibi(scores, tiles, begin);
    if (partly_seen) mask(scores, p, tile, tiles, begin);
    exponentiate(scores, scaled ? 1.f : p.score_scale);
    multiply_values(scores, values);
  }

  // Writes the rows, which no other warp of the block has worked on.
  __device__ __forceinline__ void store(const AttentionParams<T>& p,
                                        const MmaTiles<Shape, T>& tiles, int split) const {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const float2 own = statistics(r);
      if (local_row(r) >= rows_) continue;
      const int64_t packed_row = tiles.packed_rows[row_offset_ + local_row(r)];
#pragma unroll
      for (int d = 0; d < Shape::kDimFragments; ++d) {
        float pair[2] = {sums_[r / 2][d][r % 2 * 2], sums_[r / 2][d][r % 2 * 2 + 1]};
        store_columns(p, packed_row, split, column(d), pair, own, true);
      }
    }
  }

  // Leaves the rows to merge_and_store.
  __device__ __forceinline__ void store_part(float* partials,  // [kWarpRows, kMergeStride], shared
                                             float2* row_statistics) const {  // [kWarpRows], shared
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const float2 own = statistics(r);
      if (lane() % 4 == 0) row_statistics[local_row(r)] = own;
#pragma unroll
      for (int d = 0; d < Shape::kDimFragments; ++d) {
        const float pair[2] = {sums_[r / 2][d][r % 2 * 2], sums_[r / 2][d][r % 2 * 2 + 1]};
        store_elements(partials + local_row(r) * Shape::kMergeStride + column(d), pair, 2, true);
      }
    }
  }

 private:
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ static int column(int fragment) {
    return fragment * 8 + lane() % 4 * 2;
  }
  __device__ __forceinline__ static int local_row(int r) { return r * 8 + lane() / 4; }

  // scores += q k^T
  __device__ __forceinline__ void multiply_keys(Scores& scores, const T* q, const T* keys) const {
#pragma unroll
    for (int k = 0; k < Shape::kPieces; k += 2) {
      uint32_t a[Shape::kRowTiles][4];
#pragma unroll
      for (int t = 0; t < Shape::kRowTiles; ++t) {
        ldmatrix_x4(a[t], q + Shape::element(row_offset_ + t * 16 + lane() % 16, k + lane() / 16));
      }
#pragma unroll
      for (int f = 0; f < Shape::kKeyFragments; f += 2) {
        uint32_t b[4];
        const int key = key_offset_ + f * 8 + lane() / 16 * 8 + lane() % 8;
        ldmatrix_x4(b, keys + Shape::element(key, k + lane() / 8 % 2));
#pragma unroll
        for (int t = 0; t < Shape::kRowTiles; ++t) {
          mma_m16n8k16<T>(scores[t][f], a[t], {b[0], b[1]});
          mma_m16n8k16<T>(scores[t][f + 1], a[t], {b[2], b[3]});
        }
      }
    }
  }

  // sums += weights v
  __device__ __forceinline__ void multiply_values(const Scores& weights, const T* values) {
#pragma unroll
    for (int f = 0; f < Shape::kKeyFragments; f += 2) {
      uint32_t a[Shape::kRowTiles][4];
#pragma unroll
      for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &weights[t][f + i / 2][i % 2 * 2];
          a[t][i] = round_pair<T>(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int d = 0; d < Shape::kPieces; d += 2) {
        uint32_t b[4];
        const int key = key_offset_ + f * 8 + lane() % 16;
        ldmatrix_x4_trans(b, values + Shape::element(key, d + lane() / 16));
#pragma unroll
        for (int t = 0; t < Shape::kRowTiles; ++t) {
          mma_m16n8k16<T>(sums_[t][d], a[t], {b[0], b[1]});
          mma_m16n8k16<T>(sums_[t][d + 1], a[t], {b[2], b[3]});
        }
      }
    }
  }

  // Within 2e-7, less than 16-bit inputs leave uncertain.
  __device__ __forceinline__ static float tanh(float x) {
    constexpr float kTwoLog2E = 2.88539008f;
    return 1.f - __fdividef(2.f, 1.f + exp2_approx(kTwoLog2E * x));
  }

  template <typename Function>
  __device__ __forceinline__ static void for_each(Scores& scores, const Function& function) {
#pragma unroll
    for (int t = 0; t < Shape::kRowTiles; ++t) {
#pragma unroll
      for (int f = 0; f < Shape::kKeyFragments; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][f][i] = function(scores[t][f][i]);
      }
    }
  }

  // Calls body(score, column) for the scores of own row r.
  template <typename Body>
  __device__ __forceinline__ static void for_row(Scores& scores, int r, const Body& body) {
#pragma unroll
    for (int f = 0; f < Shape::kKeyFragments; ++f) {
      body(scores[r / 2][f][r % 2 * 2], column(f));
      body(scores[r / 2][f][r % 2 * 2 + 1], column(f) + 1);
    }
  }

  __device__ __forceinline__ void add_alibi(Scores& scores, const MmaTiles<Shape, T>& tiles,
                                            int first_key) const {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const float slope = tiles.slopes[row_offset_ + local_row(r)];
      const int distance = first_key - tiles.positions[row_offset_ + local_row(r)];
      for_row(scores, r, [&](float& score, int column) {
        score += slope * static_cast<float>(distance + column);
      });
    }
  }

  // -infinity where a row does not see a key
  __device__ __forceinline__ void mask(Scores& scores, const AttentionParams<T>& p,
                                       const AttentionTile& tile, const MmaTiles<Shape, T>& tiles,
                                       int first_key) const {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const KeyRange keys = tile.visible(p, tiles.positions[row_offset_ + local_row(r)]);
      const KeyRange columns = {keys.begin - first_key, keys.end - first_key};
      for_row(scores, r, [&](float& score, int column) {
        if (!columns.contains(column)) score = -INFINITY;
      });
    }
  }

  // Turns scores into weights and brings the older sums to their scale.
  __device__ __forceinline__ void exponentiate(Scores& scores, float scale) {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      float most = -INFINITY;
      for_row(scores, r, [&](float score, int) { most = fmaxf(most, score); });
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullMask, most, 2));
      const float decay = softmax_[r].raise(most * scale);
      const float base = softmax_base(softmax_[r].most);
      for_row(scores, r, [&](float& score, int) {
        score = exp2_approx(score * scale - base);
        softmax_[r].total += score;
      });
#pragma unroll
      for (int d = 0; d < Shape::kDimFragments; ++d) {
        sums_[r / 2][d][r % 2 * 2] *= decay;
        sums_[r / 2][d][r % 2 * 2 + 1] *= decay;
      }
    }
  }

  // Of own row r, over all columns.
  __device__ __forceinline__ float2 statistics(int r) const {
    float total = softmax_[r].total;
    total += __shfl_xor_sync(kFullMask, total, 1);
    total += __shfl_xor_sync(kFullMask, total, 2);
    return make_float2(softmax_[r].most, total);
  }

  float sums_[Shape::kRowTiles][Shape::kDimFragments][4] = {};
  OnlineSoftmax softmax_[kOwnRows];    // each total over this lane's columns
  const int row_offset_, key_offset_;  // of the warp in the block's rows and keys
  const int rows_;                     // that exist; none if negative
};

}  // namespace he::cuda
