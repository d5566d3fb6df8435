// Attention over the paged cache, decode and prefill alike. A task is one kv head of a few query
// tokens of one sequence (or, when there are fewer tasks than threads, of one range of its keys):
// its rows, tokens x query heads of the group, walk the cached blocks together with an online
// softmax (arXiv 2205.14135), so that keys and values are read once a task.
#include "cpu/attention.h"

#include <cmath>

#include "cpu/parallel.h"

namespace he::cpu {
namespace {

// Reading about this many cached elements is worth a thread.
constexpr int64_t kElementsPerThread = 16384;
constexpr int64_t kRowsOfTask = 64;
constexpr int64_t kKeysOfSplit = 128;

int64_t first_visible(const PagedAttention& a, int64_t position) {
  return a.window > 0 ? std::max<int64_t>(0, position + 1 - a.window) : 0;
}

int64_t choose_splits(const PagedAttention& a, int64_t tasks, int64_t keys) {
  if (a.num_splits > 0) return a.num_splits;
  const int64_t threads = configured_threads(), most = keys / kKeysOfSplit;
  int64_t splits = 1;
  while (splits < most && tasks * splits < 4 * threads && tasks * splits % threads) ++splits;
  return splits;
}

// At least what choose_splits gives, whatever the keys are.
int64_t most_splits(const PagedAttention& a, int64_t tasks) {
  if (a.cu_seqlens != nullptr) return 1;
  if (a.num_splits > 0) return a.num_splits;
  return 1 + 4 * configured_threads() / std::max<int64_t>(1, tasks);
}

// Floats that one piece of a split task leaves.
int64_t partial_size(const PagedAttention& a) {
  return a.num_heads / a.num_kv_heads * (a.head_dim + 2);
}

std::vector<AttentionTask> make_tasks(const PagedAttention& a) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t tile = std::max<int64_t>(1, kRowsOfTask / group);
  std::vector<AttentionTask> tasks;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t begin = a.cu_seqlens ? a.cu_seqlens[s] : s;
    const int64_t end = a.cu_seqlens ? a.cu_seqlens[s + 1] : s + 1;
    for (int64_t token = begin; token < end; token += tile) {
      const int64_t tokens = std::min(tile, end - token);
      const int64_t position = a.seq_lens[s] - (end - token), last = position + tokens;
      const int64_t first = std::min(first_visible(a, position), std::max<int64_t>(0, last));
      for (int64_t head = 0; head < a.num_kv_heads; ++head) {
        tasks.push_back({s, token, tokens, position, head, first, std::max(first, last), nullptr});
      }
    }
  }
  return tasks;
}

// Cuts each task's keys into `splits` ranges at block boundaries; the pieces of a task follow one
// another and leave their state in the workspace.
std::vector<AttentionTask> split_tasks(const PagedAttention& a,
                                       const std::vector<AttentionTask>& tasks, int64_t splits) {
  std::vector<AttentionTask> pieces;
  for (const AttentionTask& task : tasks) {
    const int64_t keys = task.last_key - task.first_key;
    const int64_t share = (keys / splits / a.block_size + 1) * a.block_size;
    const int64_t origin = task.first_key / a.block_size * a.block_size;
    for (int64_t i = 0; i < splits; ++i) {
      AttentionTask piece = task;
      piece.first_key = std::clamp(origin + i * share, task.first_key, task.last_key);
      piece.last_key = i + 1 == splits
                           ? task.last_key
                           : std::clamp(origin + (i + 1) * share, task.first_key, task.last_key);
      piece.partial = a.workspace + pieces.size() * partial_size(a);
      pieces.push_back(piece);
    }
  }
  return pieces;
}

// The pieces of one decode task become its output rows: softmax states merge by their maxima.
template <typename T>
void combine(const PagedAttention& a, const AttentionTask* pieces, int64_t splits) {
  const int64_t group = a.num_heads / a.num_kv_heads, dim = a.head_dim;
  for (int64_t g = 0; g < group; ++g) {
    float most = kMinusInfinity, total = 0.f;
    std::vector<float> out(dim);
    for (int64_t i = 0; i < splits; ++i) most = std::max(most, pieces[i].partial[g * (dim + 2)]);
    for (int64_t i = 0; i < splits; ++i) {
      const float* part = pieces[i].partial + g * (dim + 2);
      if (part[1] == 0.f) continue;
      const float weight = std::exp(part[0] - (most == kMinusInfinity ? 0.f : most));
      total += part[1] * weight;
      for (int64_t d = 0; d < dim; ++d) out[d] += part[2 + d] * weight;
    }
    write_row(output_row<T>(a, pieces[0], g), out.data(), 1, dim, total);
  }
}

template <typename T>
void run_tasks(const PagedAttention& a, const std::vector<AttentionTask>& tasks, int64_t threads) {
  parallel_tasks(tasks.size(), threads, [&](const auto& next) {
    RowAttention<T> rows(a);
    TileAttention<T> tiles(a);
    for (int64_t i = next(); i >= 0; i = next()) {
      if (prefers_tiles(a, tasks[i])) {
        tiles.run(tasks[i]);
      } else {
        rows.run(tasks[i]);
      }
    }
  });
}

}  // namespace

int64_t paged_attention_workspace(const PagedAttention& args) {
  const int64_t tasks = args.sequences * args.num_kv_heads, splits = most_splits(args, tasks);
  return splits > 1 ? tasks * splits * partial_size(args) : 0;
}

void paged_attention(const PagedAttention& args, Stream) {
  std::vector<AttentionTask> tasks = make_tasks(args);
  int64_t keys = 0;
  for (const AttentionTask& task : tasks) keys += task.last_key - task.first_key;
  const int64_t threads = 1 + keys * args.head_dim * 2 / kElementsPerThread;
  const int64_t count = tasks.size(), average = keys / std::max<int64_t>(1, count);
  const int64_t splits =
      args.cu_seqlens ? 1 : choose_splits(args, std::max<int64_t>(1, count), average);
  if (splits > 1) tasks = split_tasks(args, tasks, splits);
  dispatch(args.dtype, [&](auto t) {
    run_tasks<decltype(t)>(args, tasks, threads);
    if (splits == 1) return;
    parallel_for(count, count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        combine<decltype(t)>(args, tasks.data() + i * splits, splits);
      }
    });
  });
}

}  // namespace he::cpu
