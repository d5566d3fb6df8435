// What a program does that launches kernels for the tools that watch memory: AddressSanitizer and
// ThreadSanitizer under the emulator, compute-sanitizer on a GPU.
//   PROGRAM FAMILY [quick]
// `quick` leaves out the sizes that a slow tool would spend minutes on.
#pragma once

#include <cstdio>
#include <map>

#include "buffers.h"

#ifdef HE_CUDA_EMULATOR
extern "C" int he_emulator_configure(int order, uint64_t seed, int async_policy);
#endif

namespace he::cuda {

// Launches every kernel of a family, on each of its paths, with elements of a type.
using Family = void (*)(DType dtype, bool quick);

inline int check_memory(int count, char** arguments,
                        const std::map<std::string, Family>& families) {
  const auto family = count < 2 ? families.end() : families.find(arguments[1]);
  if (family == families.end()) {
    std::fprintf(stderr, "usage: %s FAMILY [quick]; families:", arguments[0]);
    for (const auto& known : families) std::fprintf(stderr, " %s", known.first.c_str());
    std::fputs("\n", stderr);
    return 2;
  }
#ifdef HE_CUDA_EMULATOR
  constexpr int kGreedy = 3, kLate = 0;  // one warp as far as it gets, copies as late as they may
  he_emulator_configure(kGreedy, 0, kLate);
#endif
  try {
    const bool quick = count > 2;
    family->second(DType::kBFloat16, quick);
    if (!quick) family->second(DType::kFloat32, quick);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::puts("done");
  return 0;
}

}  // namespace he::cuda
