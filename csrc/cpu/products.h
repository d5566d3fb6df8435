// Dot products of rows of x with rows of a weight matrix, the core of every linear kernel. The
// weights stream past in blocks of outputs, and each block meets all rows while it is there; the
// block after it is fetched meanwhile. kLanes dot products run at once, so that one transposition
// reduces them all. A product's additions come in the same order whatever the other rows are, so a
// row's result does not depend on them.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/tile.h"
#include "cpu/vec.h"

namespace he::cpu {

// Elements of one chain of additions: long ones round more.
constexpr int kChain = 512;
constexpr int kMostRowsOfBlock = 32;

// How far ahead of a block of `outs` outputs the weights are fetched, in elements, whole blocks.
template <typename T>
inline int64_t fetch_distance(int64_t outs, int64_t depth) {
  constexpr int64_t kBytes = 16384;
  const int64_t block = std::max<int64_t>(1, outs * depth);
  return (kBytes / static_cast<int64_t>(sizeof(T)) + block - 1) / block * block;
}

// sums[o * rows + m] (+)= w[o] . x[m] over `count` elements, whole vectors. `next`: what a later
// block will read of the stored weights, or null; it is fetched step by step, because a burst of
// requests would wait for itself.
template <int outs, int rows, typename W, typename T>
inline void add_products(Vec (&sums)[kLanes], const W* const* w, const float* const* x,
                         const T* const* next, int64_t count, bool first) {
  static_assert(outs * rows == kLanes);
  Vec chain[kLanes] = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    Vec columns[rows];
    for (int m = 0; m < rows; ++m) columns[m] = load(x[m] + k);
    for (int o = 0; o < outs; ++o) {
      const Vec weight = load(w[o] + k);
      if (next) __builtin_prefetch(next[o] + k, 0, 2);
      for (int m = 0; m < rows; ++m) chain[o * rows + m] += weight * columns[m];
    }
  }
  for (int i = 0; i < kLanes; ++i) sums[i] = first ? chain[i] : sums[i] + chain[i];
}

// The products of a block of outputs with up to kMostRowsOfBlock rows of x, in groups of `rows`.
// Missing outputs and rows are stood in for by others, and what they give is not read.
template <int outs, int rows, typename T>
class WideBlock {
 public:
  using Element = float;  // of x

  // totals[group][o * rows + m]
  void run(float (*totals)[kLanes], const T* const* weight, const float* const* x, int64_t groups,
           int64_t depth) {
    const int64_t whole = depth / kLanes * kLanes;
    int64_t k = 0;
    do {
      add_chain(weight, x, groups, k, std::min<int64_t>(kChain, whole - k), depth);
      k += kChain;
    } while (k < whole);
    for (int64_t g = 0; g < groups; ++g) {
      if (whole < depth) add_rest(sums_[g], weight, x + g * rows, whole, depth - whole);
      store(totals[g], sum_each(sums_[g]));
    }
  }

 private:
  // Weights are widened once for all groups of rows; for a single one as they are used. A single
  // row needs no fetching: its blocks are so large that the hardware sees the streams.
  void add_chain(const T* const* weight, const float* const* x, int64_t groups, int64_t k,
                 int64_t count, int64_t depth) {
    const T *at[outs], *next[outs];
    const int64_t ahead = fetch_distance<T>(outs, depth);
    for (int o = 0; o < outs; ++o) {
      at[o] = weight[o] + k;
      next[o] = at[o] + ahead;
    }
    if (groups == 1) return add_group(sums_[0], at, x, rows > 1 ? next : nullptr, k, count);
    const float* wide[outs];
    for (int o = 0; o < outs; ++o) wide[o] = widened(wide_[o], at[o], count);
    for (int64_t g = 0; g < groups; ++g) {
      add_group(sums_[g], wide, x + g * rows, g == 0 ? next : nullptr, k, count);
    }
  }

  template <typename W>
  static void add_group(Vec (&sums)[kLanes], const W* const* w, const float* const* x,
                        const T* const* next, int64_t k, int64_t count) {
    const float* columns[rows];
    for (int m = 0; m < rows; ++m) columns[m] = x[m] + k;
    add_products<outs, rows>(sums, w, columns, next, count, k == 0);
  }

  static void add_rest(Vec (&sums)[kLanes], const T* const* weight, const float* const* x,
                       int64_t k, int64_t count) {
    for (int o = 0; o < outs; ++o) {
      const Vec w = load_partial(weight[o] + k, count);
      for (int m = 0; m < rows; ++m) sums[o * rows + m] += w * load_partial(x[m] + k, count);
    }
  }

  Vec sums_[kMostRowsOfBlock / rows][kLanes];
  float wide_[outs][kChain];
};

#if defined(__AVX512F__)
#define HE_BFLOAT16_DOT 1
// The same in bf16 throughout, two products an instruction, for processors that have it.
template <int outs, int rows>
class NarrowBlock {
 public:
  using Element = BFloat16;

  __attribute__((target("avx512bf16"))) void run(float (*totals)[kLanes],
                                                 const BFloat16* const* weight,
                                                 const BFloat16* const* x, int64_t groups,
                                                 int64_t depth) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t ahead = g == 0 && rows > 1 ? fetch_distance<BFloat16>(outs, depth) : 0;
      __m512 chain[kLanes] = {};
      int64_t k = 0;
      for (; k + kElements <= depth; k += kElements) {
        add(chain, weight, x + g * rows, k, ahead, ~__mmask32{0});
      }
      const auto rest = static_cast<uint32_t>(depth - k);
      if (rest) add(chain, weight, x + g * rows, k, 0, (__mmask32{1} << rest) - 1);
      Vec sums[kLanes];
      for (int i = 0; i < kLanes; ++i) sums[i] = bit_cast<Vec>(chain[i]);
      store(totals[g], sum_each(sums));
    }
  }

 private:
  static constexpr int64_t kElements = 2 * kLanes;

  __attribute__((target("avx512bf16"), always_inline)) static inline void add(
      __m512 (&chain)[kLanes], const BFloat16* const* weight, const BFloat16* const* x, int64_t k,
      int64_t ahead, __mmask32 mask) {
    __m512bh columns[rows];
    for (int m = 0; m < rows; ++m) {
      columns[m] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[m] + k);
    }
    for (int o = 0; o < outs; ++o) {
      const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(mask, weight[o] + k);
      if (ahead) __builtin_prefetch(weight[o] + k + ahead, 0, 2);
      for (int m = 0; m < rows; ++m) {
        chain[o * rows + m] = _mm512_dpbf16_ps(chain[o * rows + m], w, columns[m]);
      }
    }
  }
};
#endif

// Results gather in strips of kLanes outputs, so that every row is written a cache line at a time:
// rows of a power of two apart would push each other out of the caches.
template <int outs, int rows, typename Block, typename T, typename X, typename Finish>
void for_each_block(const T* weight, const std::vector<const X*>& x, int64_t depth, int64_t begin,
                    int64_t end, const Finish& finish) {
  const int64_t count = x.size();
  Block block;
  float totals[kMostRowsOfBlock / rows][kLanes];
  float strip[kMostRowsOfBlock][kLanes];
  for (int64_t first = 0; first < count; first += kMostRowsOfBlock) {
    const int64_t here = std::min<int64_t>(kMostRowsOfBlock, count - first);
    const X* columns[kMostRowsOfBlock];
    for (int m = 0; m < kMostRowsOfBlock; ++m) {
      columns[m] = x[first + std::min<int64_t>(m, here - 1)];
    }
    for (int64_t out = begin; out < end; out += kLanes) {
      const int64_t wide = std::min<int64_t>(kLanes, end - out);
      for (int64_t part = 0; part < wide; part += outs) {
        const T* weights[outs];
        for (int o = 0; o < outs; ++o) {
          weights[o] = weight + std::min(out + part + o, end - 1) * depth;
        }
        block.run(totals, weights, columns, (here + rows - 1) / rows, depth);
        for (int64_t m = 0; m < here; ++m) {
          for (int o = 0; o < outs; ++o) {
            strip[m][part + o] = totals[m / rows][o * rows + m % rows];
          }
        }
      }
      for (int64_t m = 0; m < here; ++m) finish(first + m, out, strip[m], wide);
    }
  }
}

// Calls finish(row, out, values, count) with values[i] = x[row] . weight[out + i] for every row and
// strips of the outputs [begin, end).
template <typename T, typename Finish>
void for_each_product(const T* weight, const std::vector<const float*>& x, int64_t depth,
                      int64_t begin, int64_t end, const Finish& finish) {
  if (x.size() == 1) {
    for_each_block<kLanes, 1, WideBlock<kLanes, 1, T>>(weight, x, depth, begin, end, finish);
  } else {
    constexpr int kRows = kLanes / 4;
    for_each_block<4, kRows, WideBlock<4, kRows, T>>(weight, x, depth, begin, end, finish);
  }
}

#if HE_BFLOAT16_DOT
template <typename Finish>
void for_each_product(const BFloat16* weight, const std::vector<const BFloat16*>& x, int64_t depth,
                      int64_t begin, int64_t end, const Finish& finish) {
  if (x.size() == 1) {
    for_each_block<kLanes, 1, NarrowBlock<kLanes, 1>>(weight, x, depth, begin, end, finish);
  } else {
    for_each_block<4, 4, NarrowBlock<4, 4>>(weight, x, depth, begin, end, finish);
  }
}
#endif

template <int rows, typename T>
inline void add_column_block(float* sums, int64_t stride, const float* x, const T* weight,
                             int64_t weight_stride, int64_t depth) {
  constexpr int kVecs = 4;
  Vec totals[rows][kVecs] = {};
  for (int64_t k = 0; k < depth; ++k) {
    for (int v = 0; v < kVecs; ++v) {
      const Vec w = load(weight + k * weight_stride + v * kLanes);
      for (int m = 0; m < rows; ++m) totals[m][v] += x[m * depth + k] * w;
    }
  }
  for (int m = 0; m < rows; ++m) {
    for (int v = 0; v < kVecs; ++v) store(sums + m * stride + v * kLanes, totals[m][v]);
  }
}

// sums[m, i] = x[m] . weight[:, i] for `count` <= 4 kLanes columns; x is [rows, depth], sums are 0
// before and `stride` apart.
template <typename T>
void add_column_products(float* sums, int64_t stride, const float* x, const T* weight,
                         int64_t weight_stride, int64_t rows, int64_t depth, int64_t count) {
  if (count < 4 * kLanes) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t k = 0; k < depth; ++k) {
        const T* row = weight + k * weight_stride;
        const float scalar = x[m * depth + k];
        for (int64_t i = 0; i < count; ++i) sums[m * stride + i] += scalar * to_float(row[i]);
      }
    }
    return;
  }
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    add_column_block<4>(sums + m * stride, stride, x + m * depth, weight, weight_stride, depth);
  }
  for (; m < rows; ++m) {
    add_column_block<1>(sums + m * stride, stride, x + m * depth, weight, weight_stride, depth);
  }
}

}  // namespace he::cpu
