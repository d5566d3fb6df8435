// Activations, one pack of 16 bytes to a thread: every element is read once and written once. A
// block covers up to 256 packs of one row, so a row's bias stays in cache from block to block.
// 3 dtypes x 4 activations x {gated, biased}: 24 instantiations.
#include "cuda/vector.cuh"

namespace he::cuda {
namespace {

constexpr int64_t kMaxThreads = 256;

// fp32 results take the accurate functions; 16-bit ones round away what the fast ones lose.
template <typename T>
__device__ __forceinline__ float exp_for(float x) {
  return std::is_same_v<T, float> ? expf(x) : __expf(x);
}

template <typename T>
__device__ __forceinline__ float divide_for(float dividend, float divisor) {
  return std::is_same_v<T, float> ? dividend / divisor : __fdividef(dividend, divisor);
}

template <typename T, Activation kKind>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kKind == Activation::kSilu) return divide_for<T>(x, 1.f + exp_for<T>(-x));
  if constexpr (kKind == Activation::kGelu) return 0.5f * x * (1.f + erff(0.70710678f * x));
  if constexpr (kKind == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
    return divide_for<T>(x, 1.f + exp_for<T>(-1.59576912f * (x + 0.044715f * x * x * x)));
  }
  return x < 0.f ? 0.f : x;
}

// Where a thread works: rows are cut into `blocks_per_row` blocks.
struct Place {
  int64_t row, i;

  template <typename T>
  static __device__ Place of(unsigned blocks_per_row) {
    const int64_t pack = int64_t{blockIdx.x % blocks_per_row} * blockDim.x + threadIdx.x;
    return {blockIdx.x / blocks_per_row, pack * Pack<T>::kSize};
  }
};

template <typename T, Activation kKind>
__global__ void __launch_bounds__(kMaxThreads)
    activation_and_mul_kernel(T* __restrict__ out,      // [rows, dim]
                              const T* __restrict__ x,  // [rows, 2 * dim]
                              int64_t dim, unsigned blocks_per_row, bool aligned) {
  const Place at = Place::of<T>(blocks_per_row);
  if (at.i >= dim) return;
  float gate[Pack<T>::kSize], up[Pack<T>::kSize];
  const T* row = x + at.row * 2 * dim;
  load_floats(gate, row + at.i, dim - at.i, aligned);
  load_floats(up, row + dim + at.i, dim - at.i, aligned);
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) gate[j] = activate<T, kKind>(gate[j]) * up[j];
  store_floats(out + at.row * dim + at.i, gate, dim - at.i, aligned);
}

template <typename T, Activation kKind>
__global__ void __launch_bounds__(kMaxThreads)
    bias_activation_kernel(T* __restrict__ out,         // [rows, dim]
                           const T* __restrict__ x,     // [rows, dim]
                           const T* __restrict__ bias,  // [dim] or null
                           int64_t dim, unsigned blocks_per_row, bool aligned) {
  const Place at = Place::of<T>(blocks_per_row);
  if (at.i >= dim) return;
  float values[Pack<T>::kSize], shift[Pack<T>::kSize] = {};
  const int64_t offset = at.row * dim + at.i;
  load_floats(values, x + offset, dim - at.i, aligned);
  if (bias) load_floats(shift, bias + at.i, dim - at.i, aligned);
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) values[j] = activate<T, kKind>(values[j] + shift[j]);
  store_floats(out + offset, values, dim - at.i, aligned);
}

// Calls body with the activation as an integral_constant.
template <typename Body>
void dispatch_activation(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::kSilu:
      return body(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kGelu:
      return body(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu:
      return body(std::integral_constant<Activation, Activation::kRelu>{});
  }
}

struct Shape {
  unsigned threads, blocks_per_row;
};

template <typename T>
Shape shape_of(int64_t dim) {
  const int64_t packs = ceil_div<int64_t>(dim, Pack<T>::kSize);
  const int64_t threads = std::min(kMaxThreads, ceil_div<int64_t>(packs, kWarpSize) * kWarpSize);
  return {static_cast<unsigned>(threads), grid_of(ceil_div(packs, threads)).x};
}

}  // namespace

void activation_and_mul(void* out, const void* x, int64_t rows, int64_t dim, Activation activation,
                        DType dtype, Stream stream) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const Shape shape = shape_of<T>(dim);
    dispatch_activation(activation, [&](auto kind) {
      launch(activation_and_mul_kernel<T, decltype(kind)::value>,
             grid_of(rows * shape.blocks_per_row), shape.threads, 0, stream, static_cast<T*>(out),
             static_cast<const T*>(x), dim, shape.blocks_per_row, packs_aligned<T>(dim, {out, x}));
    });
  });
}

void bias_activation(void* out, const void* x, const void* bias, int64_t rows, int64_t dim,
                     Activation activation, DType dtype, Stream stream) {
  if (bias == nullptr) {  // one long row: short ones would leave threads idle
    dim *= rows;
    rows = 1;
  }
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const Shape shape = shape_of<T>(dim);
    dispatch_activation(activation, [&](auto kind) {
      launch(bias_activation_kernel<T, decltype(kind)::value>, grid_of(rows * shape.blocks_per_row),
             shape.threads, 0, stream, static_cast<T*>(out), static_cast<const T*>(x),
             static_cast<const T*>(bias), dim, shape.blocks_per_row,
             packs_aligned<T>(dim, {out, x, bias}));
    });
  });
}

}  // namespace he::cuda
