// Both ends of a decode step: from a row's token to the residual, and from its last hidden state to
// the next token and what is kept of it.
#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "runtime/step.h"

namespace he::runtime {
namespace {

using cpu::dispatch;
using cpu::parallel_for;
using cpu::Vec;

}  // namespace

// Where each row's token goes in the cache.
void DecodeProgram::Step::place() {
  enter(kRest);
  parallel_for(count_, count_, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t length = rows_.lengths[i], size = rows_.block_size;
      const int64_t block = rows_.block_tables[i * rows_.max_blocks + length / size];
      s_.slots[i] = block * size + length % size;
      s_.seq_lens[i] = static_cast<int32_t>(length + 1);
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
        T* to = static_cast<T*>(s_.residual) + i * dim;
        cpu::map_vecs(to, dim, [&](Vec v) { return v * w_.embedding_scale; }, from);
        if (w_.position_embedding == nullptr) continue;
        const int64_t place = rows_.lengths[i] + w_.position_offset;
        const T* position = static_cast<const T*>(w_.position_embedding) + place * dim;
        cpu::map_vecs(to, dim, [](Vec v, Vec p) { return v + p; }, to, position);
      }
    });
  });
  if (w_.embedding_norm.weight) norm(w_.embedding_norm, s_.residual, s_.residual, nullptr);
}

// Logits, capped, with the stop tokens out of reach in the first steps.
void DecodeProgram::Step::predict() {
  multiply(w_.head, s_.logits, s_.x, w_.head.bias);
  enter(kSampling);
  const bool early = w_.final_softcap != 0.f || rows_.min_new_tokens > 0;
  if (!early) return;
  dispatch(w_.dtype, [&](auto t) {
    using T = decltype(t);
    parallel_for(count_, kElementsPerThread / w_.vocab + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* logits = static_cast<T*>(s_.logits) + i * w_.vocab;
        const float cap = w_.final_softcap;
        if (cap != 0.f) {
          const auto capped = [&](Vec v) { return cap * cpu::tanh(v / cap); };
          cpu::map_vecs(logits, w_.vocab, capped, logits);
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
  s.tokens = s_.sampled;
  s.logprobs = s_.logprobs;
  s.truncated_logprobs = s_.truncated;
  s.logits = s_.logits;
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
      rows_.out_tokens[place] = rows_.tokens[i] = s_.sampled[i];
      rows_.out_logprobs[place] = s_.logprobs[i];
      rows_.out_truncated[place] = s_.truncated[i];
      rows_.out_lengths[index] = ++rows_.steps[i];
      ++rows_.lengths[i];
      if (rows_.seen) rows_.seen[i * w_.vocab + s_.sampled[i]] = 1;
    }
  });
}

}  // namespace he::runtime
