// Matrix products with few rows, bound by reading the weights once. Rows of x are widened to fp32
// and stay in the caches; the weights stream past in blocks of four outputs, and each block meets
// all rows while it is there. With LoRA the narrow products x A^T come first, for the rows that use
// the adapter, and each output then adds its row of B.
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

// Multiplications worth a thread.
constexpr int64_t kProductsPerThread = 65536;
constexpr int kOuts = 4, kRows = 4, kChain = 2 * kLanes;

// fp32 rows, where they are or in scratch of the calling thread.
const float* widened_rows(const float* x, int64_t) { return x; }

template <typename T>
const float* widened_rows(const T* x, int64_t count) {
  static thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < count) scratch.resize(count);
  return widened(scratch.data(), x, count);
}

// sums[o][m] += weight row o . x row m over whole vectors
template <int outs, int rows, typename T>
inline void add_products(Vec (&sums)[outs][rows], const T* weight, const float* const* x,
                         int64_t begin, int64_t end, int64_t depth) {
  for (int64_t k = begin; k < end; k += kLanes) {
    Vec columns[rows];
    for (int m = 0; m < rows; ++m) columns[m] = load(x[m] + k);
    for (int o = 0; o < outs; ++o) {
      const Vec w = load(weight + o * depth + k);
      for (int m = 0; m < rows; ++m) sums[o][m] += w * columns[m];
    }
  }
}

// totals[o][m] = weight row o . x row m, in chains of kChain additions: long ones round more.
template <int outs, int rows, typename T>
void dot_block(float (&totals)[kOuts][kRows], const T* weight, const float* const* x,
               int64_t depth) {
  Vec sums[outs][rows] = {};
  const int64_t whole = depth / kLanes * kLanes, rest = depth - whole;
  for (int64_t k = 0; k < whole; k += kChain * kLanes) {
    Vec chain[outs][rows] = {};
    add_products(chain, weight, x, k, std::min(whole, k + kChain * kLanes), depth);
    for (int o = 0; o < outs; ++o) {
      for (int m = 0; m < rows; ++m) sums[o][m] += chain[o][m];
    }
  }
  for (int o = 0; o < outs; ++o) {
    for (int m = 0; m < rows; ++m) {
      if (rest) {
        const Vec w = load_partial(weight + o * depth + whole, rest);
        sums[o][m] += w * load_partial(x[m] + whole, rest);
      }
      totals[o][m] = sum(sums[o][m]);
    }
  }
}

template <int outs, typename T>
void dot_rows(float (&totals)[kOuts][kRows], const T* weight, const float* const* x, int64_t rows,
              int64_t depth) {
  switch (rows) {
    case 1:
      return dot_block<outs, 1>(totals, weight, x, depth);
    case 2:
      return dot_block<outs, 2>(totals, weight, x, depth);
    case 3:
      return dot_block<outs, 3>(totals, weight, x, depth);
    default:
      return dot_block<outs, 4>(totals, weight, x, depth);
  }
}

// Calls finish(row, out, value) with x[row] . weight[out] for every row and the outputs
// [begin, end).
template <typename T, typename Finish>
void for_each_product(const T* weight, const std::vector<const float*>& x, int64_t depth,
                      int64_t begin, int64_t end, const Finish& finish) {
  const int64_t rows = x.size();
  float totals[kOuts][kRows];
  for (int64_t out = begin; out < end;) {
    const int64_t outs = end - out >= kOuts ? kOuts : 1;
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t count = std::min<int64_t>(kRows, rows - row);
      const T* block = weight + out * depth;
      if (outs == kOuts) {
        dot_rows<kOuts>(totals, block, x.data() + row, count, depth);
      } else {
        dot_rows<1>(totals, block, x.data() + row, count, depth);
      }
      for (int64_t o = 0; o < outs; ++o) {
        for (int64_t m = 0; m < count; ++m) finish(row + m, out + o, totals[o][m]);
      }
    }
    out += outs;
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
