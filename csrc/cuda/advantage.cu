// Generalised advantage estimation, a warp to a row: the recurrence A_t = delta_t + gamma lam A_t+1
// is a composition of linear maps, so 32 tokens are scanned at a time, from the last one back.
// Whitening: one block adds up the moments, in an order that is always the same, and a grid applies
// them. Sums are fp64, as on the CPU. The arrays are read once and written once; they are small.
#include <algorithm>

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace he::cuda {
namespace {

constexpr int kThreads = 256, kMomentThreads = 1024, kMaxBlocks = 1024;

// y = factor * x + term
struct Linear {
  double factor, term;
};

// The composition of the maps of lanes 0 to this one, each applied to what the one before gives.
__device__ Linear scan_maps(Linear map) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const double factor = __shfl_up_sync(kFullMask, map.factor, distance);
    const double term = __shfl_up_sync(kFullMask, map.term, distance);
    if (lane >= distance) map = {map.factor * factor, map.factor * term + map.term};
  }
  return map;
}

// The value of the highest lane of `lanes`, or `otherwise` if there is none.
__device__ double value_of_last(unsigned lanes, double value, double otherwise) {
  const double found = __shfl_sync(kFullMask, value, lanes ? kWarpSize - 1 - __clz(lanes) : 0);
  return lanes ? found : otherwise;
}

__global__ void __launch_bounds__(kThreads) gae_kernel(const Gae a) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= a.rows) return;
  double next_value = 0., next_advantage = 0.;
  for (int64_t last = a.length - 1; last >= 0; last -= kWarpSize) {  // lane 0 has the last token
    const int64_t i = row * a.length + last - lane;
    const bool exists = lane <= last, inside = exists && a.mask[i];
    const double value = inside ? a.values[i] : 0., reward = inside ? a.rewards[i] : 0.;
    const unsigned members = __ballot_sync(kFullMask, inside);
    const double later = value_of_last(members & ((1u << lane) - 1), value, next_value);
    const double delta = reward + a.gamma * later - value;
    const Linear map = scan_maps(inside ? Linear{a.gamma * a.lam, delta} : Linear{1., 0.});
    const double advantage = map.factor * next_advantage + map.term;
    if (exists) {
      a.advantages[i] = inside ? static_cast<float>(advantage) : 0.f;
      a.returns[i] = inside ? static_cast<float>(advantage + value) : 0.f;
    }
    next_advantage = __shfl_sync(kFullMask, advantage, kWarpSize - 1);
    next_value = value_of_last(members, value, next_value);
  }
}

__global__ void __launch_bounds__(kMomentThreads)
    masked_moments_kernel(double* __restrict__ moments,      // [3]
                          const float* __restrict__ x,       // [count]
                          const uint8_t* __restrict__ mask,  // [count]
                          int64_t count) {
  double members = 0., total = 0., squares = 0.;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kMomentThreads) {
    const double value = mask[i] ? x[i] : 0.f;
    members += mask[i] != 0;
    total += value;
    squares += value * value;
  }
  members = block_reduce(members, 0., Sum{});
  total = block_reduce(total, 0., Sum{});
  squares = block_reduce(squares, 0., Sum{});
  if (threadIdx.x == 0) {
    moments[0] = members;
    moments[1] = total;
    moments[2] = squares;
  }
}

__global__ void __launch_bounds__(kThreads)
    masked_whiten_kernel(float* __restrict__ out,             // [count]
                         const float* __restrict__ x,         // [count]
                         const uint8_t* __restrict__ mask,    // [count]
                         const double* __restrict__ moments,  // [3]
                         int64_t count, bool shift_mean, double eps) {
  const double members = moments[0], mean = members > 0. ? moments[1] / members : 0.;
  const double spread = fmax(moments[2] - members * mean * mean, 0.);
  const double variance = members > 1. ? spread / (members - 1.) : 0.;
  const double scale = 1. / sqrt(variance + eps), back = shift_mean ? 0. : mean;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += step) {
    out[i] = mask[i] ? static_cast<float>((x[i] - mean) * scale + back) : 0.f;
  }
}

}  // namespace

void gae(const Gae& args, Stream stream) {
  const int64_t blocks = ceil_div<int64_t>(args.rows, kThreads / kWarpSize);
  launch(gae_kernel, grid_of(blocks), kThreads, 0, stream, args);
}

void masked_moments(double* moments, const float* x, const uint8_t* mask, int64_t count,
                    Stream stream) {
  launch(masked_moments_kernel, 1, kMomentThreads, 0, stream, moments, x, mask, count);
}

void masked_whiten(float* out, const float* x, const uint8_t* mask, const double* moments,
                   int64_t count, bool shift_mean, double eps, Stream stream) {
  const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(count, kThreads), kMaxBlocks);
  launch(masked_whiten_kernel, grid_of(blocks), kThreads, 0, stream, out, x, mask, moments, count,
         shift_mean, eps);
}

}  // namespace he::cuda
