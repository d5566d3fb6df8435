// Kernels are compiled with -fsanitize=alignment,bounds, whose reports arrive here instead of in
// libubsan: a misaligned vector access or an index outside an array of known length, which the GPU
// answers with a fault or with wrong values, ends the launch with an error that names the line.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "block.h"

namespace {

// The compiler's own layouts, as libubsan reads them.
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};

struct TypeMismatch {
  SourceLocation location;
  const void* type;
  unsigned char log_alignment;
  unsigned char kind;
};

struct OutOfBounds {
  SourceLocation location;
  const void* array_type;
  const void* index_type;
};

[[noreturn]] void report(const std::string& problem, const SourceLocation& location) {
  const he::emulator::Site site{location.file, static_cast<int>(location.line)};
  const std::string message = problem + " " + to_string(site);
  if (he::emulator::Block::current().is_running()) he::emulator::fail(message);
  std::fprintf(stderr, "cuda_emulator: host code: %s\n", message.c_str());
  std::abort();
}

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
  char text[64];
  std::snprintf(text, sizeof(text), "address 0x%zx is not %d-byte aligned",
                static_cast<size_t>(address), 1 << data->log_alignment);
  report(text, data->location);
}

void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
  report("array index " + std::to_string(static_cast<intptr_t>(index)) + " is out of bounds",
         data->location);
}

}  // extern "C"
