// RMSNorm and LayerNorm. Each row is read once from memory, into fp32 scratch unless it is that
// already (with the residual added and written back), reduced in the caches, and written once.
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

constexpr int64_t kElementsPerThread = 16384;

// wide = x + residual; the residual is updated, and what it rounds to is what is normalised.
template <typename T>
void add_residual(float* wide, const T* x, T* residual, int64_t dim) {
  map_vecs(residual, dim, [](Vec a, Vec b) { return a + b; }, x, residual);
  convert(wide, residual, dim);
}

// Sums f(v) over a row; `neutral` fills the last vector up and must have f(neutral) = 0.
template <typename Function>
double sum_row(const float* wide, int64_t dim, const Function& f, float neutral = 0.f) {
  Vec total = sum_vecs(dim, [&](int64_t i) { return f(load(wide + i)); });
  const int64_t rest = dim % kLanes;
  if (rest) total += f(load_partial(wide + dim - rest, rest, neutral));
  return sum(total);
}

struct Moments {
  double mean, square;
};

// Around the rounded mean, so that rows far from zero keep their digits; `square` is the variance.
Moments centred_moments(const float* wide, int64_t dim) {
  const float mean = static_cast<float>(sum_row(wide, dim, [](Vec v) { return v; }) / dim);
  Vec drift{};
  const auto square = [&](Vec v) {
    const Vec d = v - mean;
    drift += d;
    return d * d;
  };
  const double squares = sum_row(wide, dim, square, mean) / dim;
  const double shift = sum(drift) / static_cast<double>(dim);  // what the rounding left over
  return {mean + shift, squares - shift * shift};
}

Moments moments_around_zero(const float* wide, int64_t dim) {
  return {0., sum_row(wide, dim, [](Vec v) { return v * v; }) / dim};
}

// out = (wide - mean) * scale * (weight + weight_offset) + bias. A mean within the spread goes into
// the multiply-add, which rounds once; a larger one is subtracted first, or digits would cancel.
template <typename T>
void write_row(T* out, const float* wide, const T* weight, const T* bias, int64_t dim, double mean,
               float scale, float weight_offset) {
  const float centre = std::abs(mean) * scale <= 1. ? 0.f : static_cast<float>(mean);
  const float offset = static_cast<float>((centre - mean) * scale);
  const auto normed = [&](Vec v) { return (v - centre) * scale + offset; };
  const auto scaled = [&](Vec v, Vec w) { return normed(v) * (w + weight_offset); };
  if (bias == nullptr) return map_vecs(out, dim, scaled, wide, weight);
  map_vecs(out, dim, [&](Vec v, Vec w, Vec b) { return scaled(v, w) + b; }, wide, weight, bias);
}

struct NormArgs {
  void* out;
  const void* x;
  void* residual;
  const void* weight;
  const void* bias;
  int64_t rows, dim;
  float eps, weight_offset;
  bool centred;
};

template <typename T>
void normalise(const NormArgs& args) {
  const int64_t dim = args.dim;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / dim);
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> scratch;
    if (static_cast<int64_t>(scratch.size()) < dim) scratch.resize(dim);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.x) + row * dim;
      const float* wide = nullptr;
      if (args.residual) {
        add_residual(scratch.data(), x, static_cast<T*>(args.residual) + row * dim, dim);
        wide = scratch.data();
      } else {
        wide = widened(scratch.data(), x, dim);
      }
      const Moments moments =
          args.centred ? centred_moments(wide, dim) : moments_around_zero(wide, dim);
      // In fp64, because an error here is an error of the whole row.
      const float scale = static_cast<float>(1. / std::sqrt(moments.square + double{args.eps}));
      write_row(static_cast<T*>(args.out) + row * dim, wide, static_cast<const T*>(args.weight),
                static_cast<const T*>(args.bias), dim, moments.mean, scale, args.weight_offset);
    }
  });
}

}  // namespace

void rms_norm(void* out, const void* x, void* residual, const void* weight, int64_t rows,
              int64_t dim, float eps, float weight_offset, DType dtype, Stream) {
  const NormArgs args{out, x, residual, weight, nullptr, rows, dim, eps, weight_offset, false};
  dispatch(dtype, [&](auto t) { normalise<decltype(t)>(args); });
}

void layer_norm(void* out, const void* x, void* residual, const void* weight, const void* bias,
                int64_t rows, int64_t dim, float eps, DType dtype, Stream) {
  const NormArgs args{out, x, residual, weight, bias, rows, dim, eps, 0.f, true};
  dispatch(dtype, [&](auto t) { normalise<decltype(t)>(args); });
}

}  // namespace he::cpu
