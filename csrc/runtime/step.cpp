#include "runtime/step.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace he::runtime {
namespace {

using cpu::dispatch;
using cpu::parallel_for;
using cpu::Vec;

}  // namespace

PagedAttention attention_args(const DecoderWeights& w, const DecodeRows& rows, int64_t count) {
  PagedAttention a{};
  a.block_tables = rows.block_tables;
  a.tokens = a.sequences = count;
  a.num_heads = w.num_heads;
  a.num_kv_heads = w.num_kv_heads;
  a.head_dim = w.head_dim;
  a.block_size = rows.block_size;
  a.max_blocks = rows.max_blocks;
  a.max_query_len = 1;
  a.alibi_slopes = w.alibi_slopes;
  a.scale = w.attention_scale;
  a.softcap = w.attention_softcap;
  a.dtype = w.dtype;
  return a;
}

DecodeProgram::Step::Step(const DecoderWeights& weights, const DecodeRows& rows,
                          const std::vector<LayerCache>& cache, int64_t count,
                          unsigned char* scratch, std::array<double, kParts>* seconds)
    : w_(weights),
      rows_(rows),
      cache_(cache),
      count_(count),
      s_(weights, rows, count, cpu::membership.index, scratch),
      seconds_(seconds) {
  if (seconds_) since_ = std::chrono::steady_clock::now();
}

void DecodeProgram::Step::run() {
  place();
  on_own_rows([&] { embed(); });
  on_own_rows([&] { norm(w_.layers[0].attention_norm, s_.x, s_.residual, nullptr); });
  for (size_t i = 0; i < w_.layers.size(); ++i) layer(i);
  predict();
  sample();
  advance();
}

// From s_.x, the normed residual, to the next layer's, or to the last hidden state.
void DecodeProgram::Step::layer(size_t index) {
  const LayerWeights& layer = w_.layers[index];
  attend(layer, cache_[index]);  // leaves its result in s_.attended
  enter(kRest);
  on_own_rows([&] {
    if (w_.parallel_residual) {
      norm(layer.mlp_norm, s_.x, s_.residual, nullptr);
      add(s_.residual, s_.attended);
    } else {
      norm(layer.mlp_norm, s_.x, s_.attended, s_.residual);
    }
  });
  mlp(layer);  // leaves its result in s_.attended
  const bool last = index + 1 == w_.layers.size();
  const NormWeights& next = last ? w_.final_norm : w_.layers[index + 1].attention_norm;
  on_own_rows([&] { norm(next, s_.x, s_.attended, s_.residual); });
}

template <typename Body>
void DecodeProgram::Step::on_own_rows(const Body& body) {
  if (!has_own_rows(w_, count_)) return body();
  cpu::AloneScope alone;
  body();
}

void DecodeProgram::Step::attend(const LayerWeights& layer, const LayerCache& cache) {
  multiply(layer.qkv, s_.wide, s_.x, nullptr);
  enter(kAttention);
  RopeAndStoreKv r{};
  r.q = s_.inner;
  r.k_cache = cache.keys;
  r.v_cache = cache.values;
  r.qkv = s_.wide;
  r.bias = layer.qkv.bias;
  r.q_norm = layer.query_norm;
  r.k_norm = layer.key_norm;
  r.cos_sin = w_.cos_sin;
  r.positions = rows_.lengths;
  r.slot_mapping = s_.slots;
  r.tokens = count_;
  r.num_heads = w_.num_heads;
  r.num_kv_heads = w_.num_kv_heads;
  r.head_dim = w_.head_dim;
  r.block_size = rows_.block_size;
  r.rotary_dim = w_.rotary_dim;
  r.norm_eps = layer.head_norm_eps;
  r.dtype = w_.dtype;
  cpu::rope_and_store_kv(r, nullptr);
  PagedAttention a = attention_args(w_, rows_, count_);
  a.out = s_.wide;
  a.q = s_.inner;
  a.k_cache = cache.keys;
  a.v_cache = cache.values;
  a.seq_lens = s_.seq_lens;
  a.workspace = s_.workspace;
  a.window = layer.window;
  cpu::paged_attention(a, nullptr);
  multiply(layer.attention_output, s_.attended, s_.wide, layer.attention_output.bias);
  if (layer.attention_output_norm.weight) {
    norm(layer.attention_output_norm, s_.attended, s_.attended, nullptr);
  }
}

void DecodeProgram::Step::mlp(const LayerWeights& layer) {
  const int64_t dim = layer.mlp_down.in_dim;
  if (w_.gated && layer.mlp_up.adapters.empty() && !layer.mlp_up.transposed) {
    multiply_gated(layer.mlp_up, dim);
  } else {
    multiply(layer.mlp_up, s_.wide, s_.x, layer.mlp_up.bias);
    enter(kRest);
    if (w_.gated) {
      cpu::activation_and_mul(s_.inner, s_.wide, count_, dim, w_.activation, w_.dtype, nullptr);
    } else {
      cpu::bias_activation(s_.inner, s_.wide, nullptr, count_, dim, w_.activation, w_.dtype,
                           nullptr);
    }
  }
  multiply(layer.mlp_down, s_.attended, s_.inner, layer.mlp_down.bias);
  enter(kRest);
  if (layer.mlp_output_norm.weight) norm(layer.mlp_output_norm, s_.attended, s_.attended, nullptr);
}

// s_.inner = activation(x gate^T) * (x up^T): each member has some columns of both, so that the
// activation waits for nobody. Its products lie together in s_.wide, [count, 2, columns].
void DecodeProgram::Step::multiply_gated(const LinearWeights& both, int64_t dim) {
  enter(kMatrices);
  constexpr int64_t kColumns = 16;  // a cache line of fp32
  const int64_t size = element_size(w_.dtype);
  const int64_t grain = kElementsPerThread / (both.in_dim * count_) + 1;
  const auto at = [&](const void* base, int64_t element) {
    return base ? static_cast<const unsigned char*>(base) + element * size : nullptr;
  };
  parallel_for((dim + kColumns - 1) / kColumns, grain / kColumns + 1, [&](int64_t b, int64_t e) {
    const int64_t begin = b * kColumns, width = std::min(e * kColumns, dim) - begin;
    unsigned char* products = static_cast<unsigned char*>(s_.wide) + 2 * count_ * begin * size;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = half * dim + begin;
      cpu::Linear part = product(both, products + half * width * size, s_.x, at(both.bias, row));
      part.weight = at(both.weight, row * both.in_dim);
      part.out_dim = width;
      part.out_stride = 2 * width;
      cpu::linear(part);
    }
    for (int64_t i = 0; i < count_; ++i) {
      unsigned char* out = static_cast<unsigned char*>(s_.inner) + (i * dim + begin) * size;
      cpu::activation_and_mul(out, products + 2 * i * width * size, 1, width, w_.activation,
                              w_.dtype, nullptr);
    }
  });
}

void DecodeProgram::Step::norm(const NormWeights& norm, void* out, const void* x, void* residual) {
  if (w_.rms) {
    cpu::rms_norm(out, x, residual, norm.weight, count_, w_.hidden, norm.eps, w_.norm_weight_offset,
                  w_.dtype, nullptr);
  } else {
    cpu::layer_norm(out, x, residual, norm.weight, norm.bias, count_, w_.hidden, norm.eps, w_.dtype,
                    nullptr);
  }
}

void DecodeProgram::Step::add(void* sum, const void* x) {
  dispatch(w_.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(count_ * w_.hidden, kElementsPerThread, [&](int64_t begin, int64_t end) {
      T* to = static_cast<T*>(sum) + begin;
      const T* from = static_cast<const T*>(x) + begin;
      cpu::map_vecs(to, end - begin, [](Vec a, Vec b) { return a + b; }, to, from);
    });
  });
}

cpu::Linear DecodeProgram::Step::product(const LinearWeights& linear, void* out, const void* x,
                                         const void* bias) {
  cpu::Linear whole{};
  whole.out = out;
  whole.x = x;
  whole.weight = linear.weight;
  whole.bias = bias;
  whole.rows = count_;
  whole.out_dim = whole.out_stride = linear.out_dim;
  whole.in_dim = linear.in_dim;
  whole.scale = 1.f;
  whole.transposed = linear.transposed;
  whole.dtype = w_.dtype;
  return whole;
}

void DecodeProgram::Step::multiply(const LinearWeights& linear, void* out, const void* x,
                                   const void* bias) {
  enter(kMatrices);
  const cpu::Linear whole = product(linear, out, x, bias);
  cpu::linear(whole);
  for (const AdapterWeights& adapter : linear.adapters) {
    cpu::Linear down = whole;
    down.out = s_.low;
    down.weight = adapter.a;
    down.bias = nullptr;
    down.out_dim = down.out_stride = adapter.rank;
    down.transposed = false;
    cpu::linear(down);
    cpu::Linear up = down;
    up.out = out;
    up.x = s_.low;
    up.weight = adapter.b;
    up.out_dim = up.out_stride = linear.out_dim;
    up.in_dim = adapter.rank;
    up.scale = adapter.scale;
    up.accumulate = true;
    cpu::linear(up);
  }
}

void DecodeProgram::Step::enter(Part part) {
  if (seconds_ == nullptr || part == part_) return;
  const auto now = std::chrono::steady_clock::now();
  (*seconds_)[part_] += std::chrono::duration<double>(now - since_).count();
  since_ = now;
  part_ = part;
}

}  // namespace he::runtime
