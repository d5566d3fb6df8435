// Reductions over a warp and over a block; every thread gets the result.
#pragma once

#include "cuda/common.cuh"

namespace he::cuda {

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return max(a, b);
  }
};

// All 32 lanes must call it. T is a type that the shuffles take: int, float, double, ...
template <typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kFullMask, value, distance));
  }
  return value;
}

// All threads of a one-dimensional block of whole warps must call it. `identity` leaves any value
// unchanged under op.
template <typename T, typename Op>
__device__ __forceinline__ T block_reduce(T value, T identity, Op op) {
  __shared__ T partials[kWarpSize];  // one of each warp; a block has at most 32
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  value = warp_reduce(value, op);
  if (lane == 0) partials[warp] = value;
  __syncthreads();
  const int warps = blockDim.x / kWarpSize;
  value = lane < warps ? partials[lane] : identity;
  value = warp_reduce(value, op);
  __syncthreads();  // the next reduction writes partials again
  return value;
}

__device__ __forceinline__ float warp_sum(float value) { return warp_reduce(value, Sum{}); }
__device__ __forceinline__ float warp_max(float value) { return warp_reduce(value, Max{}); }

__device__ __forceinline__ float block_sum(float value) { return block_reduce(value, 0.f, Sum{}); }
__device__ __forceinline__ float block_max(float value) {
  return block_reduce(value, -INFINITY, Max{});
}

}  // namespace he::cuda
