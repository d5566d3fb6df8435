// Kernels that show what each emulated function gives; tests/test_cuda_emulator.py knows what the
// CUDA and PTX manuals say it must.
#include "cuda/common.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "export.h"

namespace he::cuda {

// Outside the unnamed namespace, where the planted bugs have theirs: dynamic shared memory must be
// found from both.
__global__ void ldmatrix_kernel(uint32_t* out,         // [12, 32]: x4, x4 trans, x2, x2 trans
                                const uint16_t* in) {  // [4, 8, 8]
  extern __shared__ __align__(16) unsigned char smem_raw[];
  auto* matrices = reinterpret_cast<uint16_t*>(smem_raw);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += kWarpSize) matrices[i] = in[i];
  __syncwarp();
  uint32_t x4[4], x4_trans[4], x2[2], x2_trans[2];
  ldmatrix_x4(x4, matrices + lane * 8);
  ldmatrix_x4_trans(x4_trans, matrices + lane * 8);
  ldmatrix_x2(x2, matrices + lane % 16 * 8);
  ldmatrix_x2_trans(x2_trans, matrices + lane % 16 * 8);
  for (int i = 0; i < 4; ++i) out[i * kWarpSize + lane] = x4[i];
  for (int i = 0; i < 4; ++i) out[(4 + i) * kWarpSize + lane] = x4_trans[i];
  for (int i = 0; i < 2; ++i) out[(8 + i) * kWarpSize + lane] = x2[i];
  for (int i = 0; i < 2; ++i) out[(10 + i) * kWarpSize + lane] = x2_trans[i];
}

namespace {

__global__ void collectives_kernel(int* out) {  // [20, 32]
  const int lane = threadIdx.x;
  int row = 0;
  const auto write = [&](int value) { out[row++ * kWarpSize + lane] = value; };
  write(__shfl_sync(kFullMask, lane * 10, 5));
  write(__shfl_sync(kFullMask, lane * 10, 5, 8));
  write(__shfl_xor_sync(kFullMask, lane, 3));
  write(__shfl_xor_sync(kFullMask, lane, 12, 8));  // leaves the segment of 8 upwards
  write(__shfl_down_sync(kFullMask, lane, 4));
  write(__shfl_down_sync(kFullMask, lane, 4, 16));
  write(__shfl_up_sync(kFullMask, lane, 4));
  write(__shfl_up_sync(kFullMask, lane, 4, 16));
  write(static_cast<int>(__ballot_sync(kFullMask, lane % 3 == 0)));
  write(__any_sync(kFullMask, lane == 31));
  write(__all_sync(kFullMask, lane < 31));
  write(static_cast<int>(__reduce_add_sync(kFullMask, static_cast<unsigned>(lane))));
  write(__reduce_min_sync(kFullMask, 7 - lane));
  write(__reduce_max_sync(kFullMask, 7 - lane));
  write(static_cast<int>(__reduce_and_sync(kFullMask, lane | 6u)));
  write(static_cast<int>(__reduce_or_sync(kFullMask, lane & 6u)));
  write(static_cast<int>(__reduce_xor_sync(kFullMask, 1u << lane)));
  write(static_cast<int>(__match_any_sync(kFullMask, lane % 16)));
  const float third = __shfl_sync(kFullMask, lane + 0.5f, 3);
  write(static_cast<int>(third * 2.f));
  const __nv_bfloat16 fourth = __shfl_sync(kFullMask, __float2bfloat16(float(lane)), 4);
  write(static_cast<int>(__bfloat162float(fourth)));
}

// Half of the warp makes one exchange more than the other, then all meet; and lane 1 is in the mask
// of lane 0, which may wait for it, when it still has to meet lane 2.
__global__ void partial_masks_kernel(int* out) {  // [3, 32]
  const int lane = threadIdx.x;
  int value = lane;
  if (lane < 16) value = __shfl_xor_sync(0x0000ffffu, value, 1);
  out[lane] = value;
  out[kWarpSize + lane] = __shfl_xor_sync(kFullMask, lane, 16);
  value = lane;
  if (lane == 1 || lane == 2) value = __shfl_sync(0b110u, value, 2);
  if (lane == 0 || lane == 1) value = __shfl_sync(0b011u, value, 1);
  out[2 * kWarpSize + lane] = value;
}

// What one thread gets from the functions on bits of x and y.
__global__ void bits_kernel(long long* out,  // [13]
                            int x, int y) {
  const long long wide = static_cast<long long>(x) << 32 | y;
  int i = 0;
  out[i++] = __popc(x);
  out[i++] = __popcll(wide);
  out[i++] = __clz(x);
  out[i++] = __clzll(y);
  out[i++] = __ffs(x);
  out[i++] = __ffsll(wide);
  out[i++] = __umulhi(x, y);
  out[i++] = __umul64hi(wide, wide);
  out[i++] = __float_as_int(__int_as_float(x));
  out[i++] = __float_as_uint(__uint_as_float(y));
  out[i++] = __double_as_longlong(__longlong_as_double(wide));
  out[i++] = min(x, y);
  out[i++] = max(x, y);
}

// What each atomic leaves of 12 when it is given 10; a compare-and-swap expects 12.
__global__ void atomic_kinds_kernel(unsigned* out) {  // [8]
  for (int i = 0; i < 8; ++i) out[i] = 12;
  atomicSub(&out[0], 10u);
  atomicExch(&out[1], 10u);
  atomicAnd(&out[2], 10u);
  atomicOr(&out[3], 10u);
  atomicXor(&out[4], 10u);
  atomicInc(&out[5], 10u);
  atomicDec(&out[6], 10u);
  atomicCAS(&out[7], 12u, 10u);
}

// The order in which the threads of the grid had their first turn.
__global__ void tickets_kernel(int* out,        // [gridDim * blockDim]
                               int* counter) {  // [1], zero
  out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

// Counts values below 8 and keeps their sum, smallest and largest.
__global__ void atomics_kernel(int* counts,        // [8]
                               float* sum,         // [1]
                               int* extremes,      // [2]
                               const int* values,  // [n]
                               int n) {
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride) {
    atomicAdd(&counts[values[i]], 1);
    atomicAdd(sum, values[i] * 0.5f);
    atomicMin(&extremes[0], values[i]);
    atomicMax(&extremes[1], values[i]);
  }
}

__global__ void barrier_votes_kernel(int* out) {  // [3, blockDim]
  const int thread = threadIdx.x, size = blockDim.x;
  out[thread] = __syncthreads_count(thread % 2 == 0);
  out[size + thread] = __syncthreads_or(thread == 40);
  out[2 * size + thread] = __syncthreads_and(thread != 40);
}

// Sum and maximum of each row; the second reduction reuses the shared memory of the first.
__global__ void reduce_kernel(float* sums,      // [rows]
                              float* maxima,    // [rows]
                              const float* in,  // [rows, dim]
                              int dim) {
  const float* row = in + static_cast<int64_t>(blockIdx.x) * dim;
  float sum = 0.f, largest = -INFINITY;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    sum += row[i];
    largest = fmaxf(largest, row[i]);
  }
  sum = block_sum(sum);
  largest = block_max(largest);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    maxima[blockIdx.x] = largest;
  }
}

// out = 2 in, by whole packs.
template <typename T>
__global__ void double_kernel(T* out, const T* in, int packs) {  // both [packs * Pack<T>::kSize]
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  Pack<T> pack = load_pack(in + i * Pack<T>::kSize);
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) pack[j] = from_float<T>(2.f * to_float(pack[j]));
  store_pack(out + i * Pack<T>::kSize, pack);
}

// c += a b with one mma.sync, fragments built by hand from the layouts in the PTX manual.
template <typename T>
__global__ void mma_kernel(float* c,      // [16, 8]
                           const T* a,    // [16, 16]
                           const T* b) {  // [16, 8]
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  T a_values[8], b_values[4];
  float fragment[4];
  for (int i = 0; i < 8; ++i) a_values[i] = a[(g + i / 2 % 2 * 8) * 16 + q * 2 + i % 2 + i / 4 * 8];
  for (int i = 0; i < 4; ++i) b_values[i] = b[(q * 2 + i % 2 + i / 2 * 8) * 8 + g];
  for (int i = 0; i < 4; ++i) fragment[i] = c[(g + i / 2 * 8) * 8 + q * 2 + i % 2];
  uint32_t a_registers[4], b_registers[2];
  memcpy(a_registers, a_values, sizeof(a_registers));
  memcpy(b_registers, b_values, sizeof(b_registers));
  mma_m16n8k16<T>(fragment, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + q * 2 + i % 2] = fragment[i];
}

template <typename T2>
__global__ void fused_multiply_add_kernel(T2* out, const T2* x, const T2* y, const T2* z) {
  const int i = threadIdx.x;
  out[i] = __hfma2(x[i], y[i], z[i]);
}

template <typename T>
void run_double(void* out, const void* in, int n) {
  constexpr int kThreads = 64;
  const int packs = n / Pack<T>::kSize;
  launch(double_kernel<T>, ceil_div(packs, kThreads), kThreads, 0, nullptr, static_cast<T*>(out),
         static_cast<const T*>(in), packs);
}

template <typename T>
void run_mma(float* c, const void* a, const void* b) {
  launch(mma_kernel<T>, 1, kWarpSize, 0, nullptr, c, static_cast<const T*>(a),
         static_cast<const T*>(b));
}

template <typename T2>
void run_fma(void* out, const void* x, const void* y, const void* z, int pairs) {
  launch(fused_multiply_add_kernel<T2>, 1, pairs, 0, nullptr, static_cast<T2*>(out),
         static_cast<const T2*>(x), static_cast<const T2*>(y), static_cast<const T2*>(z));
}

}  // namespace
}  // namespace he::cuda

extern "C" {

using namespace he::cuda;

HE_EXPORT void collectives(int* out) { launch(collectives_kernel, 1, kWarpSize, 0, nullptr, out); }

HE_EXPORT void partial_masks(int* out) {
  launch(partial_masks_kernel, 1, kWarpSize, 0, nullptr, out);
}

HE_EXPORT void bits(long long* out, int x, int y) {
  launch(bits_kernel, 1, 1, 0, nullptr, out, x, y);
}

HE_EXPORT void atomic_kinds(unsigned* out) { launch(atomic_kinds_kernel, 1, 1, 0, nullptr, out); }

HE_EXPORT void tickets(int* out, int* counter, int blocks, int threads) {
  launch(tickets_kernel, blocks, threads, 0, nullptr, out, counter);
}

HE_EXPORT void atomics(int* counts, float* sum, int* extremes, const int* values, int n) {
  launch(atomics_kernel, 3, 96, 0, nullptr, counts, sum, extremes, values, n);
}

HE_EXPORT void barrier_votes(int* out, int threads) {
  launch(barrier_votes_kernel, 1, threads, 0, nullptr, out);
}

HE_EXPORT void reduce(float* sums, float* maxima, const float* in, int rows, int dim, int threads) {
  launch(reduce_kernel, rows, threads, 0, nullptr, sums, maxima, in, dim);
}

HE_EXPORT void double_values(void* out, const void* in, int n, he::DType dtype) {
  dispatch(dtype, [&](auto t) { run_double<decltype(t)>(out, in, n); });
}

HE_EXPORT void ldmatrix(uint32_t* out, const uint16_t* in) {
  launch(ldmatrix_kernel, 1, kWarpSize, 256 * sizeof(uint16_t), nullptr, out, in);
}

HE_EXPORT void mma(float* c, const void* a, const void* b, he::DType dtype) {
  if (dtype == he::DType::kBFloat16) run_mma<__nv_bfloat16>(c, a, b);
  if (dtype == he::DType::kFloat16) run_mma<__half>(c, a, b);
}

HE_EXPORT void fused_multiply_add(void* out, const void* x, const void* y, const void* z, int pairs,
                                  he::DType dtype) {
  if (dtype == he::DType::kBFloat16) run_fma<__nv_bfloat162>(out, x, y, z, pairs);
  if (dtype == he::DType::kFloat16) run_fma<__half2>(out, x, y, z, pairs);
}

}  // extern "C"
