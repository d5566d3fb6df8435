// Attention without tensor cores: fp32, and 16-bit head dimensions that 16-byte loads cannot read.
// A team of lanes, as many as cover a key with four elements each, walks every kTeams-th key of the
// tile with an online softmax for up to kRows rows, whose queries and sums stay in registers. Keys
// and values go from the cache to registers, kKeys of each at a time; the teams merge at the end.
#pragma once

#include "cuda/attention_rows.cuh"

namespace he::cuda {

template <int kDim_, int kRows_>
struct FmaShape {
  static constexpr int kDim = kDim_, kRows = kRows_, kThreads = 128;
  static constexpr int kWidth = 4;  // elements of one load
  static constexpr int kLanes = kDim < kWarpSize * kWidth ? kDim / kWidth : kWarpSize;  // of a team
  static constexpr int kTeams = kThreads / kLanes;
  static constexpr int kLoads = kDim / (kLanes * kWidth);  // of a lane and a key
  static constexpr int kKeys = kLoads == 1 ? 4 : 2;        // of a team at a time
  static constexpr int kStep = kTeams * kKeys;             // of the block
  static constexpr int kPartialFloats = kTeams * kRows * kDim;
  static constexpr int kSharedBytes =
      kPartialFloats * sizeof(float) + kTeams * kRows * sizeof(float2);
};

// One lane's share of a row of kDim elements: load l holds elements (l * kLanes + lane) * kWidth
// and on.
template <typename Shape>
struct LaneRow {
  float values[Shape::kLoads][Shape::kWidth] = {};

  // Elements from head_dim on are zero. `aligned`: the row starts at a multiple of 16 bytes.
  template <typename T>
  __device__ __forceinline__ void load(const T* row, int lane, int head_dim, bool aligned) {
#pragma unroll
    for (int l = 0; l < Shape::kLoads; ++l) {
      const int column = (l * Shape::kLanes + lane) * Shape::kWidth;
      if (sizeof(T) == sizeof(float) && aligned) {
        if (column < head_dim) {
          const float4 pack = *reinterpret_cast<const float4*>(row + column);
          memcpy(values[l], &pack, sizeof(pack));
        }
      } else {
#pragma unroll
        for (int i = 0; i < Shape::kWidth; ++i) {
          if (column + i < head_dim) values[l][i] = to_float(row[column + i]);
        }
      }
    }
  }

  // The dot product over the whole team. All lanes of the warp must call it.
  __device__ __forceinline__ float dot(const LaneRow& other) const {
    float product = 0.f;
#pragma unroll
    for (int l = 0; l < Shape::kLoads; ++l) {
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) product += values[l][i] * other.values[l][i];
    }
#pragma unroll
    for (int distance = Shape::kLanes / 2; distance > 0; distance /= 2) {
      product += __shfl_xor_sync(kFullMask, product, distance);
    }
    return product;
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int l = 0; l < Shape::kLoads; ++l) {
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) values[l][i] *= factor;
    }
  }

  __device__ __forceinline__ void add(float weight, const LaneRow& other) {
#pragma unroll
    for (int l = 0; l < Shape::kLoads; ++l) {
#pragma unroll
      for (int i = 0; i < Shape::kWidth; ++i) values[l][i] += weight * other.values[l][i];
    }
  }
};

template <typename Shape>
struct LaneKeys {
  int first;  // position of the first; the next is kTeams further on
  LaneRow<Shape> keys[Shape::kKeys], values[Shape::kKeys];

  template <typename T>
  __device__ __forceinline__ LaneKeys(const AttentionParams<T>& p, const AttentionTile& tile,
                                      int first_key, int lane)
      : first(first_key) {
#pragma unroll
    for (int j = 0; j < Shape::kKeys; ++j) {
      const int key = first + j * Shape::kTeams;
      if (key >= tile.key_end) continue;
      const int64_t row = p.cached_row(tile.sequence, tile.kv_head, key);
      keys[j].load(p.k_cache + row, lane, p.head_dim, p.aligned);
      values[j].load(p.v_cache + row, lane, p.head_dim, p.aligned);
    }
  }
};

template <typename Shape>
struct RowState {
  LaneRow<Shape> query, sums;
  OnlineSoftmax softmax;

  template <typename T>
  __device__ __forceinline__ void visit(const AttentionParams<T>& p, const AttentionTile& tile,
                                        int row, const LaneKeys<Shape>& loaded) {
    const int position = tile.position(p, row);
    const KeyRange visible = tile.visible(p, position);
    float slope = 0.f;
    if (p.alibi_slopes) slope = alibi_slope(p, tile.query_head(p, row));
    float scores[Shape::kKeys], most = -INFINITY;
#pragma unroll
    for (int j = 0; j < Shape::kKeys; ++j) {
      const int key = loaded.first + j * Shape::kTeams;
      const float score = scaled_score(p, query.dot(loaded.keys[j]));
      const float biased = score + slope * static_cast<float>(key - position);
      scores[j] = visible.contains(key) ? biased : -INFINITY;
      most = fmaxf(most, scores[j]);
    }
    sums.scale(softmax.raise(most));
    const float base = softmax_base(softmax.most);
#pragma unroll
    for (int j = 0; j < Shape::kKeys; ++j) {
      const float weight = exp2_approx(scores[j] - base);
      softmax.total += weight;
      sums.add(weight, loaded.values[j]);
    }
  }
};

template <typename Shape, typename T>
__global__ void __launch_bounds__(Shape::kThreads)
    attention_fma_kernel(const __grid_constant__ AttentionParams<T> p) {
  const AttentionTile tile = this_tile<Shape::kRows>(p);
  if (tile.row_begin >= tile.row_end) return;
  if (tile.key_begin >= tile.key_end && p.num_splits > 1) return store_nothing(p, tile);

  const int team = threadIdx.x / Shape::kLanes, lane = threadIdx.x % Shape::kLanes;
  RowState<Shape> rows[Shape::kRows];
#pragma unroll
  for (int r = 0; r < Shape::kRows; ++r) {
    if (tile.row_begin + r >= tile.row_end) continue;
    const T* q = p.q + tile.packed_row(p, tile.row_begin + r) * p.head_dim;
    rows[r].query.load(q, lane, p.head_dim, p.aligned);
  }
  for (int key = tile.key_begin; key < tile.key_end; key += Shape::kStep) {
    const LaneKeys<Shape> loaded(p, tile, key + team, lane);
#pragma unroll
    for (int r = 0; r < Shape::kRows; ++r) {
      if (tile.row_begin + r < tile.row_end) rows[r].visit(p, tile, tile.row_begin + r, loaded);
    }
  }

  extern __shared__ __align__(16) unsigned char smem_raw[];
  float* partials = reinterpret_cast<float*>(smem_raw);  // [kTeams, kRows, kDim]
  float2* statistics = reinterpret_cast<float2*>(partials + Shape::kPartialFloats);
#pragma unroll
  for (int r = 0; r < Shape::kRows; ++r) {
    const int row = team * Shape::kRows + r;
#pragma unroll
    for (int l = 0; l < Shape::kLoads; ++l) {
      const int column = (l * Shape::kLanes + lane) * Shape::kWidth;
      store_elements(partials + row * Shape::kDim + column, rows[r].sums.values[l], 1, true);
    }
    if (lane == 0) {
      statistics[row] = make_float2(rows[r].softmax.most, rows[r].softmax.total);
    }
  }
  __syncthreads();
  merge_and_store<Shape::kTeams, Shape::kRows, Shape::kDim, Shape::kDim>(p, tile, p.aligned,
                                                                         partials, statistics);
}

}  // namespace he::cuda
