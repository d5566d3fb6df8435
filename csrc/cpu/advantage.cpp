// Generalised advantage estimation, a backward scan a row, and whitening over a mask. Sums are
// fp64: the arrays are small, and a rank's moments are added to those of others.
#include <cmath>

#include "cpu/parallel.h"
#include "kernels.h"

namespace he::cpu {
namespace {

constexpr int64_t kElementsPerThread = 16384;

void scan_row(const Gae& a, int64_t row) {
  const int64_t start = row * a.length;
  double next_value = 0., next_advantage = 0.;
  for (int64_t i = start + a.length - 1; i >= start; --i) {
    if (!a.mask[i]) {
      a.advantages[i] = a.returns[i] = 0.f;
      continue;
    }
    const double value = a.values[i];
    const double delta = a.rewards[i] + a.gamma * next_value - value;
    next_advantage = delta + a.gamma * a.lam * next_advantage;
    next_value = value;
    a.advantages[i] = static_cast<float>(next_advantage);
    a.returns[i] = static_cast<float>(next_advantage + value);
  }
}

}  // namespace

void gae(const Gae& args, Stream) {
  const int64_t grain = kElementsPerThread / (args.length + 1) + 1;
  parallel_for(args.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) scan_row(args, row);
  });
}

void masked_moments(double* moments, const float* x, const uint8_t* mask, int64_t count, Stream) {
  double members = 0., total = 0., squares = 0.;
  for (int64_t i = 0; i < count; ++i) {
    if (!mask[i]) continue;
    members += 1.;
    total += x[i];
    squares += static_cast<double>(x[i]) * x[i];
  }
  moments[0] = members;
  moments[1] = total;
  moments[2] = squares;
}

void masked_whiten(float* out, const float* x, const uint8_t* mask, const double* moments,
                   int64_t count, bool shift_mean, double eps, Stream) {
  const double members = moments[0], mean = members > 0. ? moments[1] / members : 0.;
  const double spread = moments[2] - members * mean * mean;
  const double variance = members > 1. ? (spread > 0. ? spread : 0.) / (members - 1.) : 0.;
  const double scale = 1. / std::sqrt(variance + eps), back = shift_mean ? 0. : mean;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = mask[i] ? static_cast<float>((x[i] - mean) * scale + back) : 0.f;
  }
}

}  // namespace he::cpu
