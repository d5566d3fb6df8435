// Matrix products with few rows, bound by reading the weights once. Rows of x are widened to fp32
// and stay in the caches; the weights stream past in blocks of outputs, and each block meets all
// rows while it is there. kLanes dot products run at once, so that one transposition reduces them
// all. With LoRA the narrow products x A^T come first, for the rows that use the adapter, and each
// output then adds its row of B.
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

// Multiplications worth a thread.
constexpr int64_t kProductsPerThread = 65536;
// Elements of one chain of additions: long ones round more.
constexpr int kChain = 2 * kLanes * kLanes;
constexpr int kMostRows = 32;

// fp32 rows, where they are or in scratch of the calling thread.
const float* widened_rows(const float* x, int64_t) { return x; }

template <typename T>
const float* widened_rows(const T* x, int64_t count) {
  static thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < count) scratch.resize(count);
  return widened(scratch.data(), x, count);
}

// sums[o * rows + m] (+)= w[o] . x[m] over `count` elements, whole vectors
template <int outs, int rows, typename W>
inline void add_products(Vec (&sums)[kLanes], const W* const* w, const float* const* x,
                         int64_t count, bool first) {
  static_assert(outs * rows == kLanes);
  Vec chain[kLanes] = {};
  for (int64_t k = 0; k < count; k += kLanes) {
    Vec columns[rows];
    for (int m = 0; m < rows; ++m) columns[m] = load(x[m] + k);
    for (int o = 0; o < outs; ++o) {
      const Vec weight = load(w[o] + k);
      for (int m = 0; m < rows; ++m) chain[o * rows + m] += weight * columns[m];
    }
  }
  for (int i = 0; i < kLanes; ++i) sums[i] = first ? chain[i] : sums[i] + chain[i];
}

// The products of a block of outputs with up to kMostRows rows of x, in groups of `rows`. Missing
// outputs and rows are stood in for by others, and what they give is not read: so a row's result
// does not depend on the rows beside it.
template <int outs, int rows, typename T>
class Block {
 public:
  // totals[group][o * rows + m]
  void run(float (*totals)[kLanes], const T* const* weight, const float* const* x, int64_t groups,
           int64_t depth) {
    const int64_t whole = depth / kLanes * kLanes;
    int64_t k = 0;
    do {
      add_chain(weight, x, groups, k, std::min<int64_t>(kChain, whole - k));
      k += kChain;
    } while (k < whole);
    for (int64_t g = 0; g < groups; ++g) {
      if (whole < depth) add_rest(sums_[g], weight, x + g * rows, whole, depth - whole);
      store(totals[g], sum_each(sums_[g]));
    }
  }

 private:
  // Weights are widened once for all groups of rows; for a single one as they are used.
  void add_chain(const T* const* weight, const float* const* x, int64_t groups, int64_t k,
                 int64_t count) {
    const T* at[outs];
    for (int o = 0; o < outs; ++o) at[o] = weight[o] + k;
    if (groups == 1) return add_group(sums_[0], at, x, k, count);
    const float* wide[outs];
    for (int o = 0; o < outs; ++o) wide[o] = widened(wide_[o], at[o], count);
    for (int64_t g = 0; g < groups; ++g) add_group(sums_[g], wide, x + g * rows, k, count);
  }

  template <typename W>
  static void add_group(Vec (&sums)[kLanes], const W* const* w, const float* const* x, int64_t k,
                        int64_t count) {
    const float* columns[rows];
    for (int m = 0; m < rows; ++m) columns[m] = x[m] + k;
    add_products<outs, rows>(sums, w, columns, count, k == 0);
  }

  static void add_rest(Vec (&sums)[kLanes], const T* const* weight, const float* const* x,
                       int64_t k, int64_t count) {
    for (int o = 0; o < outs; ++o) {
      const Vec w = load_partial(weight[o] + k, count);
      for (int m = 0; m < rows; ++m) sums[o * rows + m] += w * load_partial(x[m] + k, count);
    }
  }

  Vec sums_[kMostRows / rows][kLanes];
  float wide_[outs][kChain];
};

template <int outs, int rows, typename T, typename Finish>
void for_each_block(const T* weight, const std::vector<const float*>& x, int64_t depth,
                    int64_t begin, int64_t end, const Finish& finish) {
  const int64_t count = x.size();
  Block<outs, rows, T> block;
  float totals[kMostRows / rows][kLanes];
  for (int64_t out = begin; out < end; out += outs) {
    const T* weights[outs];
    for (int o = 0; o < outs; ++o) weights[o] = weight + std::min(out + o, end - 1) * depth;
    for (int64_t first = 0; first < count; first += kMostRows) {
      const int64_t here = std::min<int64_t>(kMostRows, count - first);
      const float* columns[kMostRows];
      for (int m = 0; m < kMostRows; ++m) columns[m] = x[first + std::min<int64_t>(m, here - 1)];
      block.run(totals, weights, columns, (here + rows - 1) / rows, depth);
      for (int64_t m = 0; m < here; ++m) {
        for (int o = 0; o < outs && out + o < end; ++o) {
          finish(first + m, out + o, totals[m / rows][o * rows + m % rows]);
        }
      }
    }
  }
}

// Calls finish(row, out, value) with x[row] . weight[out] for every row and the outputs
// [begin, end).
template <typename T, typename Finish>
void for_each_product(const T* weight, const std::vector<const float*>& x, int64_t depth,
                      int64_t begin, int64_t end, const Finish& finish) {
  if (x.size() == 1) {
    for_each_block<kLanes, 1>(weight, x, depth, begin, end, finish);
  } else {
    for_each_block<4, kLanes / 4>(weight, x, depth, begin, end, finish);
  }
}

template <typename T>
std::vector<const float*> row_pointers(const void* x, int64_t rows, int64_t depth) {
  const float* wide = widened_rows(static_cast<const T*>(x), rows * depth);
  std::vector<const float*> pointers(rows);
  for (int64_t m = 0; m < rows; ++m) pointers[m] = wide + m * depth;
  return pointers;
}

// The narrow side of one adapter: for each of its rows of x, scale * x A^T.
struct Narrow {
  std::vector<int64_t> rows;
  std::vector<float> values;  // [rows, rank]
};

template <typename T>
Narrow narrow_products(const FusedLora& args, int64_t adapter, const std::vector<const float*>& x) {
  const LoraAdapter& lora = args.adapters[adapter];
  Narrow narrow;
  std::vector<const float*> selected;
  for (int64_t m = 0; m < args.rows; ++m) {
    if (args.adapter_index != nullptr && args.adapter_index[m] != adapter) continue;
    narrow.rows.push_back(m);
    selected.push_back(x[m]);
  }
  narrow.values.resize(selected.size() * lora.rank);
  if (selected.empty()) return narrow;
  const int64_t grain = kProductsPerThread / (args.in_dim * selected.size()) + 1;
  parallel_for(lora.rank, grain, [&](int64_t begin, int64_t end) {
    for_each_product(static_cast<const T*>(lora.a), selected, args.in_dim, begin, end,
                     [&](int64_t row, int64_t out, float value) {
                       narrow.values[row * lora.rank + out] = lora.scale * value;
                     });
  });
  return narrow;
}

// Adds narrow B^T to the fp32 results [rows, end - begin) of a range of outputs.
template <typename T>
void add_wide_products(const LoraAdapter& lora, const Narrow& narrow, float* results, int64_t begin,
                       int64_t end) {
  std::vector<const float*> pointers(narrow.rows.size());
  for (size_t i = 0; i < pointers.size(); ++i) pointers[i] = &narrow.values[i * lora.rank];
  for_each_product(static_cast<const T*>(lora.b), pointers, lora.rank, begin, end,
                   [&](int64_t row, int64_t out, float value) {
                     results[narrow.rows[row] * (end - begin) + out - begin] += value;
                   });
}

template <typename T>
void run_fused_lora(const FusedLora& a) {
  const std::vector<const float*> x = row_pointers<T>(a.x, a.rows, a.in_dim);
  std::vector<Narrow> narrow;
  for (int64_t i = 0; i < a.num_adapters; ++i) narrow.push_back(narrow_products<T>(a, i, x));
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t grain = kProductsPerThread / (a.in_dim * a.rows) + 1;
  parallel_for(a.out_dim, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> results(a.rows * (end - begin));
    for_each_product(static_cast<const T*>(a.weight), x, a.in_dim, begin, end,
                     [&](int64_t row, int64_t out, float value) {
                       results[row * (end - begin) + out - begin] =
                           value + (bias ? to_float(bias[out]) : 0.f);
                     });
    for (int64_t i = 0; i < a.num_adapters; ++i) {
      if (!narrow[i].rows.empty()) {
        add_wide_products<T>(a.adapters[i], narrow[i], results.data(), begin, end);
      }
    }
    for (int64_t row = 0; row < a.rows; ++row) {
      T* out = static_cast<T*>(a.out) + row * a.out_dim + begin;
      const float* wide = results.data() + row * (end - begin);
      for (int64_t i = 0; i < end - begin; ++i) out[i] = from_float<T>(wide[i]);
    }
  });
}

}  // namespace

void skinny_linear(void* out, const void* x, const void* weight, const void* bias, int64_t rows,
                   int64_t out_dim, int64_t in_dim, DType dtype, Stream) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const std::vector<const float*> pointers = row_pointers<T>(x, rows, in_dim);
    const T* row_bias = static_cast<const T*>(bias);
    T* y = static_cast<T*>(out);
    const int64_t grain = kProductsPerThread / (in_dim * rows + 1) + 1;
    parallel_for(out_dim, grain, [&](int64_t begin, int64_t end) {
      for_each_product(static_cast<const T*>(weight), pointers, in_dim, begin, end,
                       [&](int64_t row, int64_t o, float value) {
                         const float b = row_bias ? to_float(row_bias[o]) : 0.f;
                         y[row * out_dim + o] = from_float<T>(value + b);
                       });
    });
  });
}

void fused_lora(const FusedLora& args, Stream) {
  dispatch(args.dtype, [&](auto t) { run_fused_lora<decltype(t)>(args); });
}

}  // namespace he::cpu
