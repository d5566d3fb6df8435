// Bias, per-head norm, rotation and the store into the paged cache. A head belongs to a group of
// 1 to 32 lanes, as many as leave each lane one unit: two 16-byte packs that hold both sides of
// what is rotated. A block holds up to 256 lanes, all of one token. A token's QKV row is read once
// and written once; only heads that are normalised are read again, from cache. 3 instantiations.
#include "cuda/vector.cuh"

namespace he::cuda {
namespace {

constexpr int64_t kMaxThreads = 256;

// One lane's step through a head: kPack pairs to rotate, or 2 * kPack elements to leave.
template <typename T>
struct Unit {
  static constexpr int kPack = Pack<T>::kSize, kElements = 2 * kPack;
  int first, second;              // where the two packs begin in the head
  int first_count, second_count;  // elements from there on, which may exceed a pack
  int pair;                       // the number of its first pair
  bool rotated;

  static __device__ Unit at(int unit, int rotary, int head_dim, bool interleaved) {
    const int half = rotary / 2, rotated_units = ceil_div(half, kPack);
    if (unit >= rotated_units) {
      const int begin = rotary + (unit - rotated_units) * kElements, rest = head_dim - begin;
      return {begin, begin + kPack, rest, rest - kPack, 0, false};
    }
    const int pair = unit * kPack;
    if (interleaved) {
      const int begin = 2 * pair, rest = rotary - begin;
      return {begin, begin + kPack, rest, rest - kPack, pair, true};
    }
    return {pair, half + pair, half - pair, half - pair, pair, true};
  }

  static __host__ __device__ int count(int rotary, int head_dim) {
    return ceil_div(rotary / 2, kPack) + ceil_div(head_dim - rotary, kElements);
  }

  __device__ void load(float (&values)[kElements], const T* head, bool aligned) const {
    load_floats(values, head + first, first_count, aligned);
    load_floats(values + kPack, head + second, second_count, aligned);
  }

  __device__ void store(T* head, const float (&values)[kElements], bool aligned) const {
    store_floats(head + first, values, first_count, aligned);
    store_floats(head + second, values + kPack, second_count, aligned);
  }

  __device__ void rotate(float (&values)[kElements],
                         const float* cos_sin,  // [rotary]: cosines, then sines
                         int half, bool interleaved, bool aligned) const {
    constexpr int kTablePack = Pack<float>::kSize;
    float cosines[kPack], sines[kPack];
#pragma unroll
    for (int j = 0; j < kPack; j += kTablePack) {
      const int i = pair + j;
      load_floats(cosines + j, cos_sin + i, half - i, aligned);
      load_floats(sines + j, cos_sin + half + i, half - i, aligned);
    }
    if (interleaved) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) turn(values[2 * j], values[2 * j + 1], cosines[j], sines[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kPack; ++j) turn(values[j], values[kPack + j], cosines[j], sines[j]);
    }
  }

  static __device__ void turn(float& x, float& y, float cosine, float sine) {
    const float turned = fmaf(x, cosine, -y * sine);
    y = fmaf(y, cosine, x * sine);
    x = turned;
  }
};

// One head of one token. Its pointers are never null, whatever may be read through them: else the
// compiler cannot tell that they point to global memory.
template <typename T>
struct Head {
  const T* qkv;          // [head_dim]
  const T* bias;         // [head_dim], if `biased`
  const T* norm;         // [head_dim], if `normalised`
  T* out;                // [head_dim], if `stored`
  const float* cos_sin;  // [rotary], if rotary > 0
  int head_dim, rotary;  // rotary 0: not rotated
  bool stored, biased, normalised, interleaved;

  __device__ Head(const RopeAndStoreKv& a, int64_t token, int64_t head) {
    const int64_t keys_end = a.num_heads + a.num_kv_heads, heads = keys_end + a.num_kv_heads;
    const bool is_query = head < a.num_heads, is_value = head >= keys_end;
    const int64_t slot = is_query || head >= heads ? 0 : a.slot_mapping[token];
    stored = head < heads && slot >= 0;
    head_dim = static_cast<int>(a.head_dim);
    rotary = is_value ? 0 : static_cast<int>(a.rotary_dim);
    interleaved = a.interleaved;
    qkv = static_cast<const T*>(a.qkv) + (token * heads + head) * a.head_dim;
    bias = static_cast<const T*>(a.bias) + head * a.head_dim;
    biased = a.bias != nullptr;
    norm = static_cast<const T*>(is_query ? a.q_norm : a.k_norm);
    normalised = norm != nullptr && !is_value;
    cos_sin = a.cos_sin + (stored && rotary > 0 ? a.positions[token] : 0) * a.rotary_dim;
    const int64_t row = is_query ? token * a.num_heads + head
                                 : cache_row(a, slot, head - (is_value ? keys_end : a.num_heads));
    out = static_cast<T*>(is_query ? a.q : is_value ? a.v_cache : a.k_cache) + row * a.head_dim;
  }

  static __device__ int64_t cache_row(const RopeAndStoreKv& a, int64_t slot, int64_t kv_head) {
    const int64_t block = slot / a.block_size, offset = slot - block * a.block_size;
    return (block * a.num_kv_heads + kv_head) * a.block_size + offset;
  }

  __device__ int units() const { return stored ? Unit<T>::count(rotary, head_dim) : 0; }

  __device__ Unit<T> unit(int number) const {
    return Unit<T>::at(number, rotary, head_dim, interleaved);
  }

  __device__ void load(float (&values)[Unit<T>::kElements], const Unit<T>& unit,
                       bool aligned) const {
    unit.load(values, qkv, aligned);
    if (!biased) return;
    float shift[Unit<T>::kElements];
    unit.load(shift, bias, aligned);
#pragma unroll
    for (int j = 0; j < Unit<T>::kElements; ++j) values[j] += shift[j];
  }
};

// 1 / the root mean square of a head. All lanes of the warp call it.
template <typename T>
__device__ float norm_scale(const Head<T>& head, int lane, int lanes, float eps, bool aligned) {
  const int units = head.normalised ? head.units() : 0;
  float total = 0.f;
  for (int u = lane; u < units; u += lanes) {
    float values[Unit<T>::kElements];
    head.load(values, head.unit(u), aligned);
#pragma unroll
    for (float value : values) total += value * value;
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kFullMask, total, distance);
  }
  return 1.f / sqrtf(total / head.head_dim + eps);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    rope_and_store_kv_kernel(const RopeAndStoreKv a,
                             int lane_bits,  // 2^lane_bits lanes to a head
                             unsigned blocks_per_token, bool aligned) {
  const int lanes = 1 << lane_bits, lane = threadIdx.x & (lanes - 1);
  const unsigned first_head = blockIdx.x % blocks_per_token * (blockDim.x >> lane_bits);
  const Head<T> head(a, blockIdx.x / blocks_per_token, first_head + (threadIdx.x >> lane_bits));
  float scale = 1.f;
  if (a.q_norm || a.k_norm) scale = norm_scale(head, lane, lanes, a.norm_eps, aligned);
  for (int u = lane; u < head.units(); u += lanes) {
    const Unit<T> unit = head.unit(u);
    float values[Unit<T>::kElements];
    head.load(values, unit, aligned);
    if (head.normalised) {
      float weight[Unit<T>::kElements];
      unit.load(weight, head.norm, aligned);
#pragma unroll
      for (int j = 0; j < Unit<T>::kElements; ++j) {
        values[j] = values[j] * scale * (weight[j] + a.norm_weight_offset);
      }
    }
    if (unit.rotated) unit.rotate(values, head.cos_sin, head.rotary / 2, a.interleaved, aligned);
    unit.store(head.out, values, aligned);
  }
}

template <typename T>
void launch_rope(const RopeAndStoreKv& a, Stream stream) {
  const bool aligned = packs_aligned<T>(a.head_dim, {a.q, a.k_cache, a.v_cache, a.qkv, a.bias,
                                                     a.q_norm, a.k_norm, a.cos_sin}) &&
                       a.rotary_dim % Unit<T>::kElements == 0;
  const int head_dim = static_cast<int>(a.head_dim), rotary = static_cast<int>(a.rotary_dim);
  const int units = std::max(Unit<T>::count(rotary, head_dim), Unit<T>::count(0, head_dim));
  int lane_bits = 0;
  while (1 << lane_bits < std::min(units, kWarpSize)) ++lane_bits;
  const int64_t lanes = (a.num_heads + 2 * a.num_kv_heads) << lane_bits;
  const int64_t threads = std::min(kMaxThreads, ceil_div<int64_t>(lanes, kWarpSize) * kWarpSize);
  const unsigned blocks_per_token = grid_of(ceil_div(lanes, threads)).x;
  launch(rope_and_store_kv_kernel<T>, grid_of(a.tokens * blocks_per_token),
         static_cast<unsigned>(threads), 0, stream, a, lane_bits, blocks_per_token, aligned);
}

}  // namespace

void rope_and_store_kv(const RopeAndStoreKv& args, Stream stream) {
  dispatch(args.dtype, [&](auto t) { launch_rope<decltype(t)>(args, stream); });
}

}  // namespace he::cuda
