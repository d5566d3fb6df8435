// One planted bug as a program, since a sanitizer must own the process:
//   sanitizer_main NAME BROKEN ORDER ASYNC_POLICY
// Prints what was noticed and exits with 1, or with 0 when the answer is right.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "planted_bugs.h"

extern "C" int he_emulator_configure(int order, uint64_t seed, int async_policy);

int main(int count, char** arguments) {
  if (count != 5 ||
      he_emulator_configure(std::atoi(arguments[3]), 0, std::atoi(arguments[4])) != 0) {
    std::fputs("usage: sanitizer_main NAME BROKEN ORDER ASYNC_POLICY\n", stderr);
    return 2;
  }
  const std::string noticed = he::cuda::run_planted_bug(arguments[1], std::atoi(arguments[2]) != 0);
  std::puts(noticed.empty() ? "right" : noticed.c_str());
  return noticed.empty() ? 0 : 1;
}
