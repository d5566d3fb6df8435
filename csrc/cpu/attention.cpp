// Attention over the paged cache, decode and prefill alike: each query token of each kv head walks
// the sequence's blocks with an online softmax (arXiv 2205.14135) for its whole group of query
// heads, so that keys and values are read once a group. Work items are (token, kv head) pairs.
#include <cmath>
#include <vector>

#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace he::cpu {
namespace {

// Reading about this many cached elements is worth a thread.
constexpr int64_t kElementsPerThread = 16384;
constexpr float kMinusInfinity = -__builtin_inff();

template <typename T>
float dot(const float* a, const T* b, int64_t dim) {
  Vec total{};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) total += load(a + i) * load(b + i);
  float result = sum(total);
  for (; i < dim; ++i) result += a[i] * to_float(b[i]);
  return result;
}

// out = out * decay + weights[0..count) * rows, where row j starts at `values + j * dim`.
template <typename T>
void accumulate(float* out, float decay, const float* weights, const T* values, int64_t count,
                int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    Vec total = load(out + i) * decay;
    for (int64_t j = 0; j < count; ++j) total += weights[j] * load(values + j * dim + i);
    store(out + i, total);
  }
  for (; i < dim; ++i) {
    float total = out[i] * decay;
    for (int64_t j = 0; j < count; ++j) total += weights[j] * to_float(values[j * dim + i]);
    out[i] = total;
  }
}

// exp(scores - most) in place; returns the sum.
float exponentiate(float* scores, int64_t count, float most) {
  Vec total{};
  for_each_vec(
      count,
      [&](int64_t i) {
        const Vec e = exp(load(scores + i) - most);
        store(scores + i, e);
        total += e;
      },
      [&](int64_t i, int64_t rest) {
        const Vec e = exp(load_partial(scores + i, rest, kMinusInfinity) - most);
        store_partial(scores + i, e, rest);
        total += e;
      });
  return sum(total);
}

// The state of one query head.
struct OnlineSoftmax {
  float most = kMinusInfinity, total = 0.f;
};

struct Query {
  int64_t sequence, position;  // position of the token in its sequence
};

template <typename T>
class GroupAttention {
 public:
  explicit GroupAttention(const PagedAttention& args)
      : a_(args),
        group_(args.num_heads / args.num_kv_heads),
        q_(group_ * args.head_dim),
        out_(group_ * args.head_dim),
        scores_(args.block_size),
        states_(group_) {}

  void run(int64_t token, Query query, int64_t kv_head) {
    load_queries(token, kv_head);
    const int64_t keys = query.position + 1;
    const int64_t first = a_.window > 0 ? std::max<int64_t>(0, keys - a_.window) : 0;
    const int32_t* table = a_.block_tables + query.sequence * a_.max_blocks;
    for (int64_t begin = first; begin < keys;) {
      const int64_t offset = begin % a_.block_size;
      const int64_t count = std::min(a_.block_size - offset, keys - begin);
      const int64_t block = table[begin / a_.block_size];
      const int64_t row = (block * a_.num_kv_heads + kv_head) * a_.block_size + offset;
      visit_block(row * a_.head_dim, begin, count, query.position, kv_head);
      begin += count;
    }
    write(token, kv_head);
  }

 private:
  void load_queries(int64_t token, int64_t kv_head) {
    const T* q = static_cast<const T*>(a_.q) +
                 (token * a_.num_heads + kv_head * group_) * a_.head_dim;
    for (int64_t i = 0; i < group_ * a_.head_dim; ++i) {
      q_[i] = to_float(q[i]) * a_.scale;
      out_[i] = 0.f;
    }
    for (OnlineSoftmax& state : states_) state = {};
  }

  // `count` cached keys, the first at sequence position `begin` and element `start` of the cache.
  void visit_block(int64_t start, int64_t begin, int64_t count, int64_t position,
                   int64_t kv_head) {
    const T* keys = static_cast<const T*>(a_.k_cache) + start;
    const T* values = static_cast<const T*>(a_.v_cache) + start;
    for (int64_t g = 0; g < group_; ++g) {
      OnlineSoftmax& state = states_[g];
      const float slope = a_.alibi_slopes ? a_.alibi_slopes[kv_head * group_ + g] : 0.f;
      float most = state.most;
      for (int64_t j = 0; j < count; ++j) {
        float score = dot(q_.data() + g * a_.head_dim, keys + j * a_.head_dim, a_.head_dim);
        if (a_.softcap > 0.f) score = a_.softcap * std::tanh(score / a_.softcap);
        score += slope * static_cast<float>(begin + j - position);
        scores_[j] = score;
        most = score > most || score != score ? score : most;
      }
      const float decay = state.total > 0.f ? std::exp(state.most - most) : 0.f;
      state.total = state.total * decay + exponentiate(scores_.data(), count, most);
      state.most = most;
      accumulate(out_.data() + g * a_.head_dim, decay, scores_.data(), values, count, a_.head_dim);
    }
  }

  void write(int64_t token, int64_t kv_head) {
    T* out = static_cast<T*>(a_.out) + (token * a_.num_heads + kv_head * group_) * a_.head_dim;
    for (int64_t g = 0; g < group_; ++g) {
      const float scale = states_[g].total == 0.f ? 0.f : 1.f / states_[g].total;
      for (int64_t i = 0; i < a_.head_dim; ++i) {
        out[g * a_.head_dim + i] = from_float<T>(out_[g * a_.head_dim + i] * scale);
      }
    }
  }

  const PagedAttention& a_;
  const int64_t group_;  // query heads a kv head
  std::vector<float> q_, out_, scores_;
  std::vector<OnlineSoftmax> states_;
};

// Which sequence each packed token belongs to, and its position there.
std::vector<Query> locate_queries(const PagedAttention& a) {
  std::vector<Query> queries(a.tokens);
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t begin = a.cu_seqlens ? a.cu_seqlens[s] : s;
    const int64_t end = a.cu_seqlens ? a.cu_seqlens[s + 1] : s + 1;
    for (int64_t t = begin; t < end; ++t) queries[t] = {s, a.seq_lens[s] - (end - t)};
  }
  return queries;
}

}  // namespace

void paged_attention(const PagedAttention& args, Stream) {
  const std::vector<Query> queries = locate_queries(args);
  int64_t keys = 0;
  for (const Query& query : queries) keys += query.position + 1;
  const int64_t items = args.tokens * args.num_kv_heads;
  const int64_t elements = 2 * keys * args.head_dim / std::max<int64_t>(1, args.tokens) + 1;
  dispatch(args.dtype, [&](auto t) {
    parallel_for(items, kElementsPerThread / elements + 1, [&](int64_t begin, int64_t end) {
      GroupAttention<decltype(t)> attention(args);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i / args.num_kv_heads;
        attention.run(token, queries[token], i % args.num_kv_heads);
      }
    });
  });
}

}  // namespace he::cpu
