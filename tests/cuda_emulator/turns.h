// The order in which threads, warps and blocks get their turns.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "scheduler.h"

namespace he::emulator {

class Turns {
 public:
  explicit Turns(const Settings& settings) : order_(settings.order), random_(settings.seed) {}

  bool by_warp() const { return order_ == Order::kGreedy; }

  // Fills `turns` with 0 .. size - 1.
  void arrange(std::vector<int>& turns) {
    std::iota(turns.begin(), turns.end(), 0);
    if (order_ == Order::kReverse) {
      std::reverse(turns.begin(), turns.end());
    } else if (order_ != Order::kForward) {
      std::shuffle(turns.begin(), turns.end(), random_);
    }
  }

 private:
  Order order_;
  std::mt19937_64 random_;
};

}  // namespace he::emulator
