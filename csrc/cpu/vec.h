// One SIMD vector of floats, as wide as the instruction set that the file is compiled for, and the
// conversions from and to the storage types. Arithmetic is the compiler's vector extension.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace he::cpu {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline Vec broadcast(float x) { return x - Vec{}; }
inline Vec select(VecInt mask, Vec yes, Vec no) { return mask ? yes : no; }
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(bit_cast<__m512>(v));
#elif defined(__AVX2__)
  const __m256 wide = bit_cast<__m256>(v);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// Lane i of the result is the sum of v[i]: a transposition with additions on the way, which takes a
// quarter of the steps of kLanes single sums.
inline Vec sum_each(const Vec (&v)[kLanes]) {
#if defined(__AVX512F__)
  __m512 pairs[8], quads[4];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = bit_cast<__m512>(v[2 * i]), b = bit_cast<__m512>(v[2 * i + 1]);
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return bit_cast<Vec>(fold(fold(quads[0], quads[1]), fold(quads[2], quads[3])));
#elif defined(__AVX2__)
  __m256 pairs[4], quads[2];
  for (int i = 0; i < 4; ++i) {
    const __m256 a = bit_cast<__m256>(v[2 * i]), b = bit_cast<__m256>(v[2 * i + 1]);
    pairs[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(pairs[2 * i]), b = _mm256_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)),
                             _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return bit_cast<Vec>(_mm256_add_ps(_mm256_permute2f128_ps(quads[0], quads[1], 0x20),
                                     _mm256_permute2f128_ps(quads[0], quads[1], 0x31)));
#else
  return Vec{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
#endif
}

inline float reduce_max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(bit_cast<__m512>(v));
#else
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
#endif
}

// ---- scalars ------------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent bias and normalises subnormals in one step.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  return bit_cast<float>(sign | bit_cast<uint32_t>(scaled));
}

template <typename T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at the right bit
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

// ---- whole vectors ------------------------------------------------------------------------------

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vec load(const BFloat16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bit_cast<Vec>(__builtin_convertvector(bits, VecBits) << 16);
}

inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return bit_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(BFloat16* p, Vec v) {
  const VecBits bits = bit_cast<VecBits>(v);
  const VecBits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const VecBits safe = v == v ? rounded : VecBits{} + 0x7fc0u;
  const HalfBits half = __builtin_convertvector(safe, HalfBits);
  std::memcpy(p, &half, sizeof(half));
}

inline void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
#elif defined(__AVX2__)
  const __m128i half = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

// The first `count` < kLanes elements; the other lanes read as `fill`.
template <typename T>
inline Vec load_partial(const T* p, int64_t count, float fill = 0.f) {
  Vec v = broadcast(fill);
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(p[i]);
  return v;
}

template <typename T>
inline void store_partial(T* p, Vec v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = from_float<T>(v[i]);
}

// Calls full(i) for each whole vector of [0, count), then partial(i, rest) for what is left.
template <typename Full, typename Partial>
inline void for_each_vec(int64_t count, const Full& full, const Partial& partial) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) full(i);
  if (i < count) partial(i, count - i);
}

// out[i] = f(in[i]...), for [0, count), computed in fp32.
template <typename Out, typename Function, typename... In>
inline void map_vecs(Out* out, int64_t count, const Function& f, const In*... in) {
  for_each_vec(
      count, [&](int64_t i) { store(out + i, f(load(in + i)...)); },
      [&](int64_t i, int64_t rest) {
        store_partial(out + i, f(load_partial(in + i, rest)...), rest);
      });
}

template <typename To, typename From>
inline void convert(To* to, const From* from, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    map_vecs(to, count, [](Vec v) { return v; }, from);
  }
}

// Adds up term(i) over the whole vectors of [0, count), in several chains: shorter chains of
// additions are faster and round less.
template <typename Term>
inline Vec sum_vecs(int64_t count, const Term& term) {
  constexpr int kChains = 8;
  Vec totals[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= count; i += kChains * kLanes) {
    for (int j = 0; j < kChains; ++j) totals[j] += term(i + j * kLanes);
  }
  for (int j = 0; i + kLanes <= count; ++j, i += kLanes) totals[j] += term(i);
  return ((totals[0] + totals[1]) + (totals[2] + totals[3])) +
         ((totals[4] + totals[5]) + (totals[6] + totals[7]));
}

// Calls body with a value of the storage type that `dtype` names.
template <typename Body>
inline void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(BFloat16{});
    case DType::kFloat16:
      return body(Float16{});
  }
}

}  // namespace he::cpu
