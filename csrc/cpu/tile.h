// Small dense products on fp32 rows that sit in the caches.
#pragma once

#include "cpu/vec.h"

namespace he::cpu {

// sum a[i] * b[i]; dim is a multiple of kLanes.
template <typename T>
inline float dot(const float* a, const T* b, int64_t dim) {
  return sum(sum_vecs(dim, [&](int64_t i) { return load(a + i) * load(b + i); }));
}

template <int kVecs, typename T>
inline void add_weighted_columns(float* out, const float* weights, const T* rows, int64_t count,
                                 int64_t dim) {
  Vec totals[kVecs];
  for (int v = 0; v < kVecs; ++v) totals[v] = load(out + v * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    for (int v = 0; v < kVecs; ++v) totals[v] += weights[j] * load(rows + j * dim + v * kLanes);
  }
  for (int v = 0; v < kVecs; ++v) store(out + v * kLanes, totals[v]);
}

// out[dim] += sum over j of weights[j] * rows[j, :]; dim is a multiple of kLanes.
template <typename T>
inline void add_weighted_rows(float* out, const float* weights, const T* rows, int64_t count,
                              int64_t dim) {
  int64_t i = 0;
  for (; i + 8 * kLanes <= dim; i += 8 * kLanes) {
    add_weighted_columns<8>(out + i, weights, rows + i, count, dim);
  }
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    add_weighted_columns<4>(out + i, weights, rows + i, count, dim);
  }
  for (; i < dim; i += kLanes) add_weighted_columns<1>(out + i, weights, rows + i, count, dim);
}

// The rows as fp32: where they are, or copied to `scratch`.
inline const float* widened(float*, const float* rows, int64_t) { return rows; }

template <typename T>
inline const float* widened(float* scratch, const T* rows, int64_t count) {
  for_each_vec(
      count, [&](int64_t i) { store(scratch + i, load(rows + i)); },
      [&](int64_t i, int64_t rest) {
        for (int64_t j = i; j < i + rest; ++j) scratch[j] = to_float(rows[j]);
      });
  return scratch;
}

template <int kRows, int kVecs>
inline void multiply_add_block(float* c, const float* a, int64_t a_row, int64_t a_column,
                               const float* b, int64_t depth, int64_t width) {
  Vec totals[kRows][kVecs];
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) totals[m][v] = load(c + m * width + v * kLanes);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kVecs];
    for (int v = 0; v < kVecs; ++v) columns[v] = load(b + k * width + v * kLanes);
    for (int m = 0; m < kRows; ++m) {
      const float scalar = a[m * a_row + k * a_column];
      for (int v = 0; v < kVecs; ++v) totals[m][v] += scalar * columns[v];
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int v = 0; v < kVecs; ++v) store(c + m * width + v * kLanes, totals[m][v]);
  }
}

template <int kVecs>
inline void multiply_add_columns(float* c, const float* a, int64_t a_row, int64_t a_column,
                                 const float* b, int64_t rows, int64_t depth, int64_t width) {
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    multiply_add_block<4, kVecs>(c + m * width, a + m * a_row, a_row, a_column, b, depth, width);
  }
  for (; m < rows; ++m) {
    multiply_add_block<1, kVecs>(c + m * width, a + m * a_row, a_row, a_column, b, depth, width);
  }
}

// c[rows, width] += a[rows, depth] b[depth, width]; width is a multiple of kLanes, and element
// (m, k) of `a` is at m * a_row + k * a_column.
inline void multiply_add(float* c, const float* a, int64_t a_row, int64_t a_column, const float* b,
                         int64_t rows, int64_t depth, int64_t width) {
  constexpr int kMost = kLanes == 16 ? 4 : 2;
  int64_t n = 0;
  for (; n + kMost * kLanes <= width; n += kMost * kLanes) {
    multiply_add_columns<kMost>(c + n, a, a_row, a_column, b + n, rows, depth, width);
  }
  for (; n < width; n += kLanes) {
    multiply_add_columns<1>(c + n, a, a_row, a_column, b + n, rows, depth, width);
  }
}

}  // namespace he::cpu
