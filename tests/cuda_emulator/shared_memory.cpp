#include "shared_memory.h"

#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "scheduler.h"

namespace he::cuda {
extern thread_local unsigned char smem_raw[];
alignas(1024) thread_local unsigned char smem_raw[emulator::kDynamicArrayBytes];
}  // namespace he::cuda

namespace he::emulator {
namespace {

constexpr int kPoison = 0xff;

using ArrayAddress = unsigned char* (*)();

std::vector<ArrayAddress>& dynamic_arrays() {
  static std::vector<ArrayAddress> arrays;
  return arrays;
}

const bool registered = register_dynamic_array([] { return &cuda::smem_raw[0]; });

struct Range {
  unsigned char* begin = nullptr;
  unsigned char* end = nullptr;
};

// The zero-initialised thread-locals of the library that `smem_raw` lies in. An initialised one
// cannot be shared memory: CUDA forbids initialisers there.
Range find_thread_locals() {
  Range range;
  const auto visit = [](dl_phdr_info* info, size_t, void* result) {
    auto* tls = static_cast<unsigned char*>(info->dlpi_tls_data);
    if (tls == nullptr) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const ElfW(Phdr)& segment = info->dlpi_phdr[i];
      if (segment.p_type != PT_TLS) continue;
      const Range found{tls + segment.p_filesz, tls + segment.p_memsz};
      if (found.begin > cuda::smem_raw || cuda::smem_raw >= found.end) continue;
      *static_cast<Range*>(result) = found;
      return 1;
    }
    return 0;
  };
  if (dl_iterate_phdr(visit, &range) == 0) {
    std::fputs("cuda_emulator: cannot find the thread-local segment of this library\n", stderr);
    std::abort();
  }
  return range;
}

// Every OS thread has its own copy of the segment, laid out alike.
Range thread_locals() {
  static const Range first = find_thread_locals();
  static unsigned char* const anchor = cuda::smem_raw;
  const ptrdiff_t shift = cuda::smem_raw - anchor;
  return {first.begin + shift, first.end + shift};
}

}  // namespace

bool register_dynamic_array(unsigned char* (*address)()) {
  dynamic_arrays().push_back(address);
  return true;
}

void poison_shared_memory(size_t dynamic_bytes) {
  std::vector<unsigned char*> arrays;
  for (ArrayAddress address : dynamic_arrays()) arrays.push_back(address());
  std::sort(arrays.begin(), arrays.end());
  const Range all = thread_locals();
  unsigned char* begin = all.begin;
  for (unsigned char* array : arrays) {  // the static variables lie between the dynamic arrays
    std::memset(begin, kPoison, array - begin);
    std::memset(array, kPoison, dynamic_bytes + kRedZoneBytes);
    begin = array + kDynamicArrayBytes;
  }
  std::memset(begin, kPoison, all.end - begin);
}

std::string shared_memory_overrun(size_t dynamic_bytes) {
  for (ArrayAddress address : dynamic_arrays()) {
    const unsigned char* end = address() + dynamic_bytes;
    const auto clean = [](unsigned char byte) { return byte == kPoison; };
    const auto* written = std::find_if_not(end, end + kRedZoneBytes, clean);
    if (written == end + kRedZoneBytes) continue;
    return "a thread wrote byte " + std::to_string(written - address()) + " of " +
           std::to_string(dynamic_bytes) + " bytes of dynamic shared memory";
  }
  return "";
}

bool in_shared_memory(const void* address) {
  const Range all = thread_locals();
  return all.begin <= address && address < all.end;
}

}  // namespace he::emulator
