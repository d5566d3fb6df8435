// One decode step, as every member of a team calls it.
#pragma once

#include <chrono>

#include "cpu/linear.h"
#include "runtime/decode.h"
#include "runtime/scratch.h"

namespace he::runtime {

// Elements of an elementwise pass that are worth a thread.
constexpr int64_t kElementsPerThread = 16384;

// What is the same for every layer.
PagedAttention attention_args(const DecoderWeights& weights, const DecodeRows& rows, int64_t count);

class DecodeProgram::Step {
 public:
  Step(const DecoderWeights& weights, const DecodeRows& rows, const std::vector<LayerCache>& cache,
       int64_t count, unsigned char* scratch, std::array<double, kParts>* seconds);

  void run();

 private:
  // step_rows.cpp
  void place();
  void embed();
  void predict();
  void sample();
  void advance();

  void layer(size_t index);
  void attend(const LayerWeights& layer, const LayerCache& cache);
  void mlp(const LayerWeights& layer);

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
  const Scratch s_;
  std::array<double, kParts>* seconds_;
  Part part_ = kRest;
  std::chrono::steady_clock::time_point since_;
};

}  // namespace he::runtime
