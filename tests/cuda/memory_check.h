// The families of memory_check.cu, each on all of its kernels' paths. `quick` leaves out the sizes
// that a slow tool would spend minutes on.
#pragma once

#include "kernels.h"

namespace he::cuda {

void check_attention(DType dtype, bool quick);
void check_linear(DType dtype, bool quick);

}  // namespace he::cuda
