// A pack of elements to and from fp32 registers: one 128-bit access where rows are aligned, element
// by element where they are not.
#pragma once

#include <initializer_list>

#include "cuda/common.cuh"

namespace he::cuda {

// Whether every pack of rows of `length` elements is 16-byte aligned. A null pointer is no operand.
template <typename T>
bool packs_aligned(int64_t length, std::initializer_list<const void*> operands) {
  for (const void* operand : operands) {
    if (reinterpret_cast<uintptr_t>(operand) % sizeof(uint4) != 0) return false;
  }
  return length % Pack<T>::kSize == 0;
}

// The elements before `count`; the others read as `fill`.
template <typename T>
__device__ __forceinline__ void load_floats(float* values,    // [Pack<T>::kSize], written
                                            const T* source,  // [count]
                                            int64_t count, bool aligned, float fill = 0.f) {
  if (aligned && count >= Pack<T>::kSize) {
    const Pack<T> pack = load_pack(source);
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) values[j] = to_float(pack[j]);
  } else {
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) values[j] = j < count ? to_float(source[j]) : fill;
  }
}

template <typename T>
__device__ __forceinline__ void store_floats(T* destination,       // [count], written
                                             const float* values,  // [Pack<T>::kSize]
                                             int64_t count, bool aligned) {
  if (aligned && count >= Pack<T>::kSize) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) pack[j] = from_float<T>(values[j]);
    uint4 bits;
    memcpy(&bits, &pack, sizeof(bits));
    // By an intrinsic: nvcc splits a plain store where it cannot derive the alignment by itself.
    __stwb(reinterpret_cast<uint4*>(destination), bits);
  } else {
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      if (j < count) destination[j] = from_float<T>(values[j]);
    }
  }
}

// The x dimension of a grid; rows and tokens come from outside, so it is checked.
inline dim3 grid_of(int64_t blocks) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  if (blocks > kMaxBlocks) {
    throw std::runtime_error("cannot launch " + std::to_string(blocks) + " blocks: the most are " +
                             std::to_string(kMaxBlocks));
  }
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace he::cuda
