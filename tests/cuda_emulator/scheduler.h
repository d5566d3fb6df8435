// What the twins of CUDA's built-ins need of the scheduler that runs a thread block.
//
// Each CUDA thread is a fiber. A fiber gives way only where CUDA lets threads wait for each other,
// at barriers and warp collectives; whose turn is next is up to the order in Settings.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace he::emulator {

constexpr int kWarpLanes = 32;

// Whose turn it is. Each order exposes other mistakes; see README.md.
enum class Order : int {
  kForward,  // threads 0, 1, 2, ..., each as far as its next wait
  kReverse,  // the same from the last thread, and the last block, backwards
  kRandom,   // shuffled again for every sweep
  kGreedy,   // one warp, chosen at random, runs until it waits for other warps
};

// When the bytes of a cp.async arrive. The hardware promises only that they are there after the
// wait; a kernel must be right whether they come as early or as late as possible.
enum class AsyncPolicy : int { kLate, kEager };

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 0;
  AsyncPolicy async_policy = AsyncPolicy::kLate;
};

Settings& settings();

// A place in a kernel's source. As a default argument, `here()` is the place of the call.
struct Site {
  const char* file = "";
  int line = 0;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }

  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
};

std::string to_string(const Site& site);  // (file.cu:12)

// Stops the launch with this message, which names the calling thread and the block.
[[noreturn]] void fail(const std::string& message);

int current_lane();

// ---- barriers -----------------------------------------------------------------------------------

struct BarrierVotes {
  int participants;
  int in_favour;
};

// Waits for every thread of the block that has not returned.
BarrierVotes barrier(const char* operation, bool vote, Site site);

// ---- warp collectives ---------------------------------------------------------------------------

// What one lane brings to a collective: any trivially copyable value of up to 64 bytes.
struct alignas(16) Deposit {
  unsigned char bytes[64];
};

// What the lanes of a mask brought.
struct Exchange {
  unsigned mask = 0;
  Deposit deposits[kWarpLanes];

  // The value of a lane, which must have taken part. Hidden from ThreadSanitizer, which would see a
  // race with the lane that frees the exchange.
  template <typename T>
  __attribute__((no_sanitize_thread)) T from(int lane) const {
    if (!(mask >> lane & 1)) fail_reading(lane);
    T value;
    std::memcpy(static_cast<void*>(&value), deposits[lane].bytes, sizeof(value));
    return value;
  }

 private:
  [[noreturn]] void fail_reading(int lane) const;
};

// Waits until every lane in `mask` has come to the same operation with the same mask. The result
// stays valid until this lane's next collective.
const Exchange& exchange_deposits(const char* operation, unsigned mask, const Deposit& mine,
                                  Site site);

template <typename T>
const Exchange& exchange(const char* operation, unsigned mask, const T& value, Site site) {
  static_assert(sizeof(T) <= sizeof(Deposit) && std::is_trivially_copyable_v<T>);
  Deposit mine;
  std::memcpy(mine.bytes, &value, sizeof(value));
  return exchange_deposits(operation, mask, mine, site);
}

// ---- memory -------------------------------------------------------------------------------------

bool in_shared_memory(const void* address);

inline void check_shared_row(const char* operation, const void* address) {
  if (!in_shared_memory(address)) fail(std::string(operation) + ": address is not shared memory");
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    fail(std::string(operation) + ": shared address is not 16-byte aligned");
  }
}

class AsyncCopies;
AsyncCopies& async_copies();  // those of the calling thread

}  // namespace he::emulator
