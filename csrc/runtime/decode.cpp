// One parallel region holds all steps of a call; inside of it the threads are a team, and call the
// kernels' launchers together. See cpu/parallel.h.
#include "runtime/decode.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>

#include "cpu/parallel.h"
#include "runtime/step.h"
#include "runtime/team_size.h"

namespace he::runtime {
namespace {

// Weights that are worth another thread; below, waiting for it costs more.
constexpr int64_t kProductsPerThread = 1 << 19;

int64_t products_of_row(const DecoderWeights& w) {
  int64_t products = w.head.out_dim * w.head.in_dim;
  for (const LayerWeights& layer : w.layers) {
    for (const LinearWeights* linear :
         {&layer.qkv, &layer.attention_output, &layer.mlp_up, &layer.mlp_down}) {
      products += linear->out_dim * linear->in_dim;
    }
  }
  return products;
}

// Whether the rows can be fed to the next step.
bool all_go_on(const DecodeRows& rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (rows.steps[i] >= rows.max_new_tokens || rows.lengths[i] >= rows.room[i]) return false;
    for (int64_t stop : rows.stop_tokens) {
      if (rows.tokens[i] == stop) return false;
    }
  }
  return true;
}

// Of whoever calls, for all its models: others' work is not theirs.
thread_local TeamSize team_size;

}  // namespace

int64_t DecodeProgram::run(const DecodeRows& rows, const std::vector<LayerCache>& cache,
                           int64_t count, int64_t most) {
  if (count == 0 || most == 0) return 0;
  using Clock = std::chrono::steady_clock;
  const int64_t work = products_of_row(weights_) * count;
  const int configured = omp_get_max_threads();
  const int64_t wanted = std::min<int64_t>(configured, 1 + work / kProductsPerThread);
  const TeamSize::Choice choice = team_size.choose(static_cast<int>(wanted), most);
  const Clock::time_point start = Clock::now();
  std::optional<cpu::Team> team;
  std::exception_ptr error;
  int64_t taken = 0;
  Clock::duration longest_wait{};
  scratch_.resize(Scratch::bytes(weights_, rows, count, choice.threads));
#pragma omp parallel num_threads(choice.threads)
  {
#pragma omp single
    team.emplace(omp_get_num_threads(), configured);  // OpenMP may give fewer than asked for
    cpu::MembershipScope scope({&*team, omp_get_thread_num()});
    const bool first = omp_get_thread_num() == 0;
    const Clock::duration waited_before = cpu::waited;
    Step step(weights_, rows, cache, count, scratch_.data(), first ? &seconds_ : nullptr);
    int64_t done = 0;
    try {
      do {
        step.run();
        ++done;
      } while (done < choice.most_steps && all_go_on(rows, count));
    } catch (...) {  // every member of the team comes here
      if (first) error = std::current_exception();
    }
    if (first) taken = done;
#pragma omp critical
    longest_wait = std::max(longest_wait, cpu::waited - waited_before);
  }
  using Seconds = std::chrono::duration<double>;
  team_size.judge(choice.threads, static_cast<double>(work) * taken,
                  Seconds(Clock::now() - start).count(), Seconds(longest_wait).count());
  if (error) std::rethrow_exception(error);
  return taken;
}

}  // namespace he::runtime
