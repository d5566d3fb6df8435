// A few neighbouring elements at once, less than a whole pack of 16 bytes.
#pragma once

#include "cuda/common.cuh"

namespace he::cuda {

// An unsigned type of kBytes.
template <int kBytes>
using Word =
    std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>;

// Two elements as one register of mma.sync.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

// Rounds and stores elements [0, kCount), of which those from `count` on do not exist. `aligned`:
// all exist or none, and the address is a multiple of their size.
template <int kCount, typename T>
__device__ __forceinline__ void store_elements(T* destination, const float (&values)[kCount],
                                               int count, bool aligned) {
  T elements[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) elements[i] = from_float<T>(values[i]);
  if (aligned) {
    Word<kCount * sizeof(T)> word;
    memcpy(&word, elements, sizeof(word));
    if (count > 0) *reinterpret_cast<decltype(word)*>(destination) = word;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) destination[i] = elements[i];
    }
  }
}

}  // namespace he::cuda
