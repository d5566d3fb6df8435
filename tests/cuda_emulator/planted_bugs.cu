// One mistake a kernel, small enough to see.
#include "cuda/common.cuh"
#include "cuda/reduce.cuh"
#include "planted_bugs.h"

namespace he::cuda {

namespace {

std::vector<float> iota(int size) {
  std::vector<float> values(size);
  for (int i = 0; i < size; ++i) values[i] = static_cast<float>(i);
  return values;
}

// Calls f with kBroken as a compile-time constant.
template <typename F>
void with_bug(bool broken, F f) {
  broken ? f(std::true_type{}) : f(std::false_type{});
}

// ---- barriers -----------------------------------------------------------------------------------

template <bool kBarrierBeforeRead, bool kBarrierBeforeReuse>
__device__ float fragile_block_sum(float value) {
  __shared__ float partials[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) partials[warp] = value;
  if constexpr (kBarrierBeforeRead) __syncthreads();
  value = lane < static_cast<int>(blockDim.x) / kWarpSize ? partials[lane] : 0.f;
  value = warp_sum(value);
  if constexpr (kBarrierBeforeReuse) __syncthreads();
  return value;
}

// The sum of the elements, then of their squares: two reductions in a row.
template <bool kBarrierBeforeRead, bool kBarrierBeforeReuse>
__global__ void two_sums_kernel(float* out, const float* in) {
  const float x = in[threadIdx.x];
  const float sum = fragile_block_sum<kBarrierBeforeRead, kBarrierBeforeReuse>(x);
  const float squares = fragile_block_sum<kBarrierBeforeRead, kBarrierBeforeReuse>(x * x);
  if (threadIdx.x % kWarpSize == 0) {
    out[threadIdx.x / kWarpSize * 2] = sum;
    out[threadIdx.x / kWarpSize * 2 + 1] = squares;
  }
}

template <bool kBarrierBeforeRead, bool kBarrierBeforeReuse>
void run_two_sums() {
  constexpr int kThreads = 128, kWarps = kThreads / kWarpSize;
  const std::vector<float> in = iota(kThreads);
  float sum = 0.f, squares = 0.f;
  for (float x : in) sum += x, squares += x * x;
  std::vector<float> out(2 * kWarps), expected(2 * kWarps);
  for (int i = 0; i < 2 * kWarps; ++i) expected[i] = i % 2 == 0 ? sum : squares;
  launch(two_sums_kernel<kBarrierBeforeRead, kBarrierBeforeReuse>, 1, kThreads, 0, nullptr,
         out.data(), in.data());
  expect_equal(out, expected);
}

void missing_barrier_before_read(bool broken) {
  broken ? run_two_sums<false, true>() : run_two_sums<true, true>();
}

void missing_barrier_before_reuse(bool broken) {
  broken ? run_two_sums<true, false>() : run_two_sums<true, true>();
}

template <bool kBroken>
__global__ void reverse_warp_kernel(float* out) {
  __shared__ float values[kWarpSize];
  const int lane = threadIdx.x;
  values[lane] = static_cast<float>(lane);
  if constexpr (!kBroken) __syncwarp();  // lanes of a warp do not run in step
  out[lane] = values[kWarpSize - 1 - lane];
}

void missing_syncwarp(bool broken) {
  std::vector<float> out(kWarpSize);
  with_bug(broken, [&](auto bug) {
    launch(reverse_warp_kernel<bug.value>, 1, kWarpSize, 0, nullptr, out.data());
  });
  const std::vector<float> lanes = iota(kWarpSize);
  expect_equal(out, {lanes.rbegin(), lanes.rend()});
}

template <bool kBroken>
__global__ void branches_kernel(float* out) {
  __shared__ float values[64];
  const int i = threadIdx.x;
  if (kBroken && i < 32) {
    values[i] = 1.f;
    __syncthreads();
  } else {
    values[i] = 1.f;
    __syncthreads();
  }
  out[i] = values[63 - i];
}

void divergent_barrier(bool broken) {
  std::vector<float> out(64);
  with_bug(broken,
           [&](auto bug) { launch(branches_kernel<bug.value>, 1, 64, 0, nullptr, out.data()); });
  expect_equal(out, std::vector<float>(64, 1.f));
}

// ---- warp collectives ---------------------------------------------------------------------------

// Swaps neighbours among the first 16 lanes.
template <bool kBroken>
__global__ void half_warp_kernel(float* out) {
  float value = threadIdx.x;
  constexpr unsigned kMask = kBroken ? kFullMask : 0x0000ffffu;
  if (threadIdx.x < 16) value = __shfl_xor_sync(kMask, value, 1);
  out[threadIdx.x] = value;
}

void divergent_shuffle(bool broken) {
  std::vector<float> out(kWarpSize), expected = iota(kWarpSize);
  for (int i = 0; i < 16; i += 2) std::swap(expected[i], expected[i + 1]);
  with_bug(broken, [&](auto bug) {
    launch(half_warp_kernel<bug.value>, 1, kWarpSize, 0, nullptr, out.data());
  });
  expect_equal(out, expected);
}

template <unsigned kMask>
__global__ void swap_halves_kernel(float* out) {
  const float value = threadIdx.x;
  out[threadIdx.x] = __shfl_xor_sync(kMask, value, 16);
}

void wrong_mask(bool broken) {
  std::vector<float> out(kWarpSize), expected = iota(kWarpSize);
  for (int i = 0; i < 16; ++i) std::swap(expected[i], expected[i + 16]);
  launch(broken ? swap_halves_kernel<0x0000ffffu> : swap_halves_kernel<kFullMask>, 1, kWarpSize, 0,
         nullptr, out.data());
  expect_equal(out, expected);
}

template <bool kBroken>
__global__ void broadcast_kernel(float* out) {
  float value = threadIdx.x;
  if (threadIdx.x < 16) value = __shfl_sync(0x0000ffffu, value, kBroken ? 20 : 12);
  out[threadIdx.x] = value;
}

void shuffle_from_outside_the_mask(bool broken) {
  std::vector<float> out(kWarpSize), expected = iota(kWarpSize);
  std::fill(expected.begin(), expected.begin() + 16, 12.f);
  with_bug(broken, [&](auto bug) {
    launch(broadcast_kernel<bug.value>, 1, kWarpSize, 0, nullptr, out.data());
  });
  expect_equal(out, expected);
}

// ---- memory -------------------------------------------------------------------------------------

template <bool kBroken, bool kDynamic>
__global__ void warp_total_kernel(float* out) {
  extern __shared__ __align__(16) unsigned char smem_raw[];
  __shared__ float fixed[kWarpSize];
  float* values = kDynamic ? reinterpret_cast<float*>(smem_raw) : fixed;
  if (threadIdx.x < kWarpSize - (kBroken ? 1 : 0)) values[threadIdx.x] = 1.f;
  __syncthreads();
  const float sum = warp_sum(values[threadIdx.x]);
  if (threadIdx.x == 0) out[0] = sum;
}

template <bool kDynamic>
void uninitialised_shared(bool broken) {
  std::vector<float> out(1);
  with_bug(broken, [&](auto bug) {
    launch(warp_total_kernel<bug.value, kDynamic>, 1, kWarpSize,
           kDynamic ? kWarpSize * sizeof(float) : 0, nullptr, out.data());
  });
  expect_equal(out, {32.f});
}

template <bool kDynamic>
__global__ void shared_store_kernel(float* out, int index) {
  extern __shared__ __align__(16) unsigned char smem_raw[];
  __shared__ float fixed[kWarpSize];
  float* dynamic = reinterpret_cast<float*>(smem_raw);
  if constexpr (kDynamic) {
    dynamic[index] = 1.f;
    out[0] = dynamic[index];
  } else {
    fixed[index] = 1.f;
    out[0] = fixed[index];
  }
}

template <bool kDynamic>
void shared_overrun(bool broken) {
  std::vector<float> out(1);
  launch(shared_store_kernel<kDynamic>, 1, 1, kDynamic ? kWarpSize * sizeof(float) : 0, nullptr,
         out.data(), broken ? kWarpSize : kWarpSize - 1);
  expect_equal(out, {1.f});
}

__global__ void copy_pack_kernel(float* out, const float* in) {
  store_pack(out + threadIdx.x * 4, load_pack(in + threadIdx.x * 4));
}

void misaligned_load(bool broken) {
  alignas(16) float in[12] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  alignas(16) float out[8];
  const int offset = broken ? 1 : 4;
  launch(copy_pack_kernel, 1, 2, 0, nullptr, out, in + offset);
  expect_equal({out, out + 8}, {in + offset, in + offset + 8});
}

// `length` is a lie when broken: one element behind the allocation is written.
__global__ void fill_kernel(float* out, int length) {
  if (static_cast<int>(threadIdx.x) < length) out[threadIdx.x] = 1.f;
}

void out_of_bounds_write(bool broken) {
  std::vector<float> out(33);
  launch(fill_kernel, 1, 64, 0, nullptr, out.data(), broken ? 34 : 33);
  expect_equal(out, std::vector<float>(33, 1.f));
}

// ---- launches and blocks
// -------------------------------------------------------------------------------------

__global__ void nothing_kernel() {}

void too_many_threads(bool broken) { launch(nothing_kernel, 1, broken ? 1025 : 1024, 0, nullptr); }

void too_much_shared_memory(bool broken) {
  launch(nothing_kernel, 1, 1, (broken ? 228 : 227) * 1024, nullptr);
}

// Each block adds its number to what the block before it left, or to nothing.
template <bool kBroken>
__global__ void running_sum_kernel(float* out) {
  float sum = blockIdx.x;
  if (kBroken && blockIdx.x > 0) sum += out[blockIdx.x - 1];
  if (!kBroken) {
    for (int i = 0; i < static_cast<int>(blockIdx.x); ++i) sum += i;
  }
  out[blockIdx.x] = sum;
}

void dependence_between_blocks(bool broken) {
  std::vector<float> out(8);
  with_bug(broken,
           [&](auto bug) { launch(running_sum_kernel<bug.value>, 8, 1, 0, nullptr, out.data()); });
  expect_equal(out, {0, 1, 3, 6, 10, 15, 21, 28});
}

}  // namespace

std::vector<PlantedBug> kernel_bugs() {
  return {
      {"missing_barrier_before_read", missing_barrier_before_read},
      {"missing_barrier_before_reuse", missing_barrier_before_reuse},
      {"missing_syncwarp", missing_syncwarp},
      {"divergent_barrier", divergent_barrier},
      {"divergent_shuffle", divergent_shuffle},
      {"wrong_mask", wrong_mask},
      {"shuffle_from_outside_the_mask", shuffle_from_outside_the_mask},
      {"uninitialised_dynamic_shared", uninitialised_shared<true>},
      {"uninitialised_static_shared", uninitialised_shared<false>},
      {"dynamic_shared_overrun", shared_overrun<true>},
      {"static_shared_overrun", shared_overrun<false>},
      {"misaligned_load", misaligned_load},
      {"out_of_bounds_write", out_of_bounds_write},
      {"too_many_threads", too_many_threads},
      {"too_much_shared_memory", too_much_shared_memory},
      {"dependence_between_blocks", dependence_between_blocks},
  };
}

}  // namespace he::cuda
