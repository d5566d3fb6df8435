// Matrix products with few rows, bound by reading the weights once. In fp32 rows of x are widened
// and stay in the caches; bf16 is multiplied as it is where the processor can. With LoRA the narrow
// products x A^T come first, for the rows that use the adapter, and each output then adds its row
// of B.
#include "cpu/linear.h"

#include <vector>

#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

// Multiplications worth a thread.
constexpr int64_t kProductsPerThread = 65536;

template <typename X>
std::vector<const X*> row_pointers_to(const X* x, int64_t rows, int64_t depth) {
  std::vector<const X*> pointers(rows);
  for (int64_t m = 0; m < rows; ++m) pointers[m] = x + m * depth;
  return pointers;
}

// fp32 rows, where they are or in scratch of the calling thread.
const float* widened_rows(const float* x, int64_t) { return x; }

template <typename T>
const float* widened_rows(const T* x, int64_t count) {
  static thread_local std::vector<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < count) scratch.resize(count);
  return widened(scratch.data(), x, count);
}

template <typename T>
std::vector<const float*> row_pointers(const void* x, int64_t rows, int64_t depth) {
  return row_pointers_to(widened_rows(static_cast<const T*>(x), rows * depth), rows, depth);
}

// out (+)= scale * values + bias, and the line that this row's next strip goes to is asked for.
template <typename T>
void write_strip(const Linear& a, int64_t row, int64_t first, const float* values, int64_t count) {
  T* out = static_cast<T*>(a.out) + row * a.out_stride + first;
  const T* bias = a.bias ? static_cast<const T*>(a.bias) + first : nullptr;
  __builtin_prefetch(out + 2 * kLanes, 1, 3);
  const auto result = [&](Vec v, Vec b, Vec before) { return v * a.scale + b + before; };
  for_each_vec(
      count,
      [&](int64_t i) {
        store(out + i, result(load(values + i), bias ? load(bias + i) : Vec{},
                              a.accumulate ? load(out + i) : Vec{}));
      },
      [&](int64_t i, int64_t rest) {
        const Vec b = bias ? load_partial(bias + i, rest) : Vec{};
        const Vec before = a.accumulate ? load_partial(out + i, rest) : Vec{};
        store_partial(out + i, result(load_partial(values + i, rest), b, before), rest);
      });
}

template <typename T, typename X>
void run_rows(const Linear& a, const std::vector<const X*>& x) {
  const int64_t grain = kProductsPerThread / (a.in_dim * a.rows + 1) + 1;
  // In whole strips, so that two threads do not write to one cache line.
  const int64_t strips = (a.out_dim + kLanes - 1) / kLanes;
  parallel_for(strips, grain / kLanes + 1, [&](int64_t begin, int64_t end) {
    for_each_product(static_cast<const T*>(a.weight), x, a.in_dim, begin * kLanes,
                     std::min(end * kLanes, a.out_dim),
                     [&](int64_t row, int64_t out, const float* values, int64_t count) {
                       write_strip<T>(a, row, out, values, count);
                     });
  });
}

// A weight that is stored [in_dim, out_dim]: lanes are outputs, and rows of x are scalars.
template <typename T>
void run_transposed(const Linear& a) {
  const float* x = widened_rows(static_cast<const T*>(a.x), a.rows * a.in_dim);
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t grain = kProductsPerThread / (a.in_dim * a.rows + 1) + 1;
  constexpr int64_t kStrip = 4 * kLanes;
  const int64_t strips = (a.out_dim + kStrip - 1) / kStrip;
  parallel_for(strips, grain / kStrip + 1, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> sums;
    sums.resize(a.rows * kStrip);
    for (int64_t first = begin * kStrip; first < std::min(end * kStrip, a.out_dim);
         first += kStrip) {
      const int64_t count = std::min(kStrip, a.out_dim - first);
      std::fill(sums.begin(), sums.end(), 0.f);
      add_column_products(sums.data(), kStrip, x, weight + first, a.out_dim, a.rows, a.in_dim,
                          count);
      for (int64_t m = 0; m < a.rows; ++m) write_strip<T>(a, m, first, &sums[m * kStrip], count);
    }
  });
}

// The narrow side of one adapter: for each of its rows of x, scale * x A^T.
struct Narrow {
  std::vector<int64_t> rows;
  std::vector<float> values;  // [rows, rank]
};

template <typename T, typename X>
Narrow narrow_products(const FusedLora& args, int64_t adapter, const std::vector<const X*>& x) {
  const LoraAdapter& lora = args.adapters[adapter];
  Narrow narrow;
  std::vector<const X*> selected;
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
                     [&](int64_t row, int64_t out, const float* values, int64_t count) {
                       float* low = &narrow.values[row * lora.rank + out];
                       for (int64_t i = 0; i < count; ++i) low[i] = lora.scale * values[i];
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
                   [&](int64_t row, int64_t out, const float* values, int64_t count) {
                     float* sums = results + narrow.rows[row] * (end - begin) + out - begin;
                     for (int64_t i = 0; i < count; ++i) sums[i] += values[i];
                   });
}

template <typename T, typename X>
void run_fused_lora(const FusedLora& a, const std::vector<const X*>& x) {
  std::vector<Narrow> narrow;
  for (int64_t i = 0; i < a.num_adapters; ++i) narrow.push_back(narrow_products<T>(a, i, x));
  const T* bias = static_cast<const T*>(a.bias);
  const int64_t grain = kProductsPerThread / (a.in_dim * a.rows) + 1;
  parallel_for(a.out_dim, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> results(a.rows * (end - begin));
    for_each_product(static_cast<const T*>(a.weight), x, a.in_dim, begin, end,
                     [&](int64_t row, int64_t out, const float* values, int64_t count) {
                       float* sums = &results[row * (end - begin) + out - begin];
                       for (int64_t i = 0; i < count; ++i) {
                         sums[i] = values[i] + (bias ? to_float(bias[out + i]) : 0.f);
                       }
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

// Calls body(pointers) for the rows of x: bf16 as it is where the processor multiplies it, else
// fp32.
template <typename T, typename Body>
void with_rows(const void* x, int64_t rows, int64_t depth, const Body& body) {
#if HE_BFLOAT16_DOT
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (__builtin_cpu_supports("avx512bf16")) {
      return body(row_pointers_to(static_cast<const BFloat16*>(x), rows, depth));
    }
  }
#endif
  body(row_pointers<T>(x, rows, depth));
}

}  // namespace

void linear(const Linear& args) {
  dispatch(args.dtype, [&](auto t) {
    using T = decltype(t);
    if (args.transposed) return run_transposed<T>(args);
    with_rows<T>(args.x, args.rows, args.in_dim, [&](const auto& x) { run_rows<T>(args, x); });
  });
}

void skinny_linear(void* out, const void* x, const void* weight, const void* bias, int64_t rows,
                   int64_t out_dim, int64_t in_dim, DType dtype, Stream) {
  Linear args{};
  args.out = out;
  args.x = x;
  args.weight = weight;
  args.bias = bias;
  args.rows = rows;
  args.out_dim = args.out_stride = out_dim;
  args.in_dim = in_dim;
  args.scale = 1.f;
  args.dtype = dtype;
  linear(args);
}

void fused_lora(const FusedLora& args, Stream) {
  dispatch(args.dtype, [&](auto t) {
    using T = decltype(t);
    with_rows<T>(args.x, args.rows, args.in_dim,
                 [&](const auto& x) { run_fused_lora<T>(args, x); });
  });
}

}  // namespace he::cpu
