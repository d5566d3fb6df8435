// Sampling by inversion, without a sort. A row's logits become fp32 weights exp((x - max) / T) in
// scratch; top-k and top-p find their thresholds by a search over the weights' bits
// (cpu/threshold.h); then one pass adds up the kept weights by chunks and the chunk that holds the
// target is searched.
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/threshold.h"
#include "cpu/tile.h"
#include "cpu/vec.h"
#include "philox.h"

namespace he::cpu {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kElementsPerThread = 8192;
constexpr float kMinusInfinity = -__builtin_inff();

// The largest value, or NaN if any is NaN.
float max_or_nan(const float* x, int64_t count) {
  Vec most = broadcast(kMinusInfinity), poison{};
  auto visit = [&](Vec v) {
    most = max(most, v);
    poison = select(v == v, poison, v);
  };
  for_each_vec(
      count, [&](int64_t i) { visit(load(x + i)); },
      [&](int64_t i, int64_t rest) { visit(load_partial(x + i, rest, kMinusInfinity)); });
  return sum(poison) == 0.f ? reduce_max(most) : __builtin_nanf("");
}

// out = exp((x - most) / temperature); returns the sum.
double exponentiate(float* out, const float* x, int64_t count, float most, float temperature) {
  const float inverse = 1.f / temperature;
  double total = 0.;
  for (int64_t start = 0; start < count; start += kChunk) {
    Vec chunk{};
    auto visit = [&](Vec v) {
      const Vec e = exp((v - most) * inverse);
      chunk += e;
      return e;
    };
    for_each_vec(
        std::min(kChunk, count - start),
        [&](int64_t i) { store(out + start + i, visit(load(x + start + i))); },
        [&](int64_t i, int64_t rest) {
          const Vec v = load_partial(x + start + i, rest, kMinusInfinity);
          store_partial(out + start + i, visit(v), rest);
        });
    total += sum(chunk);
  }
  return total;
}

void penalise(float* logits, const uint8_t* seen, int64_t count, float penalty) {
  for (int64_t i = 0; i < count; ++i) {
    if (seen[i]) logits[i] = logits[i] > 0.f ? logits[i] / penalty : logits[i] * penalty;
  }
}

struct Filters {
  int64_t top_k;
  float top_p, min_p;
};

// Weights below the returned threshold are out. The largest weight is 1; `mass` is their sum.
float truncation_threshold(const float* weights, int64_t count, double mass,
                           const Filters& filters, std::vector<float>& scratch) {
  float threshold = 0.f;
  if (filters.top_k > 0 && filters.top_k < count) {
    threshold = find_threshold<Measure::kCount>(weights, count, 0.f,
                                                static_cast<double>(filters.top_k), scratch);
    if (filters.top_p < 1.f) mass = mass_above(weights, count, threshold);
  }
  if (filters.top_p < 1.f) {
    threshold = find_threshold<Measure::kMass>(weights, count, threshold, filters.top_p * mass,
                                               scratch);
  }
  return std::max(threshold, filters.min_p);
}

// Sums of the kept weights by chunk; returns the total.
double chunk_masses(std::vector<double>& masses, const float* weights, int64_t count,
                    float threshold) {
  masses.assign((count + kChunk - 1) / kChunk, 0.);
  double total = 0.;
  for (size_t c = 0; c < masses.size(); ++c) {
    const int64_t start = c * kChunk;
    auto keep = [&](Vec v) { return select(v >= threshold, v, Vec{}); };
    Vec chunk{};
    for_each_vec(
        std::min(kChunk, count - start),
        [&](int64_t i) { chunk += keep(load(weights + start + i)); },
        [&](int64_t i, int64_t rest) { chunk += keep(load_partial(weights + start + i, rest)); });
    masses[c] = sum(chunk);
    total += masses[c];
  }
  return total;
}

// The first kept token at which the running mass exceeds `target`.
int64_t find_token(const std::vector<double>& masses, const float* weights, int64_t count,
                   float threshold, double target) {
  size_t chunk = 0;
  while (chunk + 1 < masses.size() && target >= masses[chunk]) target -= masses[chunk++];
  int64_t last_kept = 0;
  for (int64_t i = chunk * kChunk; i < count; ++i) {
    if (weights[i] < threshold || weights[i] == 0.f) continue;
    last_kept = i;
    target -= weights[i];
    if (target < 0.) break;
  }
  return last_kept;
}

// Scratch of one thread.
struct Row {
  std::vector<float> logits, weights, candidates;
  std::vector<double> masses;
};

// The first place of `most`, which is there.
int64_t find_first(const float* x, int64_t count, float most) {
  int64_t i = 0;
  while (i + kLanes <= count && reduce_max(load(x + i)) != most) i += kLanes;
  while (x[i] != most) ++i;
  return i;
}

// fp32 logits: where they are, or in scratch.
template <typename T>
const float* logits_of_row(const Sample& a, int64_t row, Row& scratch) {
  const T* logits = static_cast<const T*>(a.logits) + row * a.vocab;
  scratch.logits.resize(a.vocab);
  return widened(scratch.logits.data(), logits, a.vocab);
}

// A row that nothing can be drawn from.
void mark_invalid(const Sample& a, int64_t row) {
  a.tokens[row] = -1;
  a.logprobs[row] = a.truncated_logprobs[row] = __builtin_nanf("");
}

void sample_row(const Sample& a, int64_t row, const float* raw, Row& scratch) {
  scratch.weights.resize(a.vocab);
  float* weights = scratch.weights.data();
  const bool greedy = a.temperature[row] == 0.f;
  const float temperature = greedy ? 1.f : a.temperature[row];
  const float full_max = max_or_nan(raw, a.vocab);
  if (!std::isfinite(full_max)) return mark_invalid(a, row);
  const double full_mass = exponentiate(weights, raw, a.vocab, full_max, temperature);
  const float* logits = raw;
  std::vector<float> penalised;
  float most = full_max;
  double mass = full_mass;
  if (a.repetition_penalty && a.repetition_penalty[row] != 1.f) {
    penalised.assign(raw, raw + a.vocab);
    logits = penalised.data();
    penalise(penalised.data(), a.seen + row * a.vocab, a.vocab, a.repetition_penalty[row]);
    most = max_or_nan(logits, a.vocab);
    if (!std::isfinite(most)) return mark_invalid(a, row);
    mass = exponentiate(weights, logits, a.vocab, most, temperature);
  }
  int64_t token;
  double truncated = 0.;
  if (greedy) {
    token = find_first(logits, a.vocab, most);
  } else {
    const Filters filters{a.top_k[row], a.top_p[row], a.min_p[row]};
    const float threshold =
        truncation_threshold(weights, a.vocab, mass, filters, scratch.candidates);
    mass = chunk_masses(scratch.masses, weights, a.vocab, threshold);
    const double target = philox_uniform(a.seeds[row], a.positions[row]) * mass;
    token = find_token(scratch.masses, weights, a.vocab, threshold, target);
    truncated = (logits[token] - most) / temperature - std::log(mass);
  }
  a.tokens[row] = token;
  a.logprobs[row] = static_cast<float>((raw[token] - full_max) / temperature - std::log(full_mass));
  a.truncated_logprobs[row] = static_cast<float>(truncated);
}

}  // namespace

void sample(const Sample& args, Stream) {
  parallel_for(args.rows, kElementsPerThread / args.vocab + 1, [&](int64_t begin, int64_t end) {
    static thread_local Row scratch;
    dispatch(args.dtype, [&](auto t) {
      for (int64_t row = begin; row < end; ++row) {
        sample_row(args, row, logits_of_row<decltype(t)>(args, row, scratch), scratch);
      }
    });
  });
  // An exception may not leave a parallel region, and every member of a team must see it.
  for (int64_t row = 0; row < args.rows; ++row) {
    if (args.tokens[row] >= 0) continue;
    throw std::runtime_error("logits: NaN, or a row whose largest logit is not finite");
  }
}

}  // namespace he::cpu
