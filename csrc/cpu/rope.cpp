// Bias, per-head norm, rotation and the store into the paged cache: each token's QKV row is read
// once and written once.
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

constexpr int64_t kElementsPerThread = 8192;

template <typename T>
void load_head(float* head, const T* qkv, const T* bias, int64_t dim) {
  if (bias == nullptr) return convert(head, qkv, dim);
  map_vecs(head, dim, [](Vec v, Vec b) { return v + b; }, qkv, bias);
}

template <typename T>
void normalise_head(float* head, const T* weight, int64_t dim, float eps, float weight_offset) {
  float total = 0.f;
  for (int64_t i = 0; i < dim; ++i) total += head[i] * head[i];
  const float scale = 1.f / std::sqrt(total / dim + eps);
  for (int64_t i = 0; i < dim; ++i) head[i] *= scale * (to_float(weight[i]) + weight_offset);
}

// cos_sin: [rotary / 2] cosines, then [rotary / 2] sines.
void rotate_head(float* head, const float* cos_sin, int64_t rotary, bool interleaved) {
  const int64_t half = rotary / 2;
  const int64_t stride = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const float cos = cos_sin[i], sin = cos_sin[half + i];
    float &first = head[i * stride], &second = head[i * stride + partner];
    const float turned = first * cos - second * sin;
    second = second * cos + first * sin;
    first = turned;
  }
}

// Queries go to `q`, keys and values to the token's slot, or nowhere.
template <typename T>
T* destination(const RopeAndStoreKv& a, int64_t token, int64_t head) {
  if (head < a.num_heads) return static_cast<T*>(a.q) + (token * a.num_heads + head) * a.head_dim;
  const int64_t slot = a.slot_mapping[token];
  if (slot < 0) return nullptr;
  const bool is_key = head < a.num_heads + a.num_kv_heads;
  const int64_t kv_head = (head - a.num_heads) % a.num_kv_heads;
  const int64_t block = slot / a.block_size, offset = slot % a.block_size;
  T* cache = static_cast<T*>(is_key ? a.k_cache : a.v_cache);
  return cache + ((block * a.num_kv_heads + kv_head) * a.block_size + offset) * a.head_dim;
}

template <typename T>
void one_head(const RopeAndStoreKv& a, int64_t token, int64_t head, float* scratch) {
  T* out = destination<T>(a, token, head);
  if (out == nullptr) return;
  const int64_t heads = a.num_heads + 2 * a.num_kv_heads;
  const T* bias = a.bias ? static_cast<const T*>(a.bias) + head * a.head_dim : nullptr;
  const T* qkv = static_cast<const T*>(a.qkv) + (token * heads + head) * a.head_dim;
  load_head(scratch, qkv, bias, a.head_dim);
  if (head < a.num_heads + a.num_kv_heads) {
    const T* norm = static_cast<const T*>(head < a.num_heads ? a.q_norm : a.k_norm);
    if (norm) normalise_head(scratch, norm, a.head_dim, a.norm_eps, a.norm_weight_offset);
    if (a.cos_sin) {
      const float* row = a.cos_sin + a.positions[token] * a.rotary_dim;
      rotate_head(scratch, row, a.rotary_dim, a.interleaved);
    }
  }
  convert(out, scratch, a.head_dim);
}

}  // namespace

void rope_and_store_kv(const RopeAndStoreKv& args, Stream) {
  const int64_t heads = args.num_heads + 2 * args.num_kv_heads;
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (heads * args.head_dim));
  dispatch(args.dtype, [&](auto t) {
    parallel_for(args.tokens, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(args.head_dim);
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t head = 0; head < heads; ++head) {
          one_head<decltype(t)>(args, token, head, scratch.data());
        }
      }
    });
  });
}

}  // namespace he::cpu
