// The cp.async copies that one thread has issued and that have not arrived.
#pragma once

#include <deque>
#include <utility>
#include <vector>

namespace he::emulator {

struct AsyncCopy {
  void* destination;
  const void* source;  // null: zeros
};

class AsyncCopies {
 public:
  using Group = std::vector<AsyncCopy>;

  void issue(AsyncCopy copy) { open_.push_back(copy); }

  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }

  bool more_than(int groups) const { return static_cast<int>(groups_.size()) > groups; }

  Group take_oldest() {
    Group group = std::move(groups_.front());
    groups_.pop_front();
    return group;
  }

  void clear() {
    open_.clear();
    groups_.clear();
  }

 private:
  Group open_;  // a wait does not reach the copies that were never committed
  std::deque<Group> groups_;
};

}  // namespace he::emulator
