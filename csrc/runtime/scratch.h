// The memory between the kernels of a decode step.
#pragma once

#include "runtime/decode.h"

namespace he::runtime {

inline int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether each member of a team keeps the residual itself: what is soon done is done by all of
// them, which is faster than to wait for one.
bool has_own_rows(const DecoderWeights& weights, int64_t count);

// Pointers into one buffer that a team shares; but for the first two, all members have the same.
struct Scratch {
  void *residual, *x;                            // [count, hidden]
  void *wide, *inner, *attended, *low, *logits;  // [count, ...]
  int64_t *slots, *sampled;                      // [count]
  int32_t* seq_lens;                             // [count]
  float *logprobs, *truncated;                   // [count]
  float* workspace;                              // of the attention
  int64_t end;                                   // address behind the last piece

  // Of a member with this index.
  Scratch(const DecoderWeights& weights, const DecodeRows& rows, int64_t count, int64_t member,
          unsigned char* buffer);

  // What a team of so many needs.
  static int64_t bytes(const DecoderWeights& weights, const DecodeRows& rows, int64_t count,
                       int64_t members) {
    return Scratch(weights, rows, count, members - 1, nullptr).end + 64;  // aligned within
  }
};

}  // namespace he::runtime
