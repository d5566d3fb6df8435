// The decode step of a whole model in one call: every layer, the head, sampling and bookkeeping,
// for as many steps as need nobody else. It owns its scratch and nothing else: weights, cache and
// rows are the caller's memory, which must stay where it is.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels.h"

#define HE_EXPORT __attribute__((visibility("default")))

namespace he::runtime {

struct NormWeights {
  const void* weight = nullptr;  // [dim]; null: no norm here
  const void* bias = nullptr;    // [dim] or null
  float eps = 0.f;
};

// out += scale * (x a^T) b^T
struct AdapterWeights {
  const void* a = nullptr;  // [rank, in_dim]
  const void* b = nullptr;  // [out_dim, rank]
  int64_t rank = 0;
  float scale = 0.f;
};

struct LinearWeights {
  const void* weight = nullptr;  // [out_dim, in_dim], or if transposed [in_dim, out_dim]
  const void* bias = nullptr;    // [out_dim] or null
  int64_t out_dim = 0, in_dim = 0;
  bool transposed = false;
  std::vector<AdapterWeights> adapters;
};

struct LayerWeights {
  NormWeights attention_norm, attention_output_norm, mlp_norm, mlp_output_norm;
  const void* query_norm = nullptr;  // [head_dim] or null
  const void* key_norm = nullptr;    // [head_dim] or null
  float head_norm_eps = 0.f;
  LinearWeights qkv;  // its bias is added with the rotation
  LinearWeights attention_output, mlp_up, mlp_down;
  int64_t window = 0;  // keys that are seen; 0: all
};

struct DecoderWeights {
  DType dtype = DType::kFloat32;
  int64_t hidden = 0, vocab = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, rotary_dim = 0;
  bool rms = true, parallel_residual = false, gated = true;
  Activation activation = Activation::kSilu;
  float norm_weight_offset = 0.f, attention_scale = 1.f, attention_softcap = 0.f;
  float final_softcap = 0.f;
  float embedding_scale = 1.f;
  const void* embedding = nullptr;           // [vocab, hidden]
  const void* position_embedding = nullptr;  // [positions, hidden] or null
  int64_t position_offset = 0;               // rows of it before position 0
  NormWeights embedding_norm, final_norm;
  LinearWeights head;
  const float* cos_sin = nullptr;       // [positions, rotary_dim] or null
  const float* alibi_slopes = nullptr;  // [num_heads] or null
  std::vector<LayerWeights> layers;
};

struct LayerCache {
  void* keys = nullptr;    // [num_blocks, num_kv_heads, block_size, head_dim]
  void* values = nullptr;  // as keys
};

// One running sequence a row; all arrays are the caller's, and the call reads and advances them.
struct DecodeRows {
  int64_t* tokens = nullptr;              // [capacity] fed next, then the one sampled
  int64_t* lengths = nullptr;             // [capacity] cached tokens
  int64_t* steps = nullptr;               // [capacity] response tokens so far
  const int64_t* room = nullptr;          // [capacity] tokens that the row's blocks hold
  const int64_t* indices = nullptr;       // [capacity] the row of the results
  const int64_t* seeds = nullptr;         // [capacity]
  const int32_t* block_tables = nullptr;  // [capacity, max_blocks]
  uint8_t* seen = nullptr;                // [capacity, vocab] or null
  int64_t max_blocks = 0, block_size = 0;
  const float* temperature = nullptr;  // [capacity], as the rest; see he::Sample
  const int64_t* top_k = nullptr;
  const float* top_p = nullptr;
  const float* min_p = nullptr;
  const float* repetition_penalty = nullptr;  // or null
  std::vector<int64_t> stop_tokens;
  int64_t min_new_tokens = 0;  // no stop token before so many
  // results
  int64_t* out_tokens = nullptr;   // [prompts, max_new_tokens]
  float* out_logprobs = nullptr;   // as out_tokens
  float* out_truncated = nullptr;  // as out_tokens
  int64_t* out_lengths = nullptr;  // [prompts]
  int64_t max_new_tokens = 0;
};

enum Part : int { kMatrices, kAttention, kSampling, kRest, kParts };

class HE_EXPORT DecodeProgram {
 public:
  explicit DecodeProgram(DecoderWeights weights) : weights_(std::move(weights)) {}

  // Advances the first `count` rows by at least one and at most `most` tokens. It returns after a
  // step in which a row ended (a stop token, or its limit) or filled its blocks; how many steps it
  // took. Throws std::runtime_error on logits that are not finite.
  int64_t run(const DecodeRows& rows, const std::vector<LayerCache>& cache, int64_t count,
              int64_t most);

  // Seconds spent so far, by part.
  const std::array<double, kParts>& seconds() const { return seconds_; }

 private:
  class Step;

  DecoderWeights weights_;
  std::array<double, kParts> seconds_{};
  std::vector<unsigned char> scratch_;
};

}  // namespace he::runtime
