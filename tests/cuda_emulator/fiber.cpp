#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#ifndef __x86_64__
#error "the emulator switches stacks in x86-64 assembly"
#endif

namespace he::emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kCacheLine = 64;

// The registers that a function must preserve: rbp, rbx, r12 to r15.
constexpr int kSavedRegisters = 6;

// Where the scheduler stands while a fiber runs. Only one launch runs at a time.
void* scheduler_stack_pointer;
SanitizerContext scheduler_context;

// Saves the preserved registers on this stack, stores its pointer at `*save`, and goes on where
// the other stack was left. ucontext would do the same with two system calls, ten times slower.
__attribute__((naked, noinline)) void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
  asm volatile(
      "pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}

}  // namespace

Fiber::Fiber() {
  void* mapping = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<unsigned char*>(mapping);
  // Stacks grow down: an overflow hits this page instead of another thread's variables.
  mprotect(mapping_, kGuardBytes, PROT_NONE);
  stack_ = mapping_ + kGuardBytes;
  context_.stack_bottom = stack_;
  context_.stack_bytes = kStackBytes;
}

Fiber::~Fiber() { munmap(mapping_, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)(), int offset) {
  renew_fiber(context_);
  constexpr int kOffsets = 60;
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes - offset % kOffsets * kCacheLine);
  *--top = nullptr;  // the return address of `entry`, also what aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::resume() {
  adopt_current_stack(scheduler_context);
  before_switch(scheduler_context, context_);
  switch_stack(&scheduler_stack_pointer, stack_pointer_);
  SanitizerContext left;
  after_switch(scheduler_context, left);
}

void Fiber::suspend() {
  before_switch(context_, scheduler_context);
  switch_stack(&stack_pointer_, scheduler_stack_pointer);
  after_switch(context_, scheduler_context);
}

void Fiber::announce() { after_switch(context_, scheduler_context); }

}  // namespace he::emulator
