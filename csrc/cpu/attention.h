// Two ways to run one attention task. RowAttention, for few rows: dot products of a row with kLanes
// keys at once, a lone row reading the storage type as it is. TileAttention, for many rows: SIMD
// lanes are rows, keys and values are broadcast scalars, and nothing is ever reduced across lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/math.h"
#include "cpu/tile.h"
#include "cpu/vec.h"

namespace he::cpu {

constexpr float kMinusInfinity = -__builtin_inff();

// `tokens` queries of one sequence and kv head, the first at sequence position `position`, over the
// keys [first_key, last_key). With `partial` the rows' states go there and not to the output:
// maximum, sum and unnormalised output of each, [group, 2 + head_dim].
struct AttentionTask {
  int64_t sequence, token, tokens, position, kv_head, first_key, last_key;
  float* partial;
};

// Row r of a task is token r / group and query head r % group of its kv head.
template <typename T>
T* output_row(const PagedAttention& a, const AttentionTask& task, int64_t row) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t head = task.kv_head * group + row % group;
  return static_cast<T*>(a.out) + ((task.token + row / group) * a.num_heads + head) * a.head_dim;
}

template <typename T>
const T* query_row(const PagedAttention& a, const AttentionTask& task, int64_t row) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t head = task.kv_head * group + row % group;
  return static_cast<const T*>(a.q) +
         ((task.token + row / group) * a.num_heads + head) * a.head_dim;
}

// A row without a key is zero.
template <typename T>
void write_row(T* out, const float* values, int64_t stride, int64_t dim, float total) {
  const float scale = total == 0.f ? 0.f : 1.f / total;
  for (int64_t i = 0; i < dim; ++i) out[i] = from_float<T>(values[i * stride] * scale);
}

// Calls body(keys, values, position, count) for the runs of consecutive cached rows of
// [begin, end), `position` being that of the first.
template <typename T, typename Body>
void for_each_run(const PagedAttention& a, const AttentionTask& task, int64_t begin, int64_t end,
                  const Body& body) {
  const int32_t* table = a.block_tables + task.sequence * a.max_blocks;
  while (begin < end) {
    const int64_t offset = begin % a.block_size;
    const int64_t count = std::min(a.block_size - offset, end - begin);
    const int64_t block = table[begin / a.block_size];
    const int64_t row = (block * a.num_kv_heads + task.kv_head) * a.block_size + offset;
    body(static_cast<const T*>(a.k_cache) + row * a.head_dim,
         static_cast<const T*>(a.v_cache) + row * a.head_dim, begin, count);
    begin += count;
  }
}

// The most rows that RowAttention takes on: with more, the other way has less to do.
constexpr int64_t kMostRows = 8;

inline bool prefers_tiles(const PagedAttention& a, const AttentionTask& task) {
  const int64_t rows = task.tokens * (a.num_heads / a.num_kv_heads);
  return rows > kMostRows || task.tokens > 1 || a.head_dim % kLanes != 0;
}

// ---- few rows -----------------------------------------------------------------------------------

// One token; head_dim is a multiple of kLanes.
template <typename T>
class RowAttention {
 public:
  explicit RowAttention(const PagedAttention& args)
      : a_(args), group_(args.num_heads / args.num_kv_heads) {}

  void run(const AttentionTask& task) {
    task_ = &task;
    load_queries();
    for (int64_t begin = task.first_key; begin < task.last_key; begin += kTileKeys) {
      const int64_t end = std::min(begin + kTileKeys, task.last_key);
      find_runs(begin, end);
      for (size_t r = 0; r + 1 < runs_.size(); ++r) {
        const bool last = r + 2 == runs_.size();
        score(runs_[r], runs_[r].position - begin, last ? runs_[0].values : runs_[r + 1].keys);
      }
      for (int64_t g = 0; g < group_; ++g) soften(g, end - begin);
      for (size_t r = 0; r + 1 < runs_.size(); ++r) {
        const bool last = r + 2 == runs_.size();
        accumulate(runs_[r], runs_[r].position - begin,
                   last ? runs_[r + 1].keys : runs_[r + 1].values);
      }
    }
    finish();
  }

 private:
  static constexpr int64_t kTileKeys = 128;

  struct Run {
    const T *keys, *values;
    int64_t position, count;
  };

  // The runs of a tile, then the one that the next tile begins with, or nowhere: memory that lies
  // in pages has no pattern for the hardware to see, so the next run is fetched while one is in
  // use.
  void find_runs(int64_t begin, int64_t end) {
    runs_.clear();
    const auto add = [&](const T* keys, const T* values, int64_t position, int64_t count) {
      runs_.push_back({keys, values, position, count});
    };
    for_each_run<T>(a_, *task_, begin, end, add);
    if (end < task_->last_key) {
      for_each_run<T>(a_, *task_, end, end + 1, add);
    } else {
      runs_.push_back(runs_.back());
    }
  }

  void load_queries() {
    q_.resize(group_ * a_.head_dim);
    scores_.resize(group_ * kTileKeys);
    out_.assign(group_ * a_.head_dim, 0.f);
    most_.assign(group_, kMinusInfinity);
    total_.assign(group_, 0.f);
    for (int64_t g = 0; g < group_; ++g) {
      const T* q = query_row<T>(a_, *task_, g);
      float* wide = q_.data() + g * a_.head_dim;
      for (int64_t i = 0; i < a_.head_dim; i += kLanes) store(wide + i, load(q + i) * a_.scale);
    }
  }

  // kLanes keys and up to four queries at once: keys are loaded once for all of these, and their
  // products are reduced together.
  void score(const Run& run, int64_t place, const T* next) {
    const int64_t steps = (run.count + kLanes - 1) / kLanes;
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t j = step * kLanes, here = std::min<int64_t>(kLanes, run.count - j);
      for (int64_t g = 0; g < group_;) {
        Vec dots[4];
        const int64_t shift = j * a_.head_dim;
        const int64_t queries = dot_queries(dots, g, run.keys + shift, here, next + shift);
        for (int64_t i = 0; i < queries; ++i) {
          store_partial(scores_.data() + (g + i) * kTileKeys + place + j,
                        biased(dots[i], run.position + j, g + i), here);
        }
        g += queries;
      }
    }
  }

  // How many of the queries from g on were taken.
  int64_t dot_queries(Vec* dots, int64_t g, const T* keys, int64_t count, const T* next) const {
    const float* q = q_.data() + g * a_.head_dim;
    if (group_ - g >= 4) return dot_each<4>(dots, q, keys, count, next, a_.head_dim), 4;
    if (group_ - g >= 2) return dot_each<2>(dots, q, keys, count, next, a_.head_dim), 2;
    return dot_each<1>(dots, q, keys, count, next, a_.head_dim), 1;
  }

  Vec biased(Vec scores, int64_t position, int64_t g) const {
    if (a_.softcap > 0.f) scores = a_.softcap * tanh(scores * (1.f / a_.softcap));
    if (a_.alibi_slopes == nullptr) return scores;
    Vec distance;
    for (int i = 0; i < kLanes; ++i) distance[i] = position + i - task_->position;
    return scores + a_.alibi_slopes[task_->kv_head * group_ + g] * distance;
  }

  // Scores of a tile become weights; what was summed so far is rescaled to the new maximum.
  void soften(int64_t g, int64_t count) {
    float* scores = scores_.data() + g * kTileKeys;
    std::fill(scores + count, scores + (count + kLanes - 1) / kLanes * kLanes, kMinusInfinity);
    Vec most = broadcast(most_[g]), total{};
    for (int64_t i = 0; i < count; i += kLanes) most = max(load(scores + i), most);
    const float new_most = reduce_max(most), shift = new_most == kMinusInfinity ? 0.f : new_most;
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec weights = exp(load(scores + i) - shift);
      total += weights;
      store(scores + i, weights);
    }
    const float decay = most_[g] == kMinusInfinity ? 0.f : std::exp(most_[g] - new_most);
    total_[g] = total_[g] * decay + sum(total);
    most_[g] = new_most;
    float* out = out_.data() + g * a_.head_dim;
    for (int64_t i = 0; i < a_.head_dim; i += kLanes) store(out + i, load(out + i) * decay);
  }

  void accumulate(const Run& run, int64_t place, const T* next) {
    multiply_add(out_.data(), scores_.data() + place, kTileKeys, 1, run.values, next, group_,
                 run.count, a_.head_dim);
  }

  void finish() {
    for (int64_t g = 0; g < group_; ++g) {
      const float* out = out_.data() + g * a_.head_dim;
      if (task_->partial == nullptr) {
        write_row(output_row<T>(a_, *task_, g), out, 1, a_.head_dim, total_[g]);
        continue;
      }
      float* partial = task_->partial + g * (a_.head_dim + 2);
      partial[0] = most_[g];
      partial[1] = total_[g];
      std::copy(out, out + a_.head_dim, partial + 2);
    }
  }

  const PagedAttention& a_;
  const int64_t group_;
  const AttentionTask* task_ = nullptr;
  std::vector<float> q_, scores_, out_, most_, total_;
  std::vector<Run> runs_;
};

// ---- many rows ----------------------------------------------------------------------------------

template <typename T>
class TileAttention {
 public:
  explicit TileAttention(const PagedAttention& args)
      : a_(args), group_(args.num_heads / args.num_kv_heads) {}

  void run(const AttentionTask& task) {
    task_ = &task;
    rows_ = task.tokens * group_;
    width_ = (rows_ + kLanes - 1) / kLanes * kLanes;
    load_queries();
    for_each_run<T>(a_, task, task.first_key, task.last_key,
                    [&](const T* keys, const T* values, int64_t position, int64_t count) {
                      visit(keys, values, position, count);
                    });
    finish();
  }

 private:
  static constexpr int64_t kDepth = 64;

  // Everything is transposed: q_ and out_ are [head_dim, width], scores_ and part_ [block_size,
  // width].
  void load_queries() {
    q_.assign(a_.head_dim * width_, 0.f);
    out_.assign(a_.head_dim * width_, 0.f);
    scores_.resize(a_.block_size * width_);
    part_.resize(a_.block_size * width_);
    wide_.resize(a_.block_size * a_.head_dim);
    most_.assign(width_, kMinusInfinity);
    total_.assign(width_, 0.f);
    positions_.assign(width_, -1.f);
    slopes_.assign(width_, 0.f);
    for (int64_t r = 0; r < rows_; ++r) {
      const T* q = query_row<T>(a_, *task_, r);
      for (int64_t d = 0; d < a_.head_dim; ++d) q_[d * width_ + r] = to_float(q[d]) * a_.scale;
      positions_[r] = static_cast<float>(task_->position + r / group_);
      if (a_.alibi_slopes) slopes_[r] = a_.alibi_slopes[task_->kv_head * group_ + r % group_];
    }
  }

  void visit(const T* keys, const T* values, int64_t position, int64_t count) {
    const int64_t dim = a_.head_dim;
    const float* k = widened(wide_.data(), keys, count * dim);
    score(k, count);
    for (int64_t r = 0; r < width_; r += kLanes) soften(r, position, count);
    const float* v = widened(wide_.data(), values, count * dim);
    multiply_add<float>(out_.data(), v, 1, dim, scores_.data(), nullptr, dim, count, width_);
  }

  // Sums of at most kDepth products, added up: one long chain of additions would round more.
  void score(const float* k, int64_t count) {
    const int64_t size = count * width_;
    for (int64_t d = 0; d < a_.head_dim; d += kDepth) {
      std::vector<float>& sums = d == 0 ? scores_ : part_;
      std::fill(sums.begin(), sums.begin() + size, 0.f);
      multiply_add<float>(sums.data(), k + d, a_.head_dim, 1, &q_[d * width_], nullptr, count,
                          std::min(kDepth, a_.head_dim - d), width_);
      for (int64_t i = 0; d > 0 && i < size; i += kLanes) {
        store(&scores_[i], load(&scores_[i]) + load(&part_[i]));
      }
    }
  }

  // The lanes [r, r + kLanes) of the scores of `count` keys become weights.
  void soften(int64_t r, int64_t first, int64_t count) {
    const Vec position = load(&positions_[r]), slope = load(&slopes_[r]), old = load(&most_[r]);
    Vec most = old;
    for (int64_t j = 0; j < count; ++j) {
      Vec s = load(&scores_[j * width_ + r]);
      if (a_.softcap > 0.f) s = a_.softcap * tanh(s * (1.f / a_.softcap));
      const Vec distance = broadcast(static_cast<float>(first + j)) - position;
      if (a_.alibi_slopes) s += slope * distance;
      VecInt hidden = distance > 0.f;
      if (a_.window > 0) hidden |= distance <= -static_cast<float>(a_.window);
      s = select(hidden, broadcast(kMinusInfinity), s);
      store(&scores_[j * width_ + r], s);
      most = max(s, most);
    }
    const Vec shift = select(most == kMinusInfinity, Vec{}, most);
    Vec total{};
    for (int64_t j = 0; j < count; ++j) {
      const Vec weight = exp(load(&scores_[j * width_ + r]) - shift);
      total += weight;
      store(&scores_[j * width_ + r], weight);
    }
    const Vec decay = exp(old - shift);
    store(&total_[r], load(&total_[r]) * decay + total);
    store(&most_[r], most);
    for (int64_t d = 0; d < a_.head_dim; ++d) {
      store(&out_[d * width_ + r], load(&out_[d * width_ + r]) * decay);
    }
  }

  void finish() {
    for (int64_t r = 0; r < rows_; ++r) {
      if (task_->partial == nullptr) {
        write_row(output_row<T>(a_, *task_, r), &out_[r], width_, a_.head_dim, total_[r]);
        continue;
      }
      float* partial = task_->partial + r * (a_.head_dim + 2);
      partial[0] = most_[r];
      partial[1] = total_[r];
      for (int64_t d = 0; d < a_.head_dim; ++d) partial[2 + d] = out_[d * width_ + r];
    }
  }

  const PagedAttention& a_;
  const int64_t group_;
  const AttentionTask* task_ = nullptr;
  int64_t rows_ = 0, width_ = 0;  // width: rows rounded up to whole vectors
  std::vector<float> q_, out_, scores_, part_, wide_, most_, total_, positions_, slopes_;
};

}  // namespace he::cpu
