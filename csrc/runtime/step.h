// One decode step, as every member of a team calls it.
#pragma once

#include <chrono>

#include "cpu/linear.h"
#include "runtime/decode.h"

namespace he::runtime {

class DecodeProgram::Step {
 public:
  Step(const DecoderWeights& weights, const DecodeRows& rows, const std::vector<LayerCache>& cache,
       int64_t count, unsigned char* scratch, std::array<double, kParts>* seconds);

  static int64_t scratch_bytes(const DecoderWeights& weights, const DecodeRows& rows, int64_t count,
                               int64_t threads);

  void run();

 private:
  void place();
  void embed();
  void layer(size_t index);
  void attend(const LayerWeights& layer, const LayerCache& cache);
  void mlp(const LayerWeights& layer);
  void predict();
  void sample();
  void advance();

  void norm(const NormWeights& norm, void* out, const void* x, void* residual);
  void add(void* sum, const void* x);
  void multiply_gated(const LinearWeights& both, int64_t dim);
  template <typename Body>
  void on_own_rows(const Body& body);
  cpu::Linear product(const LinearWeights& linear, void* out, const void* x, const void* bias);
  void multiply(const LinearWeights& linear, void* out, const void* x, const void* bias);

  // Times what follows as `part`, on the member that keeps the time.
  void enter(Part part);

  const DecoderWeights& w_;
  const DecodeRows& rows_;
  const std::vector<LayerCache>& cache_;
  const int64_t count_;
  std::array<double, kParts>* seconds_;
  Part part_ = kRest;
  std::chrono::steady_clock::time_point since_;

  // Whether each member keeps residual_ and x_ itself: what is soon done is done by all of them,
  // which is faster than to wait for one.
  const bool own_rows_;

  // Scratch; but for those two it is shared by the team.
  void *residual_, *x_, *wide_, *inner_, *attended_, *low_, *logits_;  // [count, ...]
  int64_t *slots_, *sampled_;                                          // [count]
  int32_t* seq_lens_;                                                  // [count]
  float *logprobs_, *truncated_, *workspace_;
  int64_t scratch_end_;
};

}  // namespace he::runtime
