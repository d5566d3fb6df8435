// The linear kernel of the CPU with all that it can do; `kernels.h` has what every device has.
#pragma once

#include "kernels.h"

namespace he::cpu {

// out (+)= scale * x weight^T + bias
struct Linear {
  void* out;           // [rows, out_dim], rows out_stride apart
  const void* x;       // [rows, in_dim]
  const void* weight;  // [out_dim, in_dim], or if transposed [in_dim, out_dim]
  const void* bias;    // [out_dim] or null
  int64_t rows, out_dim, in_dim, out_stride;
  float scale;
  bool accumulate, transposed;
  DType dtype;
};

void linear(const Linear& args);

}  // namespace he::cpu
