// RMSNorm and LayerNorm. Each row is read once into fp32 scratch (with the residual added and
// written back), reduced there, and written once: 2 passes over cached data, one over memory.
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

constexpr int64_t kElementsPerThread = 16384;

// wide = x (+ residual, which is updated and rounded as it is stored).
template <typename T>
void load_row(float* wide, const T* x, T* residual, int64_t dim) {
  auto full = [&](int64_t i) {
    Vec v = load(x + i);
    if (residual != nullptr) {
      store(residual + i, v + load(residual + i));
      v = load(residual + i);
    }
    store(wide + i, v);
  };
  auto partial = [&](int64_t i, int64_t rest) {
    Vec v = load_partial(x + i, rest);
    if (residual != nullptr) {
      store_partial(residual + i, v + load_partial(residual + i, rest), rest);
      v = load_partial(residual + i, rest);
    }
    store_partial(wide + i, v, rest);
  };
  for_each_vec(dim, full, partial);
}

// Sums f(v) over a row; `neutral` fills the last vector up and must have f(neutral) = 0.
template <typename Function>
float sum_row(const float* wide, int64_t dim, const Function& f, float neutral = 0.f) {
  Vec total = sum_vecs(dim, [&](int64_t i) { return f(load(wide + i)); });
  const int64_t rest = dim % kLanes;
  if (rest) total += f(load_partial(wide + dim - rest, rest, neutral));
  return sum(total);
}

struct Moments {
  float shift, square;
};

// Subtracts the rounded mean in place. The remainder of the mean comes back as `shift`, so that
// rows far from zero keep their digits; `square` is the variance.
Moments centre(float* wide, int64_t dim) {
  const float mean = sum_row(wide, dim, [](Vec v) { return v; }) / dim;
  for_each_vec(
      dim, [&](int64_t i) { store(wide + i, load(wide + i) - mean); },
      [&](int64_t i, int64_t rest) {
        for (int64_t j = i; j < i + rest; ++j) wide[j] -= mean;
      });
  const float shift = sum_row(wide, dim, [](Vec v) { return v; }) / dim;
  return {shift, sum_row(wide, dim, [&](Vec v) { return (v - shift) * (v - shift); }, shift) / dim};
}

Moments around_zero(const float* wide, int64_t dim) {
  return {0.f, sum_row(wide, dim, [](Vec v) { return v * v; }) / dim};
}

// out = (wide - shift) * scale * (weight + weight_offset) + bias
template <typename T>
void write_row(T* out, const float* wide, const T* weight, const T* bias, int64_t dim, float shift,
               float scale, float weight_offset) {
  auto full = [&](int64_t i) {
    Vec v = (load(wide + i) - shift) * scale * (load(weight + i) + weight_offset);
    if (bias != nullptr) v += load(bias + i);
    store(out + i, v);
  };
  auto partial = [&](int64_t i, int64_t rest) {
    Vec v = (load_partial(wide + i, rest) - shift) * scale;
    v *= load_partial(weight + i, rest) + weight_offset;
    if (bias != nullptr) v += load_partial(bias + i, rest);
    store_partial(out + i, v, rest);
  };
  for_each_vec(dim, full, partial);
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
    float* wide = scratch.data();
    for (int64_t row = begin; row < end; ++row) {
      T* residual = args.residual ? static_cast<T*>(args.residual) + row * dim : nullptr;
      load_row(wide, static_cast<const T*>(args.x) + row * dim, residual, dim);
      const Moments moments = args.centred ? centre(wide, dim) : around_zero(wide, dim);
      const float scale = 1.f / std::sqrt(moments.square + args.eps);
      write_row(static_cast<T*>(args.out) + row * dim, wide, static_cast<const T*>(args.weight),
                static_cast<const T*>(args.bias), dim, moments.shift, scale, args.weight_offset);
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
