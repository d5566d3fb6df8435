// What AddressSanitizer and ThreadSanitizer must be told about fibers; nothing in a plain build.
//
// For ThreadSanitizer every fiber is a thread of its own, and switching orders nothing: only
// barriers and collectives do, so that it reports the races of the kernel. The runtime itself is
// compiled without -fsanitize=thread and with HE_EMULATOR_TSAN, which keeps its own accesses out.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef HE_EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
#endif

namespace he::emulator {

// The sanitizers' view of one stack: a fiber's, or the one that the scheduler runs on.
struct SanitizerContext {
  const void* stack_bottom = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// On the old stack, right before switching from it.
inline void before_switch([[maybe_unused]] SanitizerContext& from,
                          [[maybe_unused]] const SanitizerContext& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#ifdef HE_EMULATOR_TSAN
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
}

// On the new stack, right after; notes the bounds of the stack that was left.
inline void after_switch([[maybe_unused]] SanitizerContext& now,
                         [[maybe_unused]] SanitizerContext& left) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(now.fake_stack, &left.stack_bottom, &left.stack_bytes);
#endif
}

// Before a fiber starts on a stack that an earlier one may have abandoned half-way.
inline void renew_fiber([[maybe_unused]] SanitizerContext& context) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(context.stack_bottom, context.stack_bytes);
  context.fake_stack = nullptr;
#endif
#ifdef HE_EMULATOR_TSAN
  if (context.tsan_fiber != nullptr) __tsan_destroy_fiber(context.tsan_fiber);
  context.tsan_fiber = __tsan_create_fiber(0);
#endif
}

inline void adopt_current_stack([[maybe_unused]] SanitizerContext& context) {
#ifdef HE_EMULATOR_TSAN
  context.tsan_fiber = __tsan_get_current_fiber();
#endif
}

// What one thread did before `publish` happened before what another does after `observe`.
inline void publish([[maybe_unused]] void* event) {
#ifdef HE_EMULATOR_TSAN
  __tsan_release(event);
#endif
}

inline void observe([[maybe_unused]] void* event) {
#ifdef HE_EMULATOR_TSAN
  __tsan_acquire(event);
#endif
}

}  // namespace he::emulator
