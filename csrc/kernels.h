// The launchers of every kernel family: raw pointers, sizes and a stream, no tensors.
//
// The same declarations serve every device: HE_DEVICE is `cpu` or `cuda`, and the bindings are
// compiled once for each. On the CPU the stream is null and a launcher returns when the work is
// done. Pointers are 16-byte aligned where `bindings/` says so; all memory is contiguous.
#pragma once

#include <cstdint>

namespace he {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

using Stream = void*;

enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

struct RopeAndStoreKv {
  void* q;                   // [tokens, num_heads, head_dim], written
  void* k_cache;             // [num_blocks, num_kv_heads, block_size, head_dim], written
  void* v_cache;             // as k_cache
  const void* qkv;           // [tokens, (num_heads + 2 * num_kv_heads) * head_dim]
  const void* bias;          // [(num_heads + 2 * num_kv_heads) * head_dim] or null
  const void* q_norm;        // [head_dim] or null
  const void* k_norm;        // [head_dim] or null
  const float* cos_sin;      // [max_position, rotary_dim]: cosines, then sines; null: no rotation
  const int64_t* positions;  // [tokens]
  const int64_t* slot_mapping;  // [tokens]: block * block_size + offset; negative: not stored
  int64_t tokens, num_heads, num_kv_heads, head_dim, block_size, rotary_dim;
  float norm_eps, norm_weight_offset;
  bool interleaved;
  DType dtype;
};

// Query i of a sequence with `query_len` new tokens sees the keys at positions
// <= seq_len - query_len + i, and of those only the last `window` when window > 0.
struct PagedAttention {
  void* out;                    // [tokens, num_heads, head_dim], written
  const void* q;                // [tokens, num_heads, head_dim]
  const void* k_cache;          // [num_blocks, num_kv_heads, block_size, head_dim]
  const void* v_cache;          // as k_cache
  const int32_t* block_tables;  // [sequences, max_blocks]
  const int32_t* cu_seqlens;    // [sequences + 1], first query of each; null: one query each
  const int32_t* seq_lens;      // [sequences], keys of each, the new tokens included
  const float* alibi_slopes;    // [num_heads] or null
  float* workspace;             // [paged_attention_workspace(...)], 16-byte aligned
  int64_t tokens, sequences, num_heads, num_kv_heads, head_dim, block_size, max_blocks;
  int64_t max_query_len;  // the most queries of one sequence
  int64_t num_splits;     // key ranges in parallel; 0: the launcher chooses
  int64_t window;         // 0: unlimited
  float scale, softcap;   // softcap 0: none
  DType dtype;
};

struct Sample {
  int64_t* tokens;                  // [rows], written
  float* logprobs;                  // [rows], written: under softmax(logits / temperature)
  float* truncated_logprobs;        // [rows], written: under the distribution sampled from
  const void* logits;               // [rows, vocab]
  const float* temperature;         // [rows]; 0: greedy
  const int64_t* top_k;             // [rows]; 0: off
  const float* top_p;               // [rows]; 1: off
  const float* min_p;               // [rows]; 0: off
  const int64_t* seeds;             // [rows]
  const int64_t* positions;         // [rows], index of the token in its response
  const float* repetition_penalty;  // [rows] or null
  const uint8_t* seen;              // [rows, vocab] or null: tokens that the penalty applies to
  int64_t rows, vocab;
  DType dtype;
};

namespace HE_DEVICE {

// ---- norm ---------------------------------------------------------------------------------------

// out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset); with a residual, first
// residual += x and the sum is what gets normalised.
void rms_norm(void* out,           // [rows, dim]
              const void* x,       // [rows, dim]
              void* residual,      // [rows, dim] or null
              const void* weight,  // [dim]
              int64_t rows, int64_t dim, float eps, float weight_offset, DType dtype,
              Stream stream);

// out = (x - mean) / sqrt(var + eps) * weight + bias; residual as above.
void layer_norm(void* out,           // [rows, dim]
                const void* x,       // [rows, dim]
                void* residual,      // [rows, dim] or null
                const void* weight,  // [dim]
                const void* bias,    // [dim] or null
                int64_t rows, int64_t dim, float eps, DType dtype, Stream stream);

// ---- activation ---------------------------------------------------------------------------------

// out = activation(x[:, :dim]) * x[:, dim:]
void activation_and_mul(void* out,      // [rows, dim]
                        const void* x,  // [rows, 2 * dim]
                        int64_t rows, int64_t dim, Activation activation, DType dtype,
                        Stream stream);

// out = activation(x + bias)
void bias_activation(void* out,         // [rows, dim]
                     const void* x,     // [rows, dim]
                     const void* bias,  // [dim] or null
                     int64_t rows, int64_t dim, Activation activation, DType dtype, Stream stream);

// ---- rope ---------------------------------------------------------------------------------------

void rope_and_store_kv(const RopeAndStoreKv& args, Stream stream);

// ---- attention ----------------------------------------------------------------------------------

// The floats that `args.workspace` must hold, from everything else in `args` but contents.
int64_t paged_attention_workspace(const PagedAttention& args);

void paged_attention(const PagedAttention& args, Stream stream);

// ---- sampling -----------------------------------------------------------------------------------

void sample(const Sample& args, Stream stream);

}  // namespace HE_DEVICE
}  // namespace he
