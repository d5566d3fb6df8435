// Transcendental functions on whole vectors, within a few units in the last place of fp32.
#pragma once

#include "cpu/vec.h"

namespace he::cpu {

// e^x: x = n ln 2 + r, a degree-6 polynomial in r, then an exponent shift. Below -87.3 it is 0, above
// 88.7 it saturates near the largest float; NaN stays NaN.
inline Vec exp(Vec x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRoundingShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec clamped = select(x > 88.3f, broadcast(88.3f), select(x < -87.3f, broadcast(-87.3f), x));
  const Vec n = (clamped * kLog2E + kRoundingShift) - kRoundingShift;
  const Vec r = clamped - n * kLn2High - n * kLn2Low;
  Vec p = r * (1.f / 720.f) + (1.f / 120.f);
  p = p * r + (1.f / 24.f);
  p = p * r + (1.f / 6.f);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  return select(x < -87.3f, Vec{}, p * bit_cast<Vec>(exponent));
}

inline Vec tanh(Vec x) {
  // Near zero the quotient cancels, so a short odd series takes over.
  const Vec e = exp(2.f * max(min(x, broadcast(10.f)), broadcast(-10.f)));
  const Vec square = x * x;
  const Vec series = x * (1.f - square * (1.f / 3.f - square * (2.f / 15.f)));
  const Vec quotient = (e - 1.f) / (e + 1.f);
  return select(square < 0.0025f, series, x == x ? quotient : x);
}

// erf as an odd rational function on [-4, 4], beyond which it rounds to +-1.
inline Vec erf(Vec x) {
  const Vec v = max(min(x, broadcast(4.f)), broadcast(-4.f));
  const Vec s = v * v;
  Vec p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  Vec q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x == x ? v * p / q : x;
}

inline Vec gelu(Vec x) { return 0.5f * x * (1.f + erf(x * 0.70710678f)); }

inline Vec gelu_tanh(Vec x) {
  // sqrt(2 / pi) (x + 0.044715 x^3)
  return 0.5f * x * (1.f + tanh(0.79788456f * (x + 0.044715f * x * x * x)));
}

}  // namespace he::cpu
