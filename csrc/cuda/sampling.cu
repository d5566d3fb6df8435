// Sampling by inversion, one block to a row, without a sort and without scratch memory. Each pass
// over the row computes the weights exp((x - max) / T) anew from the logits: one pass for the
// maxima, one for the mass, three for each of top-k and top-p, which find their thresholds by radix
// selection on the weights' bits (positive floats order as integers do), one for the mass that is
// kept; then the part of one warp is searched. Memory is read once, the later passes hit the L2.
//
// Masses are whole numbers of 2^-42 of the largest weight, so sums are exact: the token depends on
// no order of addition, hence not on the batch. A kernel cannot raise an error: where a row has a
// NaN, no finite maximum or no finite 1 / T > 0, its token is -1 and its log-probs are NaN.
// 3 instantiations.
#include "cuda/sampling_select.cuh"
#include "philox.h"

namespace he::cuda {
namespace {

constexpr int64_t kMaxVocab = int64_t{1} << 21;  // so many masses add up to less than 2^64

// Weights below the returned threshold are out. `mass` is that of all weights.
template <typename T>
__device__ float truncation_threshold(TokenWeights<T> weights, RadixBins& bins, uint64_t* parts,
                                      uint64_t mass, int64_t top_k, float top_p, float min_p) {
  if (top_k > 0 && top_k < weights.row.vocab) {
    weights.threshold = select_threshold(weights, bins, static_cast<uint64_t>(top_k),
                                         [](float) { return uint64_t{1}; });
    mass = total_mass(weights, parts);
  }
  if (top_p < 1.f) {
    const uint64_t target = static_cast<uint64_t>(ceil(fmax(0., double{top_p} * mass)));
    weights.threshold =
        select_threshold(weights, bins, min(max(target, uint64_t{1}), mass),
                         [](float weight) { return TokenWeights<T>::mass(weight); });
  }
  return fminf(fmaxf(weights.threshold, min_p), 1.f);  // the largest weight, 1, always stays
}

// ---- the draw -----------------------------------------------------------------------------------

// The first token at which the running mass exceeds `target`; -1 in all threads but one.
template <typename T>
__device__ int64_t find_token(const TokenWeights<T>& weights,
                              const uint64_t* parts,  // [kSamplingWarps], of total_mass
                              uint64_t target) {
  const auto mass_at = [&](int64_t i) { return weights.mass(weights.of(weights.row.at(i))); };
  int64_t part = 0;
  while (part + 1 < kSamplingWarps && target >= parts[part]) target -= parts[part++];
  const int64_t begin = part * weights.row.part();
  const int64_t end = min(begin + weights.row.part(), weights.row.vocab);
  const int64_t share = ceil_div<int64_t>(weights.row.part(), kSamplingThreads);
  const int64_t first = min(begin + threadIdx.x * share, end), last = min(first + share, end);
  uint64_t mass = 0;
  for (int64_t i = first; i < last; ++i) mass += mass_at(i);
  const uint64_t running = block_scan(mass);
  if (target >= running || target < running - mass) return -1;
  target -= running - mass;
  int64_t token = first;
  for (uint64_t step; target >= (step = mass_at(token)); ++token) target -= step;
  return token;
}

// The largest logits of a row.
struct Maxima {
  float unpenalised, penalised;
  int64_t token;  // the first that has the largest penalised logit
  bool valid;     // no NaN, and both finite
};

// Orders as (logit, -token) does.
__device__ uint64_t rank_of(float logit, int64_t token) {
  const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 becomes 0
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}

template <typename T>
__device__ Maxima find_maxima(const LogitRow<T>& row) {
  float most = -INFINITY;
  uint64_t best = 0;
  bool nan = false;
  row.unpenalised().for_each([&](float logit, int64_t i) {
    const float penalised = row.penalise(logit, i);
    nan |= std::isnan(logit) || std::isnan(penalised);
    most = fmaxf(most, logit);
    best = max(best, rank_of(penalised, i));
  });
  nan = __syncthreads_or(nan);
  most = block_max(most);
  best = block_reduce(best, uint64_t{0}, Max{});
  const int64_t token = 0xffffffffu - static_cast<uint32_t>(best);
  const float penalised = row.at(token);
  return {most, penalised, token, !nan && std::isfinite(most) && std::isfinite(penalised)};
}

__device__ void write(const Sample& a, int64_t row, int64_t token, double logprob,
                      double truncated_logprob) {
  a.tokens[row] = token;
  a.logprobs[row] = static_cast<float>(logprob);
  a.truncated_logprobs[row] = static_cast<float>(truncated_logprob);
}

// log of weight / mass
__device__ double log_probability(float logit, float most, float temperature, uint64_t mass) {
  return (double{logit} - most) / temperature - log(mass / double{kMassOne});
}

template <typename T>
__global__ void __launch_bounds__(kSamplingThreads) sample_kernel(Sample a, bool aligned) {
  __shared__ RadixBins bins;
  __shared__ uint64_t parts[kSamplingWarps];
  const int64_t r = blockIdx.x;
  const float penalty = a.repetition_penalty ? a.repetition_penalty[r] : 1.f;
  const uint8_t* seen = penalty == 1.f ? nullptr : a.seen + r * a.vocab;
  const LogitRow<T> row{static_cast<const T*>(a.logits) + r * a.vocab, seen, penalty, a.vocab,
                        aligned};
  const bool greedy = a.temperature[r] == 0.f;
  const float temperature = greedy ? 1.f : a.temperature[r], inverse = 1.f / temperature;
  const Maxima maxima = find_maxima(row);
  if (!maxima.valid || !(inverse > 0.f) || std::isinf(inverse)) {
    if (threadIdx.x == 0) write(a, r, -1, NAN, NAN);
    return;
  }
  const TokenWeights<T> full{row.unpenalised(), maxima.unpenalised, inverse, 0.f};
  const uint64_t full_mass = total_mass(full, parts);
  int64_t token = threadIdx.x == 0 ? maxima.token : -1;
  double truncated_logprob = 0.;
  if (!greedy) {
    TokenWeights<T> kept{row, maxima.penalised, inverse, 0.f};
    uint64_t mass = seen ? total_mass(kept, parts) : full_mass;
    kept.threshold =
        truncation_threshold(kept, bins, parts, mass, a.top_k[r], a.top_p[r], a.min_p[r]);
    if (kept.threshold > 0.f) mass = total_mass(kept, parts);
    const double uniform = philox_uniform(a.seeds[r], a.positions[r]);
    token = find_token(kept, parts, min(static_cast<uint64_t>(uniform * mass), mass - 1));
    if (token < 0) return;  // another thread has found it
    truncated_logprob = log_probability(row.at(token), maxima.penalised, temperature, mass);
  }
  if (token < 0) return;
  const float logit = to_float(row.logits[token]);
  write(a, r, token, log_probability(logit, maxima.unpenalised, temperature, full_mass),
        truncated_logprob);
}

}  // namespace

void sample(const Sample& args, Stream stream) {
  if (args.vocab > kMaxVocab) {
    throw std::runtime_error("logits: expected at most " + std::to_string(kMaxVocab) +
                             " tokens, got " + std::to_string(args.vocab));
  }
  dispatch(args.dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = packs_aligned<T>(args.vocab, {args.logits});
    launch(sample_kernel<T>, grid_of(args.rows), kSamplingThreads, 0, stream, args, aligned);
  });
}

}  // namespace he::cuda
