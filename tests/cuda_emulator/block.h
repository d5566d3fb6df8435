// One thread block on its way from start to end.
#pragma once

#include <vector_types.h>

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "async_copies.h"
#include "fiber.h"
#include "scheduler.h"
#include "turns.h"

namespace he::emulator {

enum class ThreadState { kRunnable, kAtBarrier, kAtCollective, kReturned };

// Where a thread waits: what must match among those that wait together, and what messages say.
struct Wait {
  const char* operation = "";
  unsigned mask = 0;  // of a collective
  Site site;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  ThreadState state = ThreadState::kReturned;
  Wait wait;
  Deposit deposit;
  std::shared_ptr<const Exchange> exchange;
  AsyncCopies async_copies;
};

class Block {
 public:
  static constexpr int kMaxWarps = 32;

  // The block that runs, one at a time in a process.
  static Block& current();

  // Runs the kernel body as every thread of a block; returns what went wrong, or "".
  std::string run(dim3 block_dim, const std::function<void()>& body, Turns& turns);

  BarrierVotes barrier(const Wait& wait, bool vote);
  const Exchange& exchange(const Wait& wait, const Deposit& mine);
  // Both name the calling thread; the second also where it was last seen to wait.
  [[noreturn]] void fail_here(const std::string& message);
  [[noreturn]] void fail_at_wait(const std::string& message);

  bool is_running() const { return running_ >= 0; }
  int lane() const { return running_ % kWarpLanes; }
  Thread& thread() { return *threads_[running_]; }

 private:
  struct Barrier {
    int arrived = 0;
    int in_favour = 0;
    BarrierVotes result{};
    // Which of two events announces it to ThreadSanitizer: a thread that runs ahead to the next
    // barrier must not seem to have synchronised with one that has yet to leave this one.
    int phase = 0;
  };

  static void thread_main();
  void start(dim3 block_dim, const std::function<void()>& body);
  bool take_turns(const std::vector<int>& turns, bool by_warp);
  bool run_warp(int warp);
  bool step(int thread);
  void finish_barrier_if_complete();
  bool all_arrived(int warp, const Wait& wait) const;
  void finish_collective(int warp, unsigned mask);

  [[noreturn]] void fail(const std::string& message);
  std::string deadlock() const;
  std::string describe(int thread) const;

  std::vector<std::unique_ptr<Thread>> threads_;  // grows to the largest block seen
  int size_ = 0;                                  // threads of this block
  int live_ = 0;                                  // of those, not returned
  int running_ = -1;
  Barrier barrier_;
  std::array<unsigned, kMaxWarps> lanes_at_collectives_{};  // one mask a warp
  const std::function<void()>* body_ = nullptr;
  std::string error_;
};

}  // namespace he::emulator
