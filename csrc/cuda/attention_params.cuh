// One attention launch as its kernels see it, and the share of it that a block works on.
//
// Query heads that share a kv head are packed: row r of a sequence and kv head is query token
// r / group and query head r % group of the group, so one block reads keys and values once for all
// of them. A block takes a tile of rows and one split of the keys that the tile sees.
#pragma once

#include "cuda/common.cuh"

namespace he::cuda {

// Division of 0 <= n < 2^31 by a divisor that only the launcher knows, without a divide.
struct FastDivisor {
  int divisor = 1;
  uint32_t multiplier = 1, shift = 0;

  FastDivisor() = default;
  explicit FastDivisor(int64_t d) : divisor(static_cast<int>(d)) {
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((((int64_t{1} << shift) - d) << 32) / d + 1);
  }

  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(n), multiplier) + n) >> shift);
  }
  __device__ __forceinline__ int remainder(int n) const { return n - quotient(n) * divisor; }
};

template <typename T>
struct AttentionParams {
  T* __restrict__ out;                       // [tokens, num_heads, head_dim]
  const T* __restrict__ q;                   // [tokens, num_heads, head_dim]
  const T* __restrict__ k_cache;             // [num_blocks, num_kv_heads, block_size, head_dim]
  const T* __restrict__ v_cache;             // as k_cache
  const int32_t* __restrict__ block_tables;  // [sequences, max_blocks]
  const int32_t* __restrict__ cu_seqlens;    // [sequences + 1] or null: one query each
  const int32_t* __restrict__ seq_lens;      // [sequences]
  const float* __restrict__ alibi_slopes;    // [num_heads] or null
  float* __restrict__ partials;              // [tokens, num_heads, num_splits, partial_stride]
  float2* __restrict__ statistics;           // [tokens, num_heads, num_splits], see softmax.cuh
  int num_heads, head_dim, max_blocks, partial_stride;
  int block_elements;  // num_kv_heads * block_size * head_dim
  int num_splits;      // 1: results go to `out`, partials and statistics are null
  int split_step;      // a split holds a multiple of this many keys
  int window;          // 0: unlimited
  FastDivisor group, block_size;
  float score_scale;  // of q k^T: to powers of two, or with a cap to the argument of tanh
  float cap;          // softcap in powers of two; 0: none
  bool aligned;       // every row starts at a multiple of 16 bytes

  // First element of the cached row of `key`, a position in `sequence`.
  __device__ __forceinline__ int64_t cached_row(int sequence, int kv_head, int key) const {
    const int32_t* table = block_tables + static_cast<int64_t>(sequence) * max_blocks;
    const int index = block_size.quotient(key);
    const int row_in_block = kv_head * block_size.divisor + key - index * block_size.divisor;
    return static_cast<int64_t>(table[index]) * block_elements + row_in_block * head_dim;
  }
};

// Key positions from `begin` up to but not including `end`.
struct KeyRange {
  int begin, end;

  __device__ __forceinline__ bool contains(int key) const { return begin <= key && key < end; }
};

// Rows [row_begin, row_end) of one sequence and kv head against keys [key_begin, key_end).
struct AttentionTile {
  int sequence, kv_head, split;
  int row_begin, row_end;
  int key_begin, key_end;
  int first_token, first_position;  // of the sequence's first query token: packed, in the sequence

  template <typename T>
  __device__ __forceinline__ int position(const AttentionParams<T>& p, int row) const {
    return first_position + p.group.quotient(row);
  }

  // Index of the row among all (token, query head) pairs.
  template <typename T>
  __device__ __forceinline__ int64_t packed_row(const AttentionParams<T>& p, int row) const {
    const int token = first_token + p.group.quotient(row);
    return static_cast<int64_t>(token) * p.num_heads + query_head(p, row);
  }

  template <typename T>
  __device__ __forceinline__ int query_head(const AttentionParams<T>& p, int row) const {
    return kv_head * p.group.divisor + p.group.remainder(row);
  }

  // The keys that a row at `position` sees, of those from key_begin on.
  template <typename T>
  __device__ __forceinline__ KeyRange visible(const AttentionParams<T>& p, int position) const {
    return {p.window > 0 ? position + 1 - p.window : 0, min(key_end, position + 1)};
  }
};

// The tile of this block in a grid of (row tiles * splits, kv heads, sequences). The last rows of a
// sequence see the most keys and come first. Without rows there is nothing to do; without keys the
// result is zero.
template <int kRows, typename T>
__device__ __forceinline__ AttentionTile this_tile(const AttentionParams<T>& p) {
  AttentionTile tile;
  const int row_tiles = gridDim.x / p.num_splits;
  const int row_tile = row_tiles - 1 - static_cast<int>(blockIdx.x) / p.num_splits;
  tile.split = blockIdx.x % p.num_splits;
  tile.kv_head = blockIdx.y;
  tile.sequence = blockIdx.z;
  tile.first_token = p.cu_seqlens ? p.cu_seqlens[tile.sequence] : tile.sequence;
  const int queries = p.cu_seqlens ? p.cu_seqlens[tile.sequence + 1] - tile.first_token : 1;
  const int keys = p.seq_lens[tile.sequence];
  tile.first_position = keys - queries;
  tile.row_begin = row_tile * kRows;
  tile.row_end = min(tile.row_begin + kRows, queries * p.group.divisor);
  if (tile.row_begin >= tile.row_end) return tile;

  const int last_position = tile.position(p, tile.row_end - 1);
  const int visible_end = max(0, min(keys, last_position + 1));
  const int first_position = tile.position(p, tile.row_begin);
  const int visible_begin = p.window > 0 ? max(0, first_position + 1 - p.window) : 0;
  const int share = ceil_div(max(0, visible_end - visible_begin), p.num_splits);
  const int split_keys = ceil_div(share, p.split_step) * p.split_step;
  tile.key_begin = min(visible_end, visible_begin + tile.split * split_keys);
  tile.key_end = min(visible_end, tile.key_begin + split_keys);
  return tile;
}

// A score in powers of two, from the dot product of a query and a key.
template <typename T>
__device__ __forceinline__ float scaled_score(const AttentionParams<T>& p, float product) {
  const float score = product * p.score_scale;
  return p.cap > 0.f ? p.cap * tanhf(score) : score;
}

// What ALiBi adds to the score of each key for every position that it lies further on.
template <typename T>
__device__ __forceinline__ float alibi_slope(const AttentionParams<T>& p, int query_head) {
  constexpr float kLog2E = 1.44269504f;
  return p.alibi_slopes[query_head] * kLog2E;
}

}  // namespace he::cuda
