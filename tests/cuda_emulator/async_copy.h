// Twins of the cp.async functions in csrc/cuda/ptx.cuh.
#pragma once

#include <cstring>

#include "async_copies.h"
#include "scheduler.h"

namespace he::emulator {

// In this header so that it is compiled with the kernels: ThreadSanitizer must see it.
inline void perform(const AsyncCopy& copy) {
  constexpr size_t kBytes = 16;
  if (copy.source == nullptr) {
    std::memset(copy.destination, 0, kBytes);
  } else {
    std::memcpy(copy.destination, copy.source, kBytes);
  }
}

}  // namespace he::emulator

namespace he::cuda {

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  emulator::check_shared_row("cp.async", shared);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulator::fail("cp.async: global address is not 16-byte aligned");
  }
  const emulator::AsyncCopy copy{shared, valid ? global : nullptr};
  if (emulator::settings().async_policy == emulator::AsyncPolicy::kEager) {
    emulator::perform(copy);
  } else {
    emulator::async_copies().issue(copy);
  }
}

inline void cp_async_commit() { emulator::async_copies().commit(); }

template <int kPendingGroups>
void cp_async_wait() {
  emulator::AsyncCopies& copies = emulator::async_copies();
  while (copies.more_than(kPendingGroups)) {
    for (const emulator::AsyncCopy& copy : copies.take_oldest()) emulator::perform(copy);
  }
}

}  // namespace he::cuda
