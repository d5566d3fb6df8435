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

struct LoraAdapter {
  const void* a;  // [rank, in_dim]
  const void* b;  // [out_dim, rank]
  int64_t rank;
  float scale;
};

// A kernel takes the adapters by value, so there is a most.
constexpr int64_t kMaxLoraAdapters = 32;

struct FusedLora {
  void* out;                     // [rows, out_dim], written
  const void* x;                 // [rows, in_dim]
  const void* weight;            // [out_dim, in_dim]
  const void* bias;              // [out_dim] or null
  const LoraAdapter* adapters;   // [num_adapters], in host memory
  const int32_t* adapter_index;  // [rows], -1: none; null: the sum of all adapters
  int64_t rows, out_dim, in_dim, num_adapters;
  DType dtype;
};

// A slice of one parameter of a bucket, on its way to its place. The full parameter is
// [rows, columns] row-major; element i of it is in the bucket at
// (i / partition) * rank_length + source + i % partition.
struct UnpackEntry {
  void* destination;   // [row_end - row_begin, column_end - column_begin], written
  const void* lora_a;  // [lora_rank, columns] or null
  const void* lora_b;  // [rows, lora_rank] or null: lora_scale * lora_b lora_a is added
  int64_t source, partition, rows, columns, row_begin, row_end, column_begin, column_end, lora_rank;
  float lora_scale;
  DType dtype, lora_dtype;  // of the destination, of the factors
};

struct GatherUnpack {
  const void* bucket;          // [world, rank_length]
  const UnpackEntry* entries;  // [num_entries], in host memory
  int64_t num_entries, rank_length;
  DType dtype;  // of the bucket
};

struct Gae {
  float* advantages;     // [rows, length], written
  float* returns;        // [rows, length], written
  const float* rewards;  // [rows, length]
  const float* values;   // [rows, length]
  const uint8_t* mask;   // [rows, length]
  int64_t rows, length;
  double gamma, lam;
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

// ---- linear -------------------------------------------------------------------------------------

// out = x weight^T + bias, for few rows
void skinny_linear(void* out,           // [rows, out_dim]
                   const void* x,       // [rows, in_dim]
                   const void* weight,  // [out_dim, in_dim]
                   const void* bias,    // [out_dim] or null
                   int64_t rows, int64_t out_dim, int64_t in_dim, DType dtype, Stream stream);

// out = x weight^T + bias + sum over adapters of scale * (x a^T) b^T
void fused_lora(const FusedLora& args, Stream stream);

// ---- gather -------------------------------------------------------------------------------------

void gather_unpack(const GatherUnpack& args, Stream stream);

// ---- advantage ----------------------------------------------------------------------------------

void gae(const Gae& args, Stream stream);

// moments = [how many, their sum, the sum of their squares] where the mask is set
void masked_moments(double* moments,      // [3]
                    const float* x,       // [count]
                    const uint8_t* mask,  // [count]
                    int64_t count, Stream stream);

// out = (x - mean) / sqrt(variance + eps) (+ mean) where the mask is set, else 0
void masked_whiten(float* out,             // [count]
                   const float* x,         // [count]
                   const uint8_t* mask,    // [count]
                   const double* moments,  // [3]
                   int64_t count, bool shift_mean, double eps, Stream stream);

}  // namespace HE_DEVICE
}  // namespace he
