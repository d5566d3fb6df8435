// The threshold of a top-k or top-p filter, without a sort: a search over the bits of the weights,
// whose order is that of the weights themselves because none is negative. A pass over the weights
// measures what lies above three thresholds and leaves a quarter of the interval; every few passes
// the weights inside of it are copied out, and further passes visit only these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/vec.h"

namespace he::cpu {

enum class Measure { kCount, kMass };

// What lies at or above each threshold.
template <Measure measure, int kThresholds>
void measure_above(double (&totals)[kThresholds], const float (&thresholds)[kThresholds],
                   const float* weights, int64_t count) {
  constexpr int64_t kChunk = 1024;  // longer sums would round too much
  for (double& total : totals) total = 0.;
  for (int64_t start = 0; start < count; start += kChunk) {
    Vec sums[kThresholds] = {};
    const auto visit = [&](Vec w) {
      for (int j = 0; j < kThresholds; ++j) {
        const Vec value = measure == Measure::kMass ? w : broadcast(1.f);
        sums[j] += select(w >= thresholds[j], value, Vec{});
      }
    };
    for_each_vec(
        std::min(kChunk, count - start), [&](int64_t i) { visit(load(weights + start + i)); },
        [&](int64_t i, int64_t rest) { visit(load_partial(weights + start + i, rest, -1.f)); });
    for (int j = 0; j < kThresholds; ++j) totals[j] += sum(sums[j]);
  }
}

inline double mass_above(const float* weights, int64_t count, float threshold) {
  double totals[1];
  measure_above<Measure::kMass, 1>(totals, {threshold}, weights, count);
  return totals[0];
}

// Copies the weights in [low, high) to `out`, which has room for kLanes more; returns how many.
inline int64_t copy_between(float* out, const float* weights, int64_t count, float low,
                            float high) {
  int64_t found = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= count; i += kLanes) {
    const __m512 w = _mm512_loadu_ps(weights + i);
    const __mmask16 inside = _mm512_cmp_ps_mask(w, _mm512_set1_ps(low), _CMP_GE_OQ) &
                             _mm512_cmp_ps_mask(w, _mm512_set1_ps(high), _CMP_LT_OQ);
    _mm512_storeu_ps(out + found, _mm512_maskz_compress_ps(inside, w));
    found += __builtin_popcount(inside);
  }
#endif
  for (; i < count; ++i) {
    const float weight = weights[i];
    out[found] = weight;
    found += weight >= low && weight < high;
  }
  return found;
}

// The largest weight t >= `low` such that the weights >= t, counted or added up, reach `target`;
// `low` if they never do. Weights are in [0, 1].
template <Measure measure>
float find_threshold(const float* weights, int64_t count, float low, double target,
                     std::vector<float>& scratch) {
  constexpr int kPassesBetweenCopies = 4;
  uint32_t lower = bit_cast<uint32_t>(low), upper = bit_cast<uint32_t>(1.f) + 1;
  double left_out = 0.;  // of the weights that are visited no more
  double beyond = 0.;    // of the visited ones at or above `upper`
  for (int pass = 1; upper - lower > 1; ++pass) {
    const uint32_t step = std::max<uint32_t>(1, (upper - lower) / 4);
    uint32_t bits[3];
    float thresholds[3];
    for (int j = 0; j < 3; ++j) {
      bits[j] = std::min(lower + (j + 1) * step, upper - 1);
      thresholds[j] = bit_cast<float>(bits[j]);
    }
    double totals[3];
    measure_above<measure>(totals, thresholds, weights, count);
    int reached = 2;
    while (reached >= 0 && left_out + totals[reached] < target) {
      upper = bits[reached];
      beyond = totals[reached--];
    }
    if (reached >= 0) lower = bits[reached];
    if (pass % kPassesBetweenCopies) continue;
    scratch.resize(std::max<size_t>(scratch.size(), count + kLanes));
    count = copy_between(scratch.data(), weights, count, bit_cast<float>(lower),
                         bit_cast<float>(upper));
    weights = scratch.data();
    left_out += beyond;
    beyond = 0.;
  }
  return bit_cast<float>(lower);
}

}  // namespace he::cpu
