// Bias, per-head norm, rotation and the store into the paged cache. A head belongs to a group of
// 1 to 32 lanes, as many as leave each lane one unit: two 16-byte packs that hold both sides of
// what is rotated. A block holds up to 256 lanes, all of one token. A token's QKV row is read once
// and written once; only heads that are normalised are read again, from cache. 3 instantiations.
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace he::cuda {
namespace {

constexpr int64_t kMaxThreads = 256;

// One lane's step through a head: kPack pairs to rotate, or 2 * kPack elements to leave.
template <typename T>
struct Unit {
  static constexpr int kPack = Pack<T>::kSize, kElements = 2 * kPack;
  int64_t first, second;              // where the two packs begin in the head
  int64_t first_count, second_count;  // elements from there on, which may exceed a pack
  int64_t pair;                       // the number of its first pair
  bool rotated;

  static __device__ Unit at(int64_t unit, int64_t rotary, int64_t head_dim, bool interleaved) {
    const int64_t half = rotary / 2, rotated_units = ceil_div<int64_t>(half, kPack);
    if (unit >= rotated_units) {
      const int64_t begin = rotary + (unit - rotated_units) * kElements, rest = head_dim - begin;
      return {begin, begin + kPack, rest, rest - kPack, 0, false};
    }
    const int64_t pair = unit * kPack;
    if (interleaved) {
      const int64_t begin = 2 * pair, rest = rotary - begin;
      return {begin, begin + kPack, rest, rest - kPack, pair, true};
    }
    return {pair, half + pair, half - pair, half - pair, pair, true};
  }

  static __host__ __device__ int64_t count(int64_t rotary, int64_t head_dim) {
    return ceil_div<int64_t>(rotary / 2, kPack) + ceil_div<int64_t>(head_dim - rotary, kElements);
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
                         int64_t half, bool interleaved, bool aligned) const {
    constexpr int kTablePack = Pack<float>::kSize;
    float cosines[kPack], sines[kPack];
#pragma unroll
    for (int j = 0; j < kPack; j += kTablePack) {
      const int64_t i = pair + j;
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
    const float turned = x * cosine - y * sine;
    y = y * cosine + x * sine;
    x = turned;
  }
};

// What one head is made from, and where it goes.
template <typename T>
struct Head {
  const T* qkv;    // [head_dim]
  const T* bias;   // [head_dim] or null
  const T* norm;   // [head_dim] or null
  T* out;          // [head_dim], or null: no such head, or its token has no slot
  int64_t rotary;  // 0: not rotated

  static __device__ Head of(const RopeAndStoreKv& a, int64_t token, int64_t head) {
    const int64_t keys_end = a.num_heads + a.num_kv_heads, heads = keys_end + a.num_kv_heads;
    if (head >= heads) return {};
    const T* norm = static_cast<const T*>(head < a.num_heads ? a.q_norm : a.k_norm);
    return {static_cast<const T*>(a.qkv) + (token * heads + head) * a.head_dim,
            a.bias ? static_cast<const T*>(a.bias) + head * a.head_dim : nullptr,
            head < keys_end ? norm : nullptr, destination(a, token, head),
            head < keys_end ? a.rotary_dim : 0};
  }

  static __device__ T* destination(const RopeAndStoreKv& a, int64_t token, int64_t head) {
    if (head < a.num_heads) return static_cast<T*>(a.q) + (token * a.num_heads + head) * a.head_dim;
    const int64_t slot = a.slot_mapping[token];
    if (slot < 0) return nullptr;
    const bool is_key = head < a.num_heads + a.num_kv_heads;
    const int64_t kv_head = head - a.num_heads - (is_key ? 0 : a.num_kv_heads);
    const int64_t block = slot / a.block_size, offset = slot % a.block_size;
    T* cache = static_cast<T*>(is_key ? a.k_cache : a.v_cache);
    return cache + ((block * a.num_kv_heads + kv_head) * a.block_size + offset) * a.head_dim;
  }

  __device__ void load(float (&values)[Unit<T>::kElements], const Unit<T>& unit,
                       bool aligned) const {
    unit.load(values, qkv, aligned);
    if (bias == nullptr) return;
    float shift[Unit<T>::kElements];
    unit.load(shift, bias, aligned);
#pragma unroll
    for (int j = 0; j < Unit<T>::kElements; ++j) values[j] += shift[j];
  }
};

// 1 / the root mean square of a head. All lanes of the warp call it; `units` of a head without a
// norm are not read.
template <typename T>
__device__ float norm_scale(const RopeAndStoreKv& a, const Head<T>& head, int64_t units, int lanes,
                            bool aligned) {
  float total = 0.f;
  for (int64_t u = threadIdx.x % lanes; head.norm && u < units; u += lanes) {
    float values[Unit<T>::kElements];
    head.load(values, Unit<T>::at(u, head.rotary, a.head_dim, a.interleaved), aligned);
#pragma unroll
    for (float value : values) total += value * value;
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kFullMask, total, distance);
  }
  return 1.f / sqrtf(total / a.head_dim + a.norm_eps);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    rope_and_store_kv_kernel(RopeAndStoreKv a, int lanes, unsigned blocks_per_token, bool aligned) {
  const int64_t token = blockIdx.x / blocks_per_token;
  const int64_t first_lane = int64_t{blockIdx.x % blocks_per_token} * blockDim.x + threadIdx.x;
  const Head<T> head = Head<T>::of(a, token, first_lane / lanes);
  const int64_t units = head.out ? Unit<T>::count(head.rotary, a.head_dim) : 0;
  float scale = 1.f;
  if (a.q_norm || a.k_norm) scale = norm_scale(a, head, units, lanes, aligned);
  for (int64_t u = threadIdx.x % lanes; u < units; u += lanes) {
    const auto unit = Unit<T>::at(u, head.rotary, a.head_dim, a.interleaved);
    float values[Unit<T>::kElements];
    head.load(values, unit, aligned);
    if (head.norm) {
      float weight[Unit<T>::kElements];
      unit.load(weight, head.norm, aligned);
#pragma unroll
      for (int j = 0; j < Unit<T>::kElements; ++j) {
        values[j] *= scale * (weight[j] + a.norm_weight_offset);
      }
    }
    if (unit.rotated) {
      const float* cos_sin = a.cos_sin + a.positions[token] * a.rotary_dim;
      unit.rotate(values, cos_sin, a.rotary_dim / 2, a.interleaved, aligned);
    }
    unit.store(head.out, values, aligned);
  }
}

template <typename T>
void launch_rope(const RopeAndStoreKv& a, Stream stream) {
  const bool aligned = packs_aligned<T>(a.head_dim, {a.q, a.k_cache, a.v_cache, a.qkv, a.bias,
                                                     a.q_norm, a.k_norm, a.cos_sin}) &&
                       a.rotary_dim % Unit<T>::kElements == 0;
  const int64_t units =
      std::max(Unit<T>::count(a.rotary_dim, a.head_dim), Unit<T>::count(0, a.head_dim));
  int lanes = 1;
  while (lanes < units && lanes < kWarpSize) lanes *= 2;
  const int64_t all_lanes = (a.num_heads + 2 * a.num_kv_heads) * lanes;
  const int64_t threads =
      std::min(kMaxThreads, ceil_div<int64_t>(all_lanes, kWarpSize) * kWarpSize);
  const unsigned blocks_per_token = grid_of(ceil_div(all_lanes, threads)).x;
  launch(rope_and_store_kv_kernel<T>, grid_of(a.tokens * blocks_per_token),
         static_cast<unsigned>(threads), 0, stream, a, lanes, blocks_per_token, aligned);
}

}  // namespace

void rope_and_store_kv(const RopeAndStoreKv& args, Stream stream) {
  dispatch(args.dtype, [&](auto t) { launch_rope<decltype(t)>(args, stream); });
}

}  // namespace he::cuda
