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

float mean_of(const float* wide, int64_t dim) {
  Vec total{};
  for_each_vec(
      dim, [&](int64_t i) { total += load(wide + i); },
      [&](int64_t i, int64_t rest) { total += load_partial(wide + i, rest); });
  return sum(total) / dim;
}

float mean_square_around(const float* wide, float centre, int64_t dim) {
  Vec total{};
  auto add = [&](Vec v) { total += v * v; };
  for_each_vec(
      dim, [&](int64_t i) { add(load(wide + i) - centre); },
      [&](int64_t i, int64_t rest) { add(load_partial(wide + i, rest, centre) - centre); });
  return sum(total) / dim;
}

// out = (wide - centre) * scale * (weight + weight_offset) + bias
template <typename T>
void write_row(T* out, const float* wide, const T* weight, const T* bias, int64_t dim, float centre,
               float scale, float weight_offset) {
  auto full = [&](int64_t i) {
    Vec v = (load(wide + i) - centre) * scale * (load(weight + i) + weight_offset);
    if (bias != nullptr) v += load(bias + i);
    store(out + i, v);
  };
  auto partial = [&](int64_t i, int64_t rest) {
    Vec v = (load_partial(wide + i, rest) - centre) * scale;
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
      const float centre = args.centred ? mean_of(wide, dim) : 0.f;
      const float scale = 1.f / std::sqrt(mean_square_around(wide, centre, dim) + args.eps);
      write_row(static_cast<T*>(args.out) + row * dim, wide, static_cast<const T*>(args.weight),
                static_cast<const T*>(args.bias), dim, centre, scale, args.weight_offset);
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
