// How many threads a call of the decode program has. A team goes at the pace of its last member, so
// on a machine that is busy with other things fewer threads are faster.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace he::runtime {

// Chooses by what it has seen: where members wait for each other it tries half of the threads for a
// few steps, or a quarter if half is no faster, and so on; later it tries more again; and it stays
// with what was fastest.
class TeamSize {
 public:
  struct Choice {
    int threads;
    int64_t most_steps;
  };

  // Of `wanted` threads, for a call of up to `most` steps.
  Choice choose(int wanted, int64_t most) const {
    const int threads = std::max(1, wanted >> (level_ + trial_));
    return {threads, trial_ == 0 ? most : std::min(most, kTrialSteps)};
  }

  // What came of a call: its work, in any unit, its seconds, and those that the member which waited
  // most did so.
  void judge(int threads, double work, double seconds, double waited) {
    const double rate = work / seconds;
    if (trial_ != 0 && !end_trial(rate > rate_)) return;
    rate_ = rate;
    if (++calls_ < patience_) return;
    if (threads > 1 && waited > seconds / 4) {
      trial_ = std::min(reach_, kMostHalvings - level_);
    } else {
      trial_ = -std::min(reach_, level_);
    }
  }

 private:
  static constexpr int64_t kTrialSteps = 4;
  static constexpr int kMostPatience = 64, kMostHalvings = 5;

  bool end_trial(bool better) {
    if (better) level_ += trial_;
    reach_ = better ? 1 : reach_ % kMostHalvings + 1;
    patience_ = better ? 1 : std::min(2 * patience_, kMostPatience);
    trial_ = calls_ = 0;
    return better;
  }

  int level_ = 0;  // halvings of the wanted threads
  int trial_ = 0;  // the change of it that the next call tries
  int reach_ = 1;  // the size of the next trial
  int calls_ = 0;  // since the last trial
  int patience_ = 1;
  double rate_ = 0.;  // of the last call at this level
};

}  // namespace he::runtime
