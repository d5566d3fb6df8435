// Twins of the device functions that NVIDIA's headers give no host code for: approximate and
// bit-level arithmetic, and part of half and bfloat16. The approximations are exact here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// ---- float --------------------------------------------------------------------------------------

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.f), 1.f); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline void __sincosf(float x, float* sine, float* cosine) {
  *sine = std::sin(x);
  *cosine = std::cos(x);
}
inline float __tanhf(float x) { return std::tanh(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1. / std::sqrt(double{x})); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

// CUDA's min and max take any two arithmetic types and, like fmin and fmax, ignore a NaN.
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A>>,
          typename = std::enable_if_t<std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(a) < T(b) ? T(a) : T(b);
}

template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A>>,
          typename = std::enable_if_t<std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) > T(b) ? T(a) : T(b);
}

namespace he::cuda {
inline float exp2_approx(float x) { return std::exp2(x); }  // of csrc/cuda/ptx.cuh
}  // namespace he::cuda

// ---- bits ---------------------------------------------------------------------------------------

namespace he::emulator {

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace he::emulator

inline float __int_as_float(int x) { return he::emulator::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return he::emulator::bits_as<float>(x); }
inline int __float_as_int(float x) { return he::emulator::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return he::emulator::bits_as<unsigned>(x); }
inline double __longlong_as_double(long long x) { return he::emulator::bits_as<double>(x); }
inline long long __double_as_longlong(double x) { return he::emulator::bits_as<long long>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return uint64_t{x} * y >> 32; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned __int128>(x) * y >> 64;
}

// ---- half and bfloat16 --------------------------------------------------------------------------

// One function of float, for each 16-bit type and for its pair.
#define HE_EMULATED_UNARY(name1, name2, function)                                      \
  inline __half name1(__half x) { return __float2half_rn(function(__half2float(x))); } \
  inline __nv_bfloat16 name1(__nv_bfloat16 x) {                                        \
    return __float2bfloat16_rn(function(__bfloat162float(x)));                         \
  }                                                                                    \
  inline __half2 name2(__half2 x) { return {name1(x.x), name1(x.y)}; }                 \
  inline __nv_bfloat162 name2(__nv_bfloat162 x) { return {name1(x.x), name1(x.y)}; }
HE_EMULATED_UNARY(hexp, h2exp, std::exp)
HE_EMULATED_UNARY(hexp2, h2exp2, std::exp2)
HE_EMULATED_UNARY(hlog, h2log, std::log)
HE_EMULATED_UNARY(hlog2, h2log2, std::log2)
HE_EMULATED_UNARY(hsqrt, h2sqrt, std::sqrt)
HE_EMULATED_UNARY(hrsqrt, h2rsqrt, rsqrtf)
HE_EMULATED_UNARY(hrcp, h2rcp, __frcp_rn)
HE_EMULATED_UNARY(htanh, h2tanh, std::tanh)
#undef HE_EMULATED_UNARY

// Rounded twice, to fp32 and to 16 bits, where the GPU rounds once: rare ties differ.
inline __half __hfma(__half x, __half y, __half z) {
  return __float2half_rn(std::fma(__half2float(x), __half2float(y), __half2float(z)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 x, __nv_bfloat16 y, __nv_bfloat16 z) {
  return __float2bfloat16_rn(
      std::fma(__bfloat162float(x), __bfloat162float(y), __bfloat162float(z)));
}
inline __half2 __hfma2(__half2 x, __half2 y, __half2 z) {
  return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)};
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 x, __nv_bfloat162 y, __nv_bfloat162 z) {
  return {__hfma(x.x, y.x, z.x), __hfma(x.y, y.y, z.y)};
}
