// Radix selection over the weights of a row: the threshold of top-k and of top-p, without a sort.
#pragma once

#include "cuda/sampling_row.cuh"

namespace he::cuda {

// The sum of the values up to and including this thread's.
__device__ inline uint64_t block_scan(uint64_t value) {
  __shared__ uint64_t totals[kSamplingWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const uint64_t before = __shfl_up_sync(kFullMask, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == kWarpSize - 1) totals[warp] = value;
  __syncthreads();
  value += warp_reduce(lane < warp ? totals[lane] : uint64_t{0}, Sum{});
  __syncthreads();  // the next scan writes totals again
  return value;
}

// A histogram of 64-bit counts. Shared memory has no 64-bit atomic addition, so the halves are
// added apart; whoever overflows the lower one carries.
struct RadixBins {
  static constexpr int kBits = 11, kCount = 1 << kBits;
  uint32_t low[kCount], high[kCount];
  uint64_t above;  // what lies over the chosen bin
  uint32_t chosen;

  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kCount; bin += kSamplingThreads) low[bin] = high[bin] = 0;
    __syncthreads();
  }

  __device__ void add(uint32_t bin, uint64_t value) {
    const uint32_t part = static_cast<uint32_t>(value);
    const uint32_t carry = atomicAdd(&low[bin], part) > ~part;
    const uint32_t upper = static_cast<uint32_t>(value >> 32) + carry;
    if (upper) atomicAdd(&high[bin], upper);
  }

  __device__ uint64_t count(uint32_t bin) const { return uint64_t{high[bin]} << 32 | low[bin]; }

  // Sets `chosen` to the bin in which the counts from the highest bin down, added to `above`, reach
  // `target`. The bins must hold that much.
  __device__ void choose(uint64_t target) {
    static_assert(kCount == 2 * kSamplingThreads, "two bins to a thread");
    __syncthreads();
    const uint32_t bin = kCount - 1 - 2 * threadIdx.x;
    const uint64_t upper = count(bin), lower = count(bin - 1), before = above;
    const uint64_t end = before + block_scan(upper + lower), begin = end - lower - upper;
    if (begin < target && target <= end) {
      const bool in_upper = begin + upper >= target;
      chosen = in_upper ? bin : bin - 1;
      above = in_upper ? begin : begin + upper;
    }
    __syncthreads();
  }
};

// The largest threshold such that the weights at or over it, each counted as `measure` has it,
// reach `target`, which is at least 1 and at most what all of them make.
template <typename T, typename Measure>
__device__ float select_threshold(const TokenWeights<T>& weights, RadixBins& bins, uint64_t target,
                                  const Measure& measure) {
  uint32_t prefix = 0;
  if (threadIdx.x == 0) bins.above = 0;
  for (int top = 31; top > 0;) {  // bits `top` and up are known: 31, 20, 9
    const int shift = max(top - RadixBins::kBits, 0);
    bins.clear();
    weights.row.for_each([&](float logit, int64_t) {
      const float weight = weights.of(logit);
      const uint32_t bits = __float_as_uint(weight);
      if (bits >> top != prefix >> top) return;
      const uint64_t value = measure(weight);
      if (value > 0) bins.add(bits >> shift & ((1u << (top - shift)) - 1), value);
    });
    bins.choose(target);
    prefix |= bins.chosen << shift;
    top = shift;
  }
  return __uint_as_float(prefix);
}

}  // namespace he::cuda
