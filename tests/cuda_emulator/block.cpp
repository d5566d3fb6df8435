#include "block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "builtin_variables.h"

namespace he::emulator {
namespace {

// What ThreadSanitizer orders accesses by; only the addresses count.
char start_event, end_event, barrier_events[2], warp_events[Block::kMaxWarps];

}  // namespace

Block& Block::current() {
  static Block block;
  return block;
}

std::string Block::run(dim3 block_dim, const std::function<void()>& body, Turns& turns) {
  start(block_dim, body);
  std::vector<int> order(turns.by_warp() ? (size_ + kWarpLanes - 1) / kWarpLanes : size_);
  while (live_ > 0 && error_.empty()) {
    turns.arrange(order);
    if (!take_turns(order, turns.by_warp())) error_ = deadlock();
  }
  observe(&end_event);
  return error_;
}

void Block::start(dim3 block_dim, const std::function<void()>& body) {
  size_ = live_ = static_cast<int>(block_dim.x * block_dim.y * block_dim.z);
  while (static_cast<int>(threads_.size()) < size_) threads_.push_back(std::make_unique<Thread>());
  barrier_ = {};
  lanes_at_collectives_.fill(0);
  body_ = &body;
  error_.clear();
  publish(&start_event);
  for (int i = 0; i < size_; ++i) {
    Thread& thread = *threads_[i];
    thread.index =
        uint3{i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y)};
    thread.state = ThreadState::kRunnable;
    thread.wait = {};
    thread.exchange.reset();
    thread.async_copies.clear();
    // 7 is coprime to the number of offsets, which spreads the lanes of a warp.
    thread.fiber.start(thread_main, i * 7);
  }
}

void Block::thread_main() {
  Block& block = current();
  block.thread().fiber.announce();
  observe(&start_event);
  (*block.body_)();
  publish(&end_event);
  block.thread().state = ThreadState::kReturned;
  --block.live_;
  block.finish_barrier_if_complete();
  block.thread().fiber.suspend();
  std::abort();  // nobody resumes a thread that has returned
}

// Gives everyone one turn; false when nobody could move.
bool Block::take_turns(const std::vector<int>& turns, bool by_warp) {
  bool moved = false;
  for (int turn : turns) moved |= by_warp ? run_warp(turn) : step(turn);
  return moved;
}

bool Block::run_warp(int warp) {
  const int begin = warp * kWarpLanes, end = std::min(begin + kWarpLanes, size_);
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (int i = begin; i < end; ++i) again |= step(i);
    moved |= again;
  }
  return moved;
}

bool Block::step(int thread) {
  if (threads_[thread]->state != ThreadState::kRunnable || !error_.empty()) return false;
  running_ = thread;
  threadIdx = threads_[thread]->index;
  threads_[thread]->fiber.resume();
  running_ = -1;
  return true;
}

void Block::fail(const std::string& message) {
  error_ = message;
  thread().fiber.suspend();
  std::abort();  // a failed launch resumes nobody
}

// ---- barriers -----------------------------------------------------------------------------------

BarrierVotes Block::barrier(const Wait& wait, bool vote) {
  Thread& me = thread();
  char& event = barrier_events[barrier_.phase];
  me.wait = wait;
  me.state = ThreadState::kAtBarrier;
  ++barrier_.arrived;
  barrier_.in_favour += vote;
  publish(&event);
  finish_barrier_if_complete();
  me.fiber.suspend();
  observe(&event);
  return barrier_.result;
}

void Block::finish_barrier_if_complete() {
  if (live_ == 0 || barrier_.arrived < live_) return;
  int first = -1;
  for (int i = 0; i < size_; ++i) {
    Thread& thread = *threads_[i];
    if (thread.state != ThreadState::kAtBarrier) continue;
    if (first < 0) first = i;
    if (!(thread.wait.site == threads_[first]->wait.site)) {
      error_ = "divergent barrier: " + describe(first) + "; " + describe(i);
      return;
    }
    thread.state = ThreadState::kRunnable;
  }
  barrier_.result = {barrier_.arrived, barrier_.in_favour};
  barrier_.arrived = barrier_.in_favour = 0;
  barrier_.phase ^= 1;
}

// ---- warp collectives ---------------------------------------------------------------------------

const Exchange& Block::exchange(const Wait& wait, const Deposit& mine) {
  Thread& me = thread();
  const int warp = running_ / kWarpLanes;
  me.wait = wait;
  me.state = ThreadState::kAtCollective;
  if (!(wait.mask >> lane() & 1)) fail_at_wait("the caller is not in its mask");
  if (const int lanes = size_ - warp * kWarpLanes; lanes < kWarpLanes && wait.mask >> lanes) {
    fail_at_wait("the mask names lanes that the block does not have");
  }
  me.deposit = mine;
  lanes_at_collectives_[warp] |= 1u << lane();
  publish(&warp_events[warp]);
  if (all_arrived(warp, wait)) finish_collective(warp, wait.mask);
  me.fiber.suspend();
  observe(&warp_events[warp]);
  return *me.exchange;
}

// A lane that waits at another collective may still be on its way to this one.
bool Block::all_arrived(int warp, const Wait& wait) const {
  if ((lanes_at_collectives_[warp] & wait.mask) != wait.mask) return false;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!(wait.mask >> lane & 1)) continue;
    const Wait& theirs = threads_[warp * kWarpLanes + lane]->wait;
    if (theirs.mask != wait.mask || std::strcmp(theirs.operation, wait.operation) != 0) {
      return false;
    }
  }
  return true;
}

void Block::finish_collective(int warp, unsigned mask) {
  auto exchange = std::make_shared<Exchange>();
  exchange->mask = mask;
  lanes_at_collectives_[warp] &= ~mask;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = *threads_[warp * kWarpLanes + lane];
    exchange->deposits[lane] = thread.deposit;
    thread.exchange = exchange;
    thread.state = ThreadState::kRunnable;
  }
}

// ---- messages -----------------------------------------------------------------------------------

void Block::fail_here(const std::string& message) {
  fail("thread " + std::to_string(running_) + ": " + message);
}

void Block::fail_at_wait(const std::string& message) { fail(describe(running_) + ": " + message); }

std::string Block::describe(int thread) const {
  const Thread& it = *threads_[thread];
  std::string text = "thread " + std::to_string(thread);
  if (it.state == ThreadState::kReturned) return text + " has returned";
  text += std::string(" at ") + it.wait.operation;
  if (it.wait.mask != 0) {
    char mask[32];
    std::snprintf(mask, sizeof(mask), " mask 0x%08x", it.wait.mask);
    text += mask;
  }
  return text + " " + to_string(it.wait.site);
}

// Names one thread of every run of neighbours that wait for the same thing.
std::string Block::deadlock() const {
  constexpr int kNamed = 4;
  std::string text = "deadlock: nobody can go on";
  int named = 0;
  for (int i = 0; i < size_ && named < kNamed; ++i) {
    const Thread& it = *threads_[i];
    if (i > 0) {
      const Thread& before = *threads_[i - 1];
      if (it.state == before.state && it.wait.mask == before.wait.mask &&
          it.wait.site == before.wait.site) {
        continue;
      }
    }
    text += "; " + describe(i);
    ++named;
  }
  return text;
}

// ---- what the twins of the built-ins call -------------------------------------------------------

std::string to_string(const Site& site) {
  const std::string path = site.file;
  return "(" + path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line) + ")";
}

void fail(const std::string& message) { Block::current().fail_here(message); }

int current_lane() { return Block::current().lane(); }

AsyncCopies& async_copies() { return Block::current().thread().async_copies; }

BarrierVotes barrier(const char* operation, bool vote, Site site) {
  return Block::current().barrier({operation, 0, site}, vote);
}

const Exchange& exchange_deposits(const char* operation, unsigned mask, const Deposit& mine,
                                  Site site) {
  return Block::current().exchange({operation, mask, site}, mine);
}

void Exchange::fail_reading(int lane) const {
  Block::current().fail_at_wait("reads lane " + std::to_string(lane) +
                                ", which is not in the mask");
}

}  // namespace he::emulator
