// Lets g++ compile a .cu file and run its kernels on the CPU: csrc/cuda/common.cuh includes this
// file in place of cuda_runtime.h when HE_CUDA_EMULATOR is defined.
//
// Types and constants are NVIDIA's own: their headers compile for the host, where they leave out
// only what needs a GPU. The files included at the end supply that part.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

// The qualifiers mean nothing to g++, except `__shared__`. A block's threads all run on one OS
// thread, so a thread-local variable is shared by them; thread_local is also the one keyword that
// makes `__shared__ float x[32];` static and still allows `extern __shared__`.
#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __grid_constant__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local

#include "device_math.h"
#include "intrinsics.h"
#include "launch.h"
