// Twins of CUDA's barriers, warp collectives, atomics and cached loads and stores.
#pragma once

#include "builtin_variables.h"
#include "scheduler.h"

// ---- barriers and fences ------------------------------------------------------------------------

inline void __syncthreads(he::emulator::Site site = he::emulator::Site::here()) {
  he::emulator::barrier("__syncthreads", false, site);
}

inline int __syncthreads_count(int vote, he::emulator::Site site = he::emulator::Site::here()) {
  return he::emulator::barrier("__syncthreads_count", vote != 0, site).in_favour;
}

inline int __syncthreads_or(int vote, he::emulator::Site site = he::emulator::Site::here()) {
  return he::emulator::barrier("__syncthreads_or", vote != 0, site).in_favour > 0;
}

inline int __syncthreads_and(int vote, he::emulator::Site site = he::emulator::Site::here()) {
  const auto votes = he::emulator::barrier("__syncthreads_and", vote != 0, site);
  return votes.in_favour == votes.participants;
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       he::emulator::Site site = he::emulator::Site::here()) {
  he::emulator::exchange("__syncwarp", mask, 0, site);
}

// Blocks run one after another and threads switch only at waits: memory is always in order.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- shuffles -----------------------------------------------------------------------------------

// A source outside the segment of `width` lanes gives the lane its own value.

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              he::emulator::Site site = he::emulator::Site::here()) {
  const auto& all = he::emulator::exchange("__shfl_sync", mask, value, site);
  const int segment = he::emulator::current_lane() & ~(width - 1);
  return all.template from<T>(segment | (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  he::emulator::Site site = he::emulator::Site::here()) {
  const auto& all = he::emulator::exchange("__shfl_xor_sync", mask, value, site);
  const int lane = he::emulator::current_lane();
  const int source = lane ^ lane_mask, segment_end = (lane & ~(width - 1)) + width;
  return all.template from<T>(source < segment_end ? source : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   he::emulator::Site site = he::emulator::Site::here()) {
  const auto& all = he::emulator::exchange("__shfl_down_sync", mask, value, site);
  const int lane = he::emulator::current_lane(), distance = static_cast<int>(delta);
  const bool inside = (lane & (width - 1)) + distance < width;
  return all.template from<T>(inside ? lane + distance : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 he::emulator::Site site = he::emulator::Site::here()) {
  const auto& all = he::emulator::exchange("__shfl_up_sync", mask, value, site);
  const int lane = he::emulator::current_lane(), distance = static_cast<int>(delta);
  const bool inside = (lane & (width - 1)) >= distance;
  return all.template from<T>(inside ? lane - distance : lane);
}

// ---- votes and reductions over the lanes of a mask ----------------------------------------------

namespace he::emulator {

// Combines the values of the lanes in `mask`, lowest first, with `op(so far, value, lane)`.
template <typename R, typename T, typename Op>
R fold_lanes(const char* operation, unsigned mask, T value, Site site, R result, Op op) {
  const Exchange& all = exchange(operation, mask, value, site);
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (mask >> lane & 1) result = op(result, all.from<T>(lane), lane);
  }
  return result;
}

}  // namespace he::emulator

inline unsigned __ballot_sync(unsigned mask, int vote,
                              he::emulator::Site site = he::emulator::Site::here()) {
  return he::emulator::fold_lanes("__ballot_sync", mask, vote != 0, site, 0u,
                                  [](unsigned votes, bool yes, int lane) {
                                    return votes | static_cast<unsigned>(yes) << lane;
                                  });
}

inline int __any_sync(unsigned mask, int vote,
                      he::emulator::Site site = he::emulator::Site::here()) {
  return he::emulator::fold_lanes("__any_sync", mask, vote != 0, site, false,
                                  [](bool any, bool yes, int) { return any || yes; });
}

inline int __all_sync(unsigned mask, int vote,
                      he::emulator::Site site = he::emulator::Site::here()) {
  return he::emulator::fold_lanes("__all_sync", mask, vote != 0, site, true,
                                  [](bool all, bool yes, int) { return all && yes; });
}

template <typename T>
unsigned __match_any_sync(unsigned mask, T value,
                          he::emulator::Site site = he::emulator::Site::here()) {
  return he::emulator::fold_lanes("__match_any_sync", mask, value, site, 0u,
                                  [value](unsigned same, T other, int lane) {
                                    return same | static_cast<unsigned>(other == value) << lane;
                                  });
}

#define HE_EMULATED_REDUCTION(name, T, identity, expression)                                    \
  inline T name(unsigned mask, T value, he::emulator::Site site = he::emulator::Site::here()) { \
    return he::emulator::fold_lanes(#name, mask, value, site, static_cast<T>(identity),         \
                                    [](T a, T b, int) -> T { return expression; });             \
  }
HE_EMULATED_REDUCTION(__reduce_add_sync, unsigned, 0, a + b)
HE_EMULATED_REDUCTION(__reduce_min_sync, unsigned, ~0u, a < b ? a : b)
HE_EMULATED_REDUCTION(__reduce_max_sync, unsigned, 0, a > b ? a : b)
HE_EMULATED_REDUCTION(__reduce_add_sync, int, 0, static_cast<int>(unsigned(a) + unsigned(b)))
HE_EMULATED_REDUCTION(__reduce_min_sync, int, INT32_MAX, a < b ? a : b)
HE_EMULATED_REDUCTION(__reduce_max_sync, int, INT32_MIN, a > b ? a : b)
HE_EMULATED_REDUCTION(__reduce_and_sync, unsigned, ~0u, (a & b))
HE_EMULATED_REDUCTION(__reduce_or_sync, unsigned, 0, (a | b))
HE_EMULATED_REDUCTION(__reduce_xor_sync, unsigned, 0, (a ^ b))
#undef HE_EMULATED_REDUCTION

// ---- atomics: each returns the value before -----------------------------------------------------

namespace he::emulator {

// A real compare-and-swap, so that ThreadSanitizer knows it for an atomic.
template <typename T, typename Op>
T atomic_update(T* address, Op op) {
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = op(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return before;
}

template <typename T>
struct Identity {
  using Type = T;
};

// The value converts to the type behind the pointer, as with CUDA's overloads.
template <typename T>
using Same = typename Identity<T>::Type;

}  // namespace he::emulator

#define HE_EMULATED_ATOMIC(name, expression)                                                    \
  template <typename T>                                                                         \
  T name(T* address, he::emulator::Same<T> value) {                                             \
    return he::emulator::atomic_update(address, [value](T old) -> T { return T(expression); }); \
  }
HE_EMULATED_ATOMIC(atomicAdd, old + value)
HE_EMULATED_ATOMIC(atomicSub, old - value)
HE_EMULATED_ATOMIC(atomicMin, old < value ? old : value)
HE_EMULATED_ATOMIC(atomicMax, old > value ? old : value)
HE_EMULATED_ATOMIC(atomicAnd, (old & value))
HE_EMULATED_ATOMIC(atomicOr, (old | value))
HE_EMULATED_ATOMIC(atomicXor, (old ^ value))
HE_EMULATED_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
HE_EMULATED_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
HE_EMULATED_ATOMIC(atomicExch, (static_cast<void>(old), value))
#undef HE_EMULATED_ATOMIC

template <typename T>
T atomicCAS(T* address, he::emulator::Same<T> expected, he::emulator::Same<T> value) {
  return he::emulator::atomic_update(address,
                                     [&](T old) { return old == expected ? T(value) : old; });
}

// ---- loads and stores with a cache hint ---------------------------------------------------------

#define HE_EMULATED_LOAD(name) \
  template <typename T>        \
  T name(const T* address) {   \
    return *address;           \
  }
HE_EMULATED_LOAD(__ldg)
HE_EMULATED_LOAD(__ldca)
HE_EMULATED_LOAD(__ldcg)
HE_EMULATED_LOAD(__ldcs)
HE_EMULATED_LOAD(__ldlu)
HE_EMULATED_LOAD(__ldcv)
#undef HE_EMULATED_LOAD

#define HE_EMULATED_STORE(name)                        \
  template <typename T>                                \
  void name(T* address, he::emulator::Same<T> value) { \
    *address = value;                                  \
  }
HE_EMULATED_STORE(__stwb)
HE_EMULATED_STORE(__stcg)
HE_EMULATED_STORE(__stcs)
HE_EMULATED_STORE(__stwt)
#undef HE_EMULATED_STORE

[[noreturn]] inline void __trap() { he::emulator::fail("__trap"); }
