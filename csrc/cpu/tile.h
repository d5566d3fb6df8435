// Small dense products on fp32 rows that sit in the caches.
#pragma once

#include "cpu/vec.h"

namespace he::cpu {

// Asks for the cache line at `p` when `p` begins one. Memory in pages has no pattern for the
// hardware to see, so the loops below fetch, step by step, what the next one of them will read.
template <typename T>
inline void prefetch(const T* p) {
  constexpr uintptr_t kCacheLine = 64;
  if (reinterpret_cast<uintptr_t>(p) % kCacheLine == 0) __builtin_prefetch(p, 0, 2);
}

// sums[g][first + j] = a[g, :] * rows[j, :], not yet reduced, for `queries` x `keys` pairs at once.
template <int queries, int keys, typename T>
inline void dot_block(Vec (&sums)[queries][kLanes], int first, const float* a,
                      const T* const* rows, const T* next, int64_t dim) {
  Vec totals[queries][keys] = {};
  for (int64_t i = 0; i < dim; i += kLanes) {
    Vec columns[keys];
    for (int j = 0; j < keys; ++j) {
      columns[j] = load(rows[j] + i);
      prefetch(next + j * dim + i);
    }
    for (int g = 0; g < queries; ++g) {
      const Vec q = load(a + g * dim + i);
      for (int j = 0; j < keys; ++j) totals[g][j] += q * columns[j];
    }
  }
  for (int g = 0; g < queries; ++g) {
    for (int j = 0; j < keys; ++j) sums[g][first + j] = totals[g][j];
  }
}

// Lane j of out[g] is the dot product of a[g, :] and rows[j, :], j < count <= kLanes; dim is a
// multiple of kLanes. Missing rows are stood in for by the last one.
template <int queries, typename T>
inline void dot_each(Vec* out, const float* a, const T* rows, int64_t count, const T* next,
                     int64_t dim) {
  constexpr int kKeys = queries == 1 ? (kLanes < 8 ? kLanes : 8) : queries == 2 ? 4 : 2;
  Vec sums[queries][kLanes];
  const T* at[kLanes];
  for (int j = 0; j < kLanes; ++j) at[j] = rows + (j < count ? j : count - 1) * dim;
  for (int j = 0; j < kLanes; j += kKeys) {
    dot_block<queries, kKeys>(sums, j, a, at + j, next + j * dim, dim);
  }
  for (int g = 0; g < queries; ++g) out[g] = sum_each(sums[g]);
}

// The rows as fp32: where they are, or copied to `scratch`.
inline const float* widened(float*, const float* rows, int64_t) { return rows; }

template <typename T>
inline const float* widened(float* scratch, const T* rows, int64_t count) {
  convert(scratch, rows, count);
  return scratch;
}

template <int kRows, int kVecs, typename T>
inline void multiply_add_block(float* c, const float* a, int64_t a_row, int64_t a_column,
                               const T* b, const T* next, int64_t depth, int64_t width) {
  Vec totals[kRows][kVecs];
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) totals[m][v] = load(c + m * width + v * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      columns[v] = load(b + k * width + v * kLanes);
      if (next) prefetch(next + k * width + v * kLanes);
    }
    for (int m = 0; m < kRows; ++m) {
      const float scalar = a[m * a_row + k * a_column];
      for (int v = 0; v < kVecs; ++v) totals[m][v] += scalar * columns[v];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) store(c + m * width + v * kLanes, totals[m][v]);
  }
}

template <int kVecs, typename T>
inline void multiply_add_columns(float* c, const float* a, int64_t a_row, int64_t a_column,
                                 const T* b, const T* next, int64_t rows, int64_t depth,
                                 int64_t width) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    multiply_add_block<4, kVecs>(c + m * width, a + m * a_row, a_row, a_column, b,
                                 m == 0 ? next : nullptr, depth, width);
  }
  for (; m + 2 <= rows; m += 2) {
    multiply_add_block<2, kVecs>(c + m * width, a + m * a_row, a_row, a_column, b,
                                 m == 0 ? next : nullptr, depth, width);
  }
  for (; m < rows; ++m) {
    multiply_add_block<1, kVecs>(c + m * width, a + m * a_row, a_row, a_column, b,
                                 m == 0 ? next : nullptr, depth, width);
  }
}

// c[rows, width] += a[rows, depth] b[depth, width]; width is a multiple of kLanes, and element
// (m, k) of `a` is at m * a_row + k * a_column. `next`: the b of the next call, or null.
template <typename T>
inline void multiply_add(float* c, const float* a, int64_t a_row, int64_t a_column, const T* b,
                         const T* next, int64_t rows, int64_t depth, int64_t width) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;
  int64_t n = 0;
  if (rows == 1) {  // enough chains of additions for one row
    for (; n + 8 * kLanes <= width; n += 8 * kLanes) {
      multiply_add_block<1, 8>(c + n, a, a_row, a_column, b + n, next ? next + n : nullptr, depth,
                               width);
    }
  }
  for (; n + kMost * kLanes <= width; n += kMost * kLanes) {
    multiply_add_columns<kMost>(c + n, a, a_row, a_column, b + n, next ? next + n : nullptr, rows,
                                depth, width);
  }
  for (; n < width; n += kLanes) {
    multiply_add_columns<1>(c + n, a, a_row, a_column, b + n, next ? next + n : nullptr, rows,
                            depth, width);
  }
}

}  // namespace he::cpu
