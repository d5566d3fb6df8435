// A machine by a model of it: what a call costs with so many threads, and how the team's size
// follows. Prints a line for each case that fails.
#include "runtime/team_size.h"

#include <cstdio>
#include <functional>

using he::runtime::TeamSize;

namespace {

// Seconds of a step, and the share of them that the member which waits most does so.
struct Cost {
  double seconds, waited;
};

Cost idle(int threads) { return {1. / threads, threads > 1 ? .1 : 0.}; }

// Others have all cores but one: each barrier waits for a member that they keep from running.
Cost crowded(int threads) { return threads > 1 ? Cost{10., .8} : Cost{1., 0.}; }

// One core of four is taken.
Cost one_taken(int threads) { return threads > 2 ? Cost{2., .6} : Cost{1. / threads, .1}; }

// Members wait although more of them are faster, as with work that does not divide evenly.
Cost uneven(int threads) { return {1. / threads, threads > 1 ? .4 : 0.}; }

struct Run {
  double seconds = 0.;
  int64_t steps = 0;
  int threads = 0;  // of the last call
};

Run run(TeamSize& team, int wanted, int calls, const std::function<Cost(int)>& machine) {
  Run result;
  for (int i = 0; i < calls; ++i) {
    const TeamSize::Choice choice = team.choose(wanted, 32);
    const Cost cost = machine(choice.threads);
    const double seconds = cost.seconds * choice.most_steps;
    team.judge(choice.threads, choice.most_steps, seconds, cost.waited * seconds);
    result.seconds += seconds;
    result.steps += choice.most_steps;
    result.threads = choice.threads;
  }
  return result;
}

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) ++failures, std::printf("failed: %s\n", what);
}

double seconds_a_step(const Run& r) { return r.seconds / static_cast<double>(r.steps); }

}  // namespace

int main() {
  TeamSize quiet;
  const Run all = run(quiet, 4, 100, idle);
  expect(all.threads == 4 && all.steps == 3200,
         "an idle machine keeps all threads, without trials");

  TeamSize team;
  run(team, 4, 20, crowded);
  expect(seconds_a_step(run(team, 4, 300, crowded)) < 1.1,
         "a crowded one comes down to one thread");
  run(team, 4, 200, idle);
  expect(run(team, 4, 50, idle).threads == 4, "and has them all again when the crowd has left");

  TeamSize half;
  run(half, 4, 20, one_taken);
  expect(seconds_a_step(run(half, 4, 300, one_taken)) < .55, "with a core taken half of them stay");

  TeamSize slanted;
  run(slanted, 4, 20, uneven);
  expect(seconds_a_step(run(slanted, 4, 300, uneven)) < .26,
         "waiting alone is no reason for fewer");

  TeamSize one;
  expect(run(one, 1, 10, idle).steps == 320, "one thread has nothing to try");
  return failures;
}
