// The variables that every kernel finds itself in. Plain globals: one thread runs at a time, and
// thread-local ones would be taken for shared memory.
#pragma once

#include <vector_types.h>

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;
