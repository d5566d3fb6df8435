// Row ranges over torch's own OpenMP threads, or over a team that is together already.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

namespace he::cpu {

// What the calling thread has waited in barriers, beyond their spinning.
inline thread_local std::chrono::steady_clock::duration waited{};

// Threads that call the same launchers with the same arguments, one after another: each does its
// share, and a barrier after it stands in for the end of a parallel region, without waking anyone.
// So launchers may write to shared memory only inside of parallel_for and parallel_tasks.
class Team {
 public:
  // `configured` threads would there be on a machine with nothing else to do.
  Team(int size, int configured) : size_(size), configured_(configured) {}

  int size() const { return size_; }
  int configured() const { return configured_; }

  // Spins for some microseconds, then lets others run: a thread that is missing may need this core.
  void barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      pause();
    }
    const auto start = std::chrono::steady_clock::now();
    while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
    waited += std::chrono::steady_clock::now() - start;
  }

 private:
  static constexpr int kSpins = 2000;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int size_, configured_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

// What the calling thread is in its team; no team outside of one.
struct Membership {
  Team* team = nullptr;
  int index = 0;
};

inline thread_local Membership membership;

// Makes the calling thread a member for the scope.
class MembershipScope {
 public:
  explicit MembershipScope(Membership inside) : before_(membership) { membership = inside; }
  ~MembershipScope() { membership = before_; }
  MembershipScope(const MembershipScope&) = delete;
  MembershipScope& operator=(const MembershipScope&) = delete;

 private:
  const Membership before_;
};

// How many threads there are to have. A result may depend on it, and not on the team's size, which
// depends on what else the machine does.
inline int configured_threads() {
  return membership.team ? membership.team->configured() : omp_get_max_threads();
}

// For the scope, launchers run on the calling thread alone, and nobody waits for anybody.
class AloneScope {
 public:
  AloneScope() : scope_({&team_, 0}) {}

 private:
  Team team_{1, configured_threads()};
  MembershipScope scope_;
};

// How many threads a launcher would get.
inline int64_t available_threads() {
  return membership.team ? membership.team->size() : omp_get_max_threads();
}

// Runs body(index, size) on each member of the calling thread's team, of which at most `most` are
// wanted, or of a new one.
template <typename Body>
void run_team(int64_t most, const Body& body) {
  if (Team* team = membership.team) {
    const int index = membership.index;
    const int size = static_cast<int>(std::min<int64_t>(team->size(), most));
    {
      AloneScope alone;
      if (index < size) body(index, size);
    }
    return team->barrier();
  }
  const int size = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), most));
  if (size <= 1 || omp_in_parallel()) return body(0, 1);
#pragma omp parallel num_threads(size)
  body(omp_get_thread_num(), omp_get_num_threads());
}

// Calls body(begin, end) for disjoint ranges that cover [0, count). Runs serially when there are
// fewer than two grains: waking a thread costs more than a small op.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const int64_t most = std::max<int64_t>(1, count / std::max<int64_t>(1, grain));
  run_team(most, [&](int64_t index, int64_t size) {
    const int64_t begin = count * index / size, end = count * (index + 1) / size;
    if (begin < end) body(begin, end);
  });
}

// Calls body(next) on at most `threads` threads; next() hands out each index of [0, count) once, in
// order, then -1. For tasks of uneven length: whoever is free takes the next one, except in a team,
// which has no counter to share and deals them out.
template <typename Body>
void parallel_tasks(int64_t count, int64_t threads, const Body& body) {
  std::atomic<int64_t> counter{0};
  const bool dealt = membership.team != nullptr;
  run_team(std::max<int64_t>(1, std::min(count, threads)), [&](int64_t index, int64_t size) {
    int64_t own = index - size;
    body([&] {
      const int64_t task = dealt ? own += size : counter.fetch_add(1, std::memory_order_relaxed);
      return task < count ? task : -1;
    });
  });
}

}  // namespace he::cpu
