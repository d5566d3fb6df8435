#include "runtime/step.h"

#include <algorithm>
#include <cmath>

#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace he::runtime {
namespace {

using cpu::dispatch;
using cpu::parallel_for;
using cpu::Vec;

constexpr int64_t kElementsPerThread = 16384;
// Elements of the residual up to which every member has its own.
constexpr int64_t kOwnElements = 32768;

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// The widest intermediate of a layer, the output of its first MLP product or of QKV.
int64_t widest(const DecoderWeights& w) {
  int64_t most = 0;
  for (const LayerWeights& layer : w.layers) {
    most = std::max({most, layer.mlp_up.out_dim, layer.qkv.out_dim});
  }
  return most;
}

int64_t most_rank(const DecoderWeights& w) {
  int64_t most = 0;
  const auto visit = [&](const LinearWeights& linear) {
    for (const AdapterWeights& adapter : linear.adapters) most = std::max(most, adapter.rank);
  };
  visit(w.head);
  for (const LayerWeights& layer : w.layers) {
    for (const LinearWeights* linear :
         {&layer.qkv, &layer.attention_output, &layer.mlp_up, &layer.mlp_down}) {
      visit(*linear);
    }
  }
  return most;
}

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

// Hands out aligned pieces of a buffer; of none, it adds up what they would take.
class Pieces {
 public:
  explicit Pieces(unsigned char* buffer) : at_(reinterpret_cast<uintptr_t>(buffer)) { align(); }

  template <typename T = void>
  T* take(int64_t bytes) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += bytes;
    align();
    return piece;
  }
  int64_t end() const { return at_; }

 private:
  void align() { at_ = (at_ + 63) / 64 * 64; }
  uintptr_t at_;
};

// to[i] = f(x[i], y[i])
template <typename T, typename Function>
void combine(T* to, const T* x, const T* y, int64_t count, const Function& f) {
  cpu::for_each_vec(
      count, [&](int64_t i) { cpu::store(to + i, f(cpu::load(x + i), cpu::load(y + i))); },
      [&](int64_t i, int64_t rest) {
        const Vec result = f(cpu::load_partial(x + i, rest), cpu::load_partial(y + i, rest));
        cpu::store_partial(to + i, result, rest);
      });
}

}  // namespace

int64_t DecodeProgram::Step::scratch_bytes(const DecoderWeights& weights, const DecodeRows& rows,
                                           int64_t count, int64_t threads) {
  const std::vector<LayerCache> none;
  cpu::Team team(static_cast<int>(threads));
  cpu::MembershipScope scope({&team, static_cast<int>(threads) - 1});
  const Step last(weights, rows, none, count, nullptr, nullptr);
  return last.scratch_end_ + 64;
}

DecodeProgram::Step::Step(const DecoderWeights& weights, const DecodeRows& rows,
                          const std::vector<LayerCache>& cache, int64_t count,
                          unsigned char* scratch, std::array<double, kParts>* seconds)
    : w_(weights),
      rows_(rows),
      cache_(cache),
      count_(count),
      seconds_(seconds),
      own_rows_(count * weights.hidden <= kOwnElements) {
  Pieces pieces(scratch);
  const int64_t row = count * element_size(w_.dtype);
  wide_ = pieces.take(row * widest(w_));
  inner_ = pieces.take(row * widest(w_));
  attended_ = pieces.take(row * w_.hidden);
  low_ = pieces.take(row * most_rank(w_));
  logits_ = pieces.take(row * w_.vocab);
  slots_ = pieces.take<int64_t>(count * 8);
  sampled_ = pieces.take<int64_t>(count * 8);
  seq_lens_ = pieces.take<int32_t>(count * 4);
  logprobs_ = pieces.take<float>(count * 4);
  truncated_ = pieces.take<float>(count * 4);
  const int64_t floats = cpu::paged_attention_workspace(attention_args(weights, rows, count));
  workspace_ = pieces.take<float>(floats * 4);
  for (int i = 0; i <= (own_rows_ ? cpu::membership.index : 0); ++i) {
    residual_ = pieces.take(row * w_.hidden);
    x_ = pieces.take(row * w_.hidden);
  }
  scratch_end_ = pieces.end();
  if (seconds_) since_ = std::chrono::steady_clock::now();
}

void DecodeProgram::Step::run() {
  place();
  on_own_rows([&] { embed(); });
  on_own_rows([&] { norm(w_.layers[0].attention_norm, x_, residual_, nullptr); });
  for (size_t i = 0; i < w_.layers.size(); ++i) layer(i);
  predict();
  sample();
  advance();
}

// Where each row's token goes in the cache.
void DecodeProgram::Step::place() {
  enter(kRest);
  parallel_for(count_, count_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t length = rows_.lengths[i], size = rows_.block_size;
      const int64_t block = rows_.block_tables[i * rows_.max_blocks + length / size];
      slots_[i] = block * size + length % size;
      seq_lens_[i] = static_cast<int32_t>(length + 1);
    }
  });
}

void DecodeProgram::Step::embed() {
  const int64_t dim = w_.hidden;
  dispatch(w_.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(count_, kElementsPerThread / dim + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* from = static_cast<const T*>(w_.embedding) + rows_.tokens[i] * dim;
        T* to = static_cast<T*>(residual_) + i * dim;
        combine(to, from, from, dim, [&](Vec v, Vec) { return v * w_.embedding_scale; });
        if (w_.position_embedding == nullptr) continue;
        const int64_t place = rows_.lengths[i] + w_.position_offset;
        const T* position = static_cast<const T*>(w_.position_embedding) + place * dim;
        combine(to, to, position, dim, [](Vec v, Vec p) { return v + p; });
      }
    });
  });
  if (w_.embedding_norm.weight) norm(w_.embedding_norm, residual_, residual_, nullptr);
}

// From x_, the normed residual, to the next layer's, or to the last hidden state.
void DecodeProgram::Step::layer(size_t index) {
  const LayerWeights& layer = w_.layers[index];
  attend(layer, cache_[index]);  // leaves its result in attended_
  enter(kRest);
  on_own_rows([&] {
    if (w_.parallel_residual) {
      norm(layer.mlp_norm, x_, residual_, nullptr);
      add(residual_, attended_);
    } else {
      norm(layer.mlp_norm, x_, attended_, residual_);
    }
  });
  mlp(layer);  // leaves its result in attended_
  const bool last = index + 1 == w_.layers.size();
  const NormWeights& next = last ? w_.final_norm : w_.layers[index + 1].attention_norm;
  on_own_rows([&] { norm(next, x_, attended_, residual_); });
}

template <typename Body>
void DecodeProgram::Step::on_own_rows(const Body& body) {
  if (!own_rows_) return body();
  cpu::AloneScope alone;
  body();
}

void DecodeProgram::Step::attend(const LayerWeights& layer, const LayerCache& cache) {
  multiply(layer.qkv, wide_, x_, nullptr);
  enter(kAttention);
  RopeAndStoreKv r{};
  r.q = inner_;
  r.k_cache = cache.keys;
  r.v_cache = cache.values;
  r.qkv = wide_;
  r.bias = layer.qkv.bias;
  r.q_norm = layer.query_norm;
  r.k_norm = layer.key_norm;
  r.cos_sin = w_.cos_sin;
  r.positions = rows_.lengths;
  r.slot_mapping = slots_;
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
  a.out = wide_;
  a.q = inner_;
  a.k_cache = cache.keys;
  a.v_cache = cache.values;
  a.seq_lens = seq_lens_;
  a.workspace = workspace_;
  a.window = layer.window;
  cpu::paged_attention(a, nullptr);
  multiply(layer.attention_output, attended_, wide_, layer.attention_output.bias);
  if (layer.attention_output_norm.weight) {
    norm(layer.attention_output_norm, attended_, attended_, nullptr);
  }
}

void DecodeProgram::Step::mlp(const LayerWeights& layer) {
  const int64_t dim = layer.mlp_down.in_dim;
  if (w_.gated && layer.mlp_up.adapters.empty() && !layer.mlp_up.transposed) {
    multiply_gated(layer.mlp_up, dim);
  } else {
    multiply(layer.mlp_up, wide_, x_, layer.mlp_up.bias);
    enter(kRest);
    if (w_.gated) {
      cpu::activation_and_mul(inner_, wide_, count_, dim, w_.activation, w_.dtype, nullptr);
    } else {
      cpu::bias_activation(inner_, wide_, nullptr, count_, dim, w_.activation, w_.dtype, nullptr);
    }
  }
  multiply(layer.mlp_down, attended_, inner_, layer.mlp_down.bias);
  enter(kRest);
  if (layer.mlp_output_norm.weight) norm(layer.mlp_output_norm, attended_, attended_, nullptr);
}

// inner_ = activation(x gate^T) * (x up^T): each member has some columns of both, so that the
// activation waits for nobody. Its products lie together in wide_, [count, 2, columns].
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
    unsigned char* products = static_cast<unsigned char*>(wide_) + 2 * count_ * begin * size;
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = half * dim + begin;
      cpu::Linear part = product(both, products + half * width * size, x_, at(both.bias, row));
      part.weight = at(both.weight, row * both.in_dim);
      part.out_dim = width;
      part.out_stride = 2 * width;
      cpu::linear(part);
    }
    for (int64_t i = 0; i < count_; ++i) {
      unsigned char* out = static_cast<unsigned char*>(inner_) + (i * dim + begin) * size;
      cpu::activation_and_mul(out, products + 2 * i * width * size, 1, width, w_.activation,
                              w_.dtype, nullptr);
    }
  });
}

// Logits, capped, with the stop tokens out of reach in the first steps.
void DecodeProgram::Step::predict() {
  multiply(w_.head, logits_, x_, w_.head.bias);
  enter(kSampling);
  const bool early = w_.final_softcap != 0.f || rows_.min_new_tokens > 0;
  if (!early) return;
  dispatch(w_.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(count_, kElementsPerThread / w_.vocab + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* logits = static_cast<T*>(logits_) + i * w_.vocab;
        const float cap = w_.final_softcap;
        if (cap != 0.f) {
          combine(logits, logits, logits, w_.vocab,
                  [&](Vec v, Vec) { return cap * cpu::tanh(v / cap); });
        }
        if (rows_.steps[i] >= rows_.min_new_tokens) continue;
        for (int64_t stop : rows_.stop_tokens) {
          if (stop < w_.vocab) logits[stop] = cpu::from_float<T>(-__builtin_inff());
        }
      }
    });
  });
}

void DecodeProgram::Step::sample() {
  Sample s{};
  s.tokens = sampled_;
  s.logprobs = logprobs_;
  s.truncated_logprobs = truncated_;
  s.logits = logits_;
  s.temperature = rows_.temperature;
  s.top_k = rows_.top_k;
  s.top_p = rows_.top_p;
  s.min_p = rows_.min_p;
  s.seeds = rows_.seeds;
  s.positions = rows_.steps;
  s.repetition_penalty = rows_.seen ? rows_.repetition_penalty : nullptr;
  s.seen = rows_.seen;
  s.rows = count_;
  s.vocab = w_.vocab;
  s.dtype = w_.dtype;
  cpu::sample(s, nullptr);
}

void DecodeProgram::Step::advance() {
  enter(kRest);
  parallel_for(count_, count_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = rows_.indices[i], place = index * rows_.max_new_tokens + rows_.steps[i];
      rows_.out_tokens[place] = rows_.tokens[i] = sampled_[i];
      rows_.out_logprobs[place] = logprobs_[i];
      rows_.out_truncated[place] = truncated_[i];
      rows_.out_lengths[index] = ++rows_.steps[i];
      ++rows_.lengths[i];
      if (rows_.seen) rows_.seen[i * w_.vocab + sampled_[i]] = 1;
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
      combine(to, to, static_cast<const T*>(x) + begin, end - begin,
              [](Vec a, Vec b) { return a + b; });
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
    down.out = low_;
    down.weight = adapter.a;
    down.bias = nullptr;
    down.out_dim = down.out_stride = adapter.rank;
    down.transposed = false;
    cpu::linear(down);
    cpu::Linear up = down;
    up.out = out;
    up.x = low_;
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
