// Activations. One read and one write of memory; the transcendental functions are polynomials on
// whole vectors.
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

constexpr int64_t kElementsPerThread = 8192;

template <Activation kind>
Vec activate(Vec x) {
  if constexpr (kind == Activation::kSilu) return x / (1.f + exp(-x));
  if constexpr (kind == Activation::kGelu) return gelu(x);
  if constexpr (kind == Activation::kGeluTanh) return gelu_tanh(x);
  return select(x < 0.f, Vec{}, x);
}

// Calls body with a functor that applies the activation.
template <typename Body>
void dispatch_activation(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::kSilu:
      return body([](Vec x) { return activate<Activation::kSilu>(x); });
    case Activation::kGelu:
      return body([](Vec x) { return activate<Activation::kGelu>(x); });
    case Activation::kGeluTanh:
      return body([](Vec x) { return activate<Activation::kGeluTanh>(x); });
    case Activation::kRelu:
      return body([](Vec x) { return activate<Activation::kRelu>(x); });
  }
}

template <typename T, typename Function>
void gated_row(T* out, const T* gate, const T* up, int64_t dim, const Function& f) {
  map_vecs(out, dim, [&](Vec g, Vec u) { return f(g) * u; }, gate, up);
}

template <typename T, typename Function>
void biased_row(T* out, const T* x, const T* bias, int64_t dim, const Function& f) {
  if (bias == nullptr) return map_vecs(out, dim, f, x);
  map_vecs(out, dim, [&](Vec v, Vec b) { return f(v + b); }, x, bias);
}

// Rows in parallel; a few long rows are cut into pieces first, which is what `body` gets.
template <typename Body>
void for_each_piece(int64_t rows, int64_t dim, const Body& body) {
  const int64_t pieces = rows >= available_threads() ? 1 : dim / kElementsPerThread + 1;
  const int64_t length = (dim / pieces + kLanes) / kLanes * kLanes;
  parallel_for(rows * pieces, kElementsPerThread / length + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % pieces * length;
      if (start < dim) body(i / pieces, start, std::min(length, dim - start));
    }
  });
}

}  // namespace

void activation_and_mul(void* out, const void* x, int64_t rows, int64_t dim, Activation activation,
                        DType dtype, Stream) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_activation(activation, [&](const auto& f) {
      for_each_piece(rows, dim, [&](int64_t row, int64_t start, int64_t length) {
        const T* gate = static_cast<const T*>(x) + row * 2 * dim + start;
        gated_row(static_cast<T*>(out) + row * dim + start, gate, gate + dim, length, f);
      });
    });
  });
}

void bias_activation(void* out, const void* x, const void* bias, int64_t rows, int64_t dim,
                     Activation activation, DType dtype, Stream) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_activation(activation, [&](const auto& f) {
      for_each_piece(rows, dim, [&](int64_t row, int64_t start, int64_t length) {
        const T* row_bias = bias ? static_cast<const T*>(bias) + start : nullptr;
        biased_row(static_cast<T*>(out) + row * dim + start,
                   static_cast<const T*>(x) + row * dim + start, row_bias, length, f);
      });
    });
  });
}

}  // namespace he::cpu
