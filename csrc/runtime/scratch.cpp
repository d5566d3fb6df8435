#include "runtime/scratch.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "runtime/step.h"

namespace he::runtime {
namespace {

// Elements of the residual up to which every member has its own.
constexpr int64_t kOwnElements = 32768;

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

}  // namespace

bool has_own_rows(const DecoderWeights& weights, int64_t count) {
  return count * weights.hidden <= kOwnElements;
}

Scratch::Scratch(const DecoderWeights& weights, const DecodeRows& rows, int64_t count,
                 int64_t member, unsigned char* buffer) {
  Pieces pieces(buffer);
  const int64_t row = count * element_size(weights.dtype);
  wide = pieces.take(row * widest(weights));
  inner = pieces.take(row * widest(weights));
  attended = pieces.take(row * weights.hidden);
  low = pieces.take(row * most_rank(weights));
  logits = pieces.take(row * weights.vocab);
  slots = pieces.take<int64_t>(count * 8);
  sampled = pieces.take<int64_t>(count * 8);
  seq_lens = pieces.take<int32_t>(count * 4);
  logprobs = pieces.take<float>(count * 4);
  truncated = pieces.take<float>(count * 4);
  const int64_t floats = cpu::paged_attention_workspace(attention_args(weights, rows, count));
  workspace = pieces.take<float>(floats * 4);
  for (int64_t i = 0; i <= (has_own_rows(weights, count) ? member : 0); ++i) {
    residual = pieces.take(row * weights.hidden);
    x = pieces.take(row * weights.hidden);
  }
  end = pieces.end();
}

}  // namespace he::runtime
