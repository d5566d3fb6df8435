// A stack of its own and a switch to and from it: one CUDA thread.
#pragma once

#include <cstddef>

#include "sanitizers.h"

namespace he::emulator {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls `entry`, which must never return, on an empty stack. Fibers that run
  // side by side should differ in `offset`, lest their hot frames compete for the same cache sets.
  void start(void (*entry)(), int offset);

  void resume();   // called by the scheduler: runs the fiber until it suspends
  void suspend();  // called on the fiber: returns to resume()

  // The first thing on a fresh stack.
  void announce();

 private:
  unsigned char* mapping_;
  unsigned char* stack_;
  void* stack_pointer_ = nullptr;
  SanitizerContext context_;
};

}  // namespace he::emulator
