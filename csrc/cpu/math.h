// Transcendental functions on whole vectors, within a few units in the last place of fp32.
#pragma once

#include "cpu/vec.h"

namespace he::cpu {

// v * 2^n for integral n of at most 128.
inline Vec scale_by_power(Vec v, Vec n) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_scalef_ps(bit_cast<__m512>(v), bit_cast<__m512>(n)));
#else
  // Two factors, because 2^128 is no float.
  const VecInt power = __builtin_convertvector(n, VecInt), half = power >> 1;
  return v * bit_cast<Vec>((half + 127) << 23) * bit_cast<Vec>((power - half + 127) << 23);
#endif
}

// e^x for x in [-87.3, 88.73]: x = n ln 2 + r, a degree-6 polynomial in r, then a scaling by 2^n.
inline Vec exp_in_range(Vec x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRoundingShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (x * kLog2E + kRoundingShift) - kRoundingShift;
  const Vec r = x - n * kLn2High - n * kLn2Low;
  Vec p = r * (1.f / 720.f) + (1.f / 120.f);
  p = p * r + (1.f / 24.f);
  p = p * r + (1.f / 6.f);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return scale_by_power(p, n);
}

// 2^x for x in [-126, 128]: x = n + r, a degree-6 polynomial in r, then a scaling by 2^n.
inline Vec exp2_in_range(Vec x) {
  constexpr float kRoundingShift = 12582912.f;
  const Vec n = (x + kRoundingShift) - kRoundingShift, r = x - n;
  Vec p = r * 0.0001540353f + 0.0013333558f;
  p = p * r + 0.0096181291f;
  p = p * r + 0.055504109f;
  p = p * r + 0.24022651f;
  p = p * r + 0.69314718f;
  p = p * r + 1.f;
  return scale_by_power(p, n);
}

// e^x. Below -87.3, where results turn subnormal and slow, it is 0; above 88.7 it is infinite; NaN
// stays NaN.
inline Vec exp(Vec x) {
  const Vec capped = select(x > 88.73f, broadcast(88.73f), x);
  return select(x < -87.3f, Vec{}, exp_in_range(select(x < -87.3f, Vec{}, capped)));
}

inline Vec tanh(Vec x) {
  // Near zero the quotient cancels, so a short odd series takes over.
  const Vec e = exp(2.f * max(min(x, broadcast(10.f)), broadcast(-10.f)));
  const Vec square = x * x;
  const Vec series = x * (1.f - square * (1.f / 3.f - square * (2.f / 15.f)));
  const Vec quotient = (e - 1.f) / (e + 1.f);
  return select(square < 0.0025f, series, x == x ? quotient : x);
}

inline Vec absolute(Vec x) { return bit_cast<Vec>(bit_cast<VecBits>(x) & 0x7fffffffu); }

// x (1 + erf(y)) / 2 with y = x / sqrt(2). Near zero erf(y) = y + y P(y^2); further out
// 1 - erf(|y|) = 2^Q(|y|), from 4 on 0. Minimax coefficients; erf is within 1.4 units in the
// last place.
inline Vec gelu(Vec x) {
  const Vec y = x * 0.70710678f, s = y * y, t = absolute(y);
  Vec p = s * -5.9768965e-4f + 4.990981e-3f;
  p = p * s - 2.6765568e-2f;
  p = p * s + 1.12818025e-1f;
  p = p * s - 3.7612495e-1f;
  p = p * s + 1.2837915e-1f;
  Vec q = t * 0.00027960867f - 0.0043604999f;
  q = q * t + 0.031948086f;
  q = q * t - 0.14969727f;
  q = q * t - 0.91953602f;
  q = q * t - 1.6267293f;
  q = q * t - 0.00032141211f;
  const Vec tail = select(t < 4.f, exp2_in_range(q), Vec{});
  const Vec far = select(x < 0.f, tail, 2.f - tail);
  return 0.5f * x * select(t < 0.93f, 1.f + (p * y + y), far);
}

inline Vec gelu_tanh(Vec x) {
  // sqrt(2 / pi) (x + 0.044715 x^3)
  return 0.5f * x * (1.f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
}

}  // namespace he::cpu
