// RMSNorm and LayerNorm, one row to a team of threads: a warp for rows of up to 512 elements, else
// a block of one thread per 16 elements. A thread keeps its elements in fp32 registers, so a row is
// read once and written once; reductions go through shuffles and, in a block, 128 bytes of shared
// memory. Rows over 16384 elements do not fit a block's registers and are read again from cache for
// each reduction. 3 dtypes x {warp, block, long row}: 9 instantiations.
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace he::cuda {
namespace {

constexpr int kElementsPerThread = 16;
constexpr int kMaxThreads = 1024;
constexpr int kWarpsPerBlock = 4;  // of those with a row each

struct NormArgs {
  void* out;           // [rows, dim]
  const void* x;       // [rows, dim]
  void* residual;      // [rows, dim] or null
  const void* weight;  // [dim]
  const void* bias;    // [dim] or null
  int64_t rows, dim;
  float eps, weight_offset;
  bool centred, aligned;
};

struct WarpTeam {
  static __device__ int64_t row() {
    return int64_t{blockIdx.x} * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  }
  static __device__ int rank() { return threadIdx.x % kWarpSize; }
  static __device__ int size() { return kWarpSize; }
  static __device__ float sum(float value) { return warp_sum(value); }
};

struct BlockTeam {
  static __device__ int64_t row() { return blockIdx.x; }
  static __device__ int rank() { return threadIdx.x; }
  static __device__ int size() { return blockDim.x; }
  static __device__ float sum(float value) { return block_sum(value); }
};

// x (+ residual, which is updated and rounded as it is stored).
template <typename T>
__device__ __forceinline__ void load_summed(float* values, const NormArgs& a, int64_t row,
                                            int64_t i) {
  const int64_t offset = row * a.dim + i;
  load_floats(values, static_cast<const T*>(a.x) + offset, a.dim - i, a.aligned);
  if (a.residual == nullptr) return;
  T* residual = static_cast<T*>(a.residual) + offset;
  float before[Pack<T>::kSize];
  load_floats(before, residual, a.dim - i, a.aligned);
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) {
    values[j] = to_float(from_float<T>(values[j] + before[j]));
  }
  store_floats(residual, values, a.dim - i, a.aligned);
}

// out = values * scale * (weight + weight_offset) + bias
template <typename T>
__device__ __forceinline__ void store_scaled(const NormArgs& a, int64_t row, int64_t i,
                                             float* values, float scale) {
  float weight[Pack<T>::kSize], bias[Pack<T>::kSize] = {};
  load_floats(weight, static_cast<const T*>(a.weight) + i, a.dim - i, a.aligned);
  if (a.bias) load_floats(bias, static_cast<const T*>(a.bias) + i, a.dim - i, a.aligned);
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) {
    values[j] = values[j] * scale * (weight[j] + a.weight_offset) + bias[j];
  }
  store_floats(static_cast<T*>(a.out) + row * a.dim + i, values, a.dim - i, a.aligned);
}

// The elements of a row that one thread keeps: packs `rank`, `rank + size`, ... of it.
template <typename T, typename Team>
struct Share {
  static constexpr int kPack = Pack<T>::kSize, kPacks = kElementsPerThread / kPack;
  float values[kPacks][kPack];
  int dim;

  static __device__ int first(int pack) { return (pack * Team::size() + Team::rank()) * kPack; }

  __device__ void load(const NormArgs& a, int64_t row) {
    dim = static_cast<int>(a.dim);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (first(p) < dim) load_summed<T>(values[p], a, row, first(p));
    }
  }

  template <typename Body>
  __device__ void for_each(const Body& body) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (first(p) + j < dim) body(values[p][j]);
      }
    }
  }

  __device__ float mean() {
    float total = 0.f;
    for_each([&](float& value) { total += value; });
    return Team::sum(total) / dim;
  }

  __device__ float mean_square() {
    float total = 0.f;
    for_each([&](float& value) { total += value * value; });
    return Team::sum(total) / dim;
  }

  // Twice, because the mean of a row far from zero is rounded coarsely: the second subtraction
  // takes what the first left.
  __device__ void centre() {
    for (int pass = 0; pass < 2; ++pass) {
      const float shift = mean();
      for_each([&](float& value) { value -= shift; });
    }
  }
};

template <typename T, typename Team>
__global__ void __launch_bounds__(kMaxThreads) norm_kernel(NormArgs a) {
  const int64_t row = Team::row();
  if (row >= a.rows) return;
  Share<T, Team> share;
  share.load(a, row);
  if (a.centred) share.centre();
  const float scale = 1.f / sqrtf(share.mean_square() + a.eps);
#pragma unroll
  for (int p = 0; p < share.kPacks; ++p) {
    const int i = share.first(p);
    if (i < share.dim) store_scaled<T>(a, row, i, share.values[p], scale);
  }
}

// As norm_kernel with a block to a row, reading the row again for each reduction.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads) long_norm_kernel(NormArgs a) {
  constexpr int kPack = Pack<T>::kSize;
  const int64_t row = blockIdx.x;
  const int64_t begin = int64_t{threadIdx.x} * kPack, step = int64_t{blockDim.x} * kPack;
  const T* summed = static_cast<const T*>(a.residual ? a.residual : a.x) + row * a.dim;
  float values[kPack], mean = 0.f, shift = 0.f;
  for (int64_t i = begin; i < a.dim; i += step) load_summed<T>(values, a, row, i);
  const auto mean_of = [&](auto term) {
    float total = 0.f;
    for (int64_t i = begin; i < a.dim; i += step) {
      load_floats(values, summed + i, a.dim - i, a.aligned);
      for (int j = 0; j < kPack; ++j) {
        if (i + j < a.dim) total += term((values[j] - mean) - shift);
      }
    }
    return block_sum(total) / a.dim;
  };
  if (a.centred) {
    mean = mean_of([](float value) { return value; });
    shift = mean_of([](float value) { return value; });
  }
  const float scale = 1.f / sqrtf(mean_of([](float value) { return value * value; }) + a.eps);
  for (int64_t i = begin; i < a.dim; i += step) {
    load_floats(values, summed + i, a.dim - i, a.aligned);
    for (int j = 0; j < kPack; ++j) values[j] = (values[j] - mean) - shift;
    store_scaled<T>(a, row, i, values, scale);
  }
}

template <typename T>
void launch_norm(NormArgs a, Stream stream) {
  a.aligned = packs_aligned<T>(a.dim, {a.out, a.x, a.residual, a.weight, a.bias});
  const int64_t threads = ceil_div<int64_t>(a.dim, kElementsPerThread);
  if (threads <= kWarpSize) {
    const int64_t blocks = ceil_div<int64_t>(a.rows, kWarpsPerBlock);
    launch(norm_kernel<T, WarpTeam>, grid_of(blocks), kWarpsPerBlock * kWarpSize, 0, stream, a);
  } else if (threads <= kMaxThreads) {
    const unsigned block = ceil_div<unsigned>(threads, kWarpSize) * kWarpSize;
    launch(norm_kernel<T, BlockTeam>, grid_of(a.rows), block, 0, stream, a);
  } else {
    launch(long_norm_kernel<T>, grid_of(a.rows), kMaxThreads, 0, stream, a);
  }
}

}  // namespace

void rms_norm(void* out, const void* x, void* residual, const void* weight, int64_t rows,
              int64_t dim, float eps, float weight_offset, DType dtype, Stream stream) {
  const NormArgs args{out, x,   residual,      weight, nullptr, rows,
                      dim, eps, weight_offset, false,  false};
  dispatch(dtype, [&](auto t) { launch_norm<decltype(t)>(args, stream); });
}

void layer_norm(void* out, const void* x, void* residual, const void* weight, const void* bias,
                int64_t rows, int64_t dim, float eps, DType dtype, Stream stream) {
  const NormArgs args{out, x, residual, weight, bias, rows, dim, eps, 0.f, true, false};
  dispatch(dtype, [&](auto t) { launch_norm<decltype(t)>(args, stream); });
}

}  // namespace he::cuda
