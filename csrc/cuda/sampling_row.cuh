// One row of logits as the sampling kernel sees it: penalised logits, weights and their masses.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace he::cuda {

constexpr int kSamplingThreads = 1024, kSamplingWarps = kSamplingThreads / kWarpSize;
static_assert(kSamplingWarps == kWarpSize, "a warp holds one value of each warp");
constexpr float kMassOne = 0x1p42f;  // the mass of the largest weight

template <typename T>
struct LogitRow {
  static constexpr int kPack = Pack<T>::kSize;
  const T* logits;      // [vocab]
  const uint8_t* seen;  // [vocab] or null: nothing is penalised
  float penalty;
  int64_t vocab;
  bool aligned;

  __device__ LogitRow unpenalised() const { return {logits, nullptr, 1.f, vocab, aligned}; }

  __device__ float penalise(float logit, int64_t i) const {
    if (seen == nullptr || !seen[i]) return logit;
    return logit > 0.f ? logit / penalty : logit * penalty;
  }

  __device__ float at(int64_t i) const { return penalise(to_float(logits[i]), i); }

  // The row is cut into one contiguous part to a warp, of whole packs.
  __device__ int64_t part() const {
    constexpr int64_t kTile = kWarpSize * kPack;
    return ceil_div<int64_t>(vocab, kTile * kSamplingWarps) * kTile;
  }

  // Calls body(logit, index) for this thread's share of its warp's part.
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    const int64_t begin = threadIdx.x / kWarpSize * part(), end = min(begin + part(), vocab);
    for (int64_t i = begin + threadIdx.x % kWarpSize * kPack; i < end; i += kWarpSize * kPack) {
      float values[kPack];
      load_floats(values, logits + i, vocab - i, aligned);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        if (i + j < vocab) body(penalise(values[j], i + j), i + j);
      }
    }
  }
};

// Weights of a row's tokens: 1 for the largest logit, 0 for what is under the threshold.
template <typename T>
struct TokenWeights {
  LogitRow<T> row;
  float most, inverse_temperature, threshold;

  __device__ float of(float logit) const {
    const float weight = expf((logit - most) * inverse_temperature);
    return weight >= threshold ? weight : 0.f;
  }

  static __device__ uint64_t mass(float weight) { return static_cast<uint64_t>(weight * kMassOne); }
};

// The mass of a row; `parts` keeps that of each warp's part.
template <typename T>
__device__ uint64_t total_mass(const TokenWeights<T>& weights,
                               uint64_t* parts) {  // [kSamplingWarps], written
  uint64_t mass = 0;
  weights.row.for_each([&](float logit, int64_t) { mass += weights.mass(weights.of(logit)); });
  mass = warp_reduce(mass, Sum{});
  __syncthreads();  // the parts of an earlier call have been read
  if (threadIdx.x % kWarpSize == 0) parts[threadIdx.x / kWarpSize] = mass;
  __syncthreads();
  return warp_reduce(parts[threadIdx.x % kWarpSize], Sum{});
}

}  // namespace he::cuda
