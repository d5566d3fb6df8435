// Sampling by inversion, without a sort. A row's logits become fp32 weights exp((x - max) / T) in
// scratch; top-k and top-p find their thresholds by radix selection on the weights' bits (three
// passes of 2048, 2048 and 1024 bins, positive floats order as integers do); then one pass adds up
// the kept weights by chunks and the chunk that holds the target is searched.
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "philox.h"

namespace he::cpu {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kElementsPerThread = 8192;
constexpr float kMinusInfinity = -__builtin_inff();

template <typename T>
void widen(float* wide, const T* x, int64_t count) {
  for_each_vec(
      count, [&](int64_t i) { store(wide + i, load(x + i)); },
      [&](int64_t i, int64_t rest) { store_partial(wide + i, load_partial(x + i, rest), rest); });
}

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

float checked_max(const float* x, int64_t count) {
  const float most = max_or_nan(x, count);
  if (!std::isfinite(most)) {
    throw std::runtime_error("logits: NaN, or a row whose largest logit is not finite");
  }
  return most;
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

// The largest threshold t such that the weights >= t, each counted as `measure` has it, reach
// `target` and are not none. Weights below `floor` do not take part.
template <typename Measure>
float select_threshold(const float* weights, int64_t count, float floor, double target,
                       const Measure& measure) {
  constexpr int kShifts[] = {20, 9, 0};
  constexpr uint32_t kBins[] = {2048, 2048, 512};
  uint32_t prefix = 0;
  double above = 0.;  // what lies over the bins being refined
  for (int level = 0; level < 3; ++level) {
    double bins[2048] = {};
    const int shift = kShifts[level];
    const int parent = level == 0 ? 31 : kShifts[level - 1];
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = bit_cast<uint32_t>(weights[i]);
      if (weights[i] < floor || bits >> parent != prefix >> parent) continue;
      bins[(bits >> shift) & (kBins[level] - 1)] += measure(weights[i]);
    }
    int64_t bin = kBins[level] - 1;
    while (bin > 0 && (bins[bin] == 0. || above + bins[bin] < target)) above += bins[bin--];
    prefix |= static_cast<uint32_t>(bin) << shift;
  }
  return bit_cast<float>(prefix);
}

struct Filters {
  int64_t top_k;
  float top_p, min_p;
};

// Weights below the returned threshold are out. The largest weight is 1.
float truncation_threshold(const float* weights, int64_t count, const Filters& filters) {
  float threshold = 0.f;
  if (filters.top_k > 0 && filters.top_k < count) {
    threshold = select_threshold(weights, count, 0.f, static_cast<double>(filters.top_k),
                                 [](float) { return 1.; });
  }
  if (filters.top_p < 1.f) {
    double mass = 0.;
    for (int64_t i = 0; i < count; ++i) mass += weights[i] >= threshold ? weights[i] : 0.f;
    threshold = select_threshold(weights, count, threshold, filters.top_p * mass,
                                 [](float weight) { return static_cast<double>(weight); });
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
  std::vector<float> logits, weights;
  std::vector<double> masses;
};

int64_t argmax(const float* x, int64_t count, float most) {
  int64_t i = 0;
  while (i + 1 < count && x[i] != most) ++i;
  return i;
}

void sample_row(const Sample& a, int64_t row, Row& scratch) {
  float* logits = scratch.logits.data();
  float* weights = scratch.weights.data();
  dispatch(a.dtype, [&](auto t) {
    widen(logits, static_cast<const decltype(t)*>(a.logits) + row * a.vocab, a.vocab);
  });
  const bool greedy = a.temperature[row] == 0.f;
  const float temperature = greedy ? 1.f : a.temperature[row];
  const float full_max = checked_max(logits, a.vocab);
  double full_mass = exponentiate(weights, logits, a.vocab, full_max, temperature);
  const float* raw = nullptr;  // the logits before the penalty, when they differ
  std::vector<float> copy;
  float most = full_max;
  double mass = full_mass;
  if (a.repetition_penalty && a.repetition_penalty[row] != 1.f) {
    copy = scratch.logits;
    raw = copy.data();
    penalise(logits, a.seen + row * a.vocab, a.vocab, a.repetition_penalty[row]);
    most = checked_max(logits, a.vocab);
    mass = exponentiate(weights, logits, a.vocab, most, temperature);
  }
  int64_t token;
  double truncated = 0.;
  if (greedy) {
    token = argmax(logits, a.vocab, most);
  } else {
    const Filters filters{a.top_k[row], a.top_p[row], a.min_p[row]};
    const float threshold = truncation_threshold(weights, a.vocab, filters);
    mass = chunk_masses(scratch.masses, weights, a.vocab, threshold);
    const double target = philox_uniform(a.seeds[row], a.positions[row]) * mass;
    token = find_token(scratch.masses, weights, a.vocab, threshold, target);
    truncated = (logits[token] - most) / temperature - std::log(mass);
  }
  const float raw_logit = raw ? raw[token] : logits[token];
  a.tokens[row] = token;
  a.logprobs[row] = static_cast<float>((raw_logit - full_max) / temperature - std::log(full_mass));
  a.truncated_logprobs[row] = static_cast<float>(truncated);
}

}  // namespace

void sample(const Sample& args, Stream) {
  // An exception may not leave an OpenMP region, so the first is carried out of it.
  std::exception_ptr error;
  parallel_for(args.rows, kElementsPerThread / args.vocab + 1, [&](int64_t begin, int64_t end) {
    try {
      Row scratch{std::vector<float>(args.vocab), std::vector<float>(args.vocab), {}};
      for (int64_t row = begin; row < end; ++row) sample_row(args, row, scratch);
    } catch (...) {
#pragma omp critical
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace he::cpu
