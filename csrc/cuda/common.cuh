// What every kernel file starts from: element types, 16-byte packs, checked launches.
//
// Kernel files are compiled by nvcc, and by g++ for the emulator of tests/cuda_emulator, which runs
// them on the CPU. Both need launches to go through `launch`, inline PTX to stay in ptx.cuh, and
// dynamic shared memory to be `extern __shared__ __align__(16) unsigned char smem_raw[];`.
#pragma once

#ifdef HE_CUDA_EMULATOR
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

namespace he::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    static_assert(std::is_same_v<T, __half>, "elements are float, __nv_bfloat16 or __half");
    return __float2half_rn(value);
  }
}

// Calls body with a value of the element type that `dtype` names.
template <typename Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    case DType::kFloat16:
      return body(__half{});
  }
}

// What one thread moves with one 128-bit instruction.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];

  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(
    const T* source) {  // [Pack<T>::kSize], 16-byte aligned
  // Through uint4, because a struct copy may be split into narrower loads.
  const uint4 bits = *reinterpret_cast<const uint4*>(source);
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof(bits));
  return pack;
}

template <typename T>
__device__ __forceinline__ void store_pack(T* destination,  // as load_pack
                                           const Pack<T>& pack) {
  uint4 bits;
  memcpy(&bits, &pack, sizeof(bits));
  *reinterpret_cast<uint4*>(destination) = bits;
}

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer dividend, Integer divisor) {
  return (dividend + divisor - 1) / divisor;
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// `kernel<<<grid, block, shared_bytes, stream>>>(args...)`, as a call that throws on failure.
template <typename... Parameters, typename... Args>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Args... args) {
  constexpr size_t kGrantedSharedBytes = 48 * 1024;  // a kernel must ask before it may use more
  if (shared_bytes > kGrantedSharedBytes) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes)),
               "cannot grant a kernel its dynamic shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(args)...),
             "cannot launch a kernel");
}

}  // namespace he::cuda
