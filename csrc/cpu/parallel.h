// Row ranges over torch's own OpenMP threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace he::cpu {

// Calls body(begin, end) for disjoint ranges that cover [0, count). Runs serially when there are
// fewer than two grains: waking a thread costs more than a small op.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const int64_t most = std::max<int64_t>(1, count / std::max<int64_t>(1, grain));
  const int threads = static_cast<int>(std::min<int64_t>(omp_get_max_threads(), most));
  if (threads <= 1 || omp_in_parallel()) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t index = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = count * index / team, end = count * (index + 1) / team;
    if (begin < end) body(begin, end);
  }
}

// Calls body(next) on at most `threads` threads; next() hands out each index of [0, count) once, in
// order and to whoever is free, then -1. For tasks of uneven length.
template <typename Body>
void parallel_tasks(int64_t count, int64_t threads, const Body& body) {
  std::atomic<int64_t> counter{0};
  const auto next = [&] {
    const int64_t index = counter.fetch_add(1, std::memory_order_relaxed);
    return index < count ? index : -1;
  };
  const int team = static_cast<int>(std::min({int64_t{omp_get_max_threads()}, count, threads}));
  if (team <= 1 || omp_in_parallel()) return body(next);
#pragma omp parallel num_threads(team)
  body(next);
}

}  // namespace he::cpu
