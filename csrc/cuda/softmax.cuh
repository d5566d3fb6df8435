// Softmax over keys that come a few at a time (arXiv 2205.14135), in powers of two, and the merging
// of such softmaxes over disjoint keys.
#pragma once

#include "cuda/ptx.cuh"

namespace he::cuda {

// The zero that scores are measured from; no score at all leaves it finite, so that nothing becomes
// inf - inf. A NaN score is never the largest: it goes through its weight into the total.
__device__ __forceinline__ float softmax_base(float most) { return most == -INFINITY ? 0.f : most; }

struct OnlineSoftmax {
  float most = -INFINITY;  // largest score so far
  float total = 0.f;       // of the weights 2^(score - base)

  // Takes in the largest of the next scores. Returns what the total and everything else that was
  // summed with older weights must be multiplied by.
  __device__ __forceinline__ float raise(float score) {
    const float before = most;
    most = fmaxf(most, score);
    const float decay = exp2_approx(before - softmax_base(most));
    total *= decay;
    return decay;
  }
};

// (most, total) of one part, as it is stored, gives the part's weight among others.
__device__ __forceinline__ float part_weight(float2 part, float base) {
  return part.y == 0.f ? 0.f : exp2_approx(part.x - base);
}

__device__ __forceinline__ float inverse_or_zero(float total) {
  return total == 0.f ? 0.f : 1.f / total;
}

}  // namespace he::cuda
