// Launches the kernels that read weights or the KV cache on each of their paths, see
// memory_check.h. Other tests compare the results.
#include "memory_check.h"

namespace he::cuda {
namespace {

// ---- attention ----------------------------------------------------------------------------------

struct Attention {
  int64_t heads, kv_heads, head_dim, splits;
  std::vector<int32_t> queries, keys;  // of each sequence; no queries: decoding
  int64_t window = 0, shift = 0;       // shift: elements behind a 16-byte boundary
  bool biased = false;                 // ALiBi and a soft cap
};

// Every width of the tensor cores, and those without; few rows and many; splits with and without
// keys; sequences with none.
const std::vector<Attention>& attention_cases() {
  static const std::vector<Attention> cases = {
      {8, 2, 64, 1, {}, {70, 1, 0}}, {8, 1, 128, 3, {}, {130, 9}},
      {4, 4, 256, 0, {}, {70}},      {33, 1, 96, 2, {}, {100}, 50, 0, true},
      {3, 1, 7, 2, {}, {33, 5}},     {8, 2, 72, 1, {33, 1}, {50, 40}},
      {4, 4, 128, 0, {40}, {100}},   {2, 1, 256, 2, {65, 3}, {65, 130}, 20, 0, true},
      {3, 1, 7, 1, {5, 0}, {33, 4}}, {4, 2, 64, 1, {9}, {40}, 0, 1},
  };
  return cases;
}

// Every sequence's blocks in reverse order; what is past its end leads out of the cache.
std::vector<int32_t> block_tables(const std::vector<int32_t>& keys, int64_t block_size,
                                  int64_t max_blocks) {
  std::vector<int32_t> tables(keys.size() * max_blocks, 1 << 30);
  int32_t next = 0;
  for (size_t i = keys.size(); i-- > 0;) {
    for (int64_t b = 0; b < ceil_div<int64_t>(keys[i], block_size); ++b) {
      tables[i * max_blocks + b] = next++;
    }
  }
  return tables;
}

void launch_case(const Attention& c, DType dtype) {
  constexpr int64_t kBlockSize = 16;
  Buffers b;
  PagedAttention a{};
  a.sequences = c.keys.size();
  std::vector<int32_t> bounds{0};
  int64_t blocks = 0;
  for (int64_t i = 0; i < a.sequences; ++i) {
    const int32_t queries = c.queries.empty() ? 1 : c.queries[i];
    bounds.push_back(bounds.back() + queries);
    a.max_query_len = std::max<int64_t>(a.max_query_len, queries);
    const int64_t own = ceil_div<int64_t>(c.keys[i], kBlockSize);
    a.max_blocks = std::max(a.max_blocks, own);
    blocks += own;
  }
  a.tokens = bounds.back();
  a.num_heads = c.heads, a.num_kv_heads = c.kv_heads, a.head_dim = c.head_dim;
  a.block_size = kBlockSize, a.num_splits = c.splits, a.window = c.window;
  a.scale = 0.01f, a.softcap = c.biased ? 3.f : 0.f;
  a.dtype = dtype;
  const int64_t packed = a.tokens * a.num_heads * a.head_dim;
  const int64_t cached = blocks * a.num_kv_heads * kBlockSize * a.head_dim;
  a.out = b.numbers(dtype, packed, c.shift), a.q = b.numbers(dtype, packed, c.shift);
  a.k_cache = b.numbers(dtype, cached, c.shift), a.v_cache = b.numbers(dtype, cached, c.shift);
  a.block_tables = b.of(block_tables(c.keys, kBlockSize, a.max_blocks));
  a.seq_lens = b.of(c.keys);
  if (!c.queries.empty()) a.cu_seqlens = b.of(bounds);
  if (c.biased) a.alibi_slopes = b.of(std::vector<float>(c.heads, 0.1f));
  a.workspace = b.of(std::vector<float>(paged_attention_workspace(a)));
  paged_attention(a, nullptr);
  finish();
}

// ---- linear -------------------------------------------------------------------------------------

struct Linear {
  int64_t rows, out_dim, in_dim, shift;
  Sizes ranks;
  bool indexed;
};

void launch_case(const Linear& c, DType dtype) {
  Buffers b;
  std::vector<LoraAdapter> adapters;
  for (int64_t rank : c.ranks) {
    adapters.push_back({b.numbers(dtype, rank * c.in_dim, c.shift),
                        b.numbers(dtype, c.out_dim * rank, c.shift), rank, 0.5f});
  }
  std::vector<int32_t> index(c.rows);
  for (int64_t row = 0; row < c.rows; ++row) index[row] = row % 4 - 1;  // one row in four has none
  FusedLora a{};
  a.out = b.numbers(dtype, c.rows * c.out_dim, c.shift);
  a.x = b.numbers(dtype, c.rows * c.in_dim, c.shift);
  a.weight = b.numbers(dtype, c.out_dim * c.in_dim, c.shift);
  a.bias = b.numbers(dtype, c.out_dim, c.shift);
  a.adapters = adapters.data();
  a.adapter_index = c.indexed ? b.of(index) : nullptr;
  a.rows = c.rows, a.out_dim = c.out_dim, a.in_dim = c.in_dim;
  a.num_adapters = adapters.size();
  a.dtype = dtype;
  fused_lora(a, nullptr);
  finish();
}

int64_t multiprocessors() {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0),
             "cannot tell the number of multiprocessors");
  return count;
}

void attentions(DType dtype, bool quick) {
  for (const Attention& c : attention_cases()) {
    const bool large = c.heads * c.head_dim * (c.queries.empty() ? 1 : c.queries[0]) > 4096;
    if (!quick || !large) launch_case(c, dtype);
  }
}

// Blocks of 8, 16 and 32 columns for up to 16 rows, tiles of 64 and of 128 rows, and what neither
// takes; with adapters of less and of more ranks than a step has.
void linears(DType dtype, bool quick) {
  const int64_t processors = multiprocessors();
  for (int64_t out_dim : {int64_t{3}, 16 * processors + 1, 32 * processors + 1}) {
    launch_case(Linear{5, out_dim, 72, 0, {}, false}, dtype);
  }
  launch_case(Linear{1, 33, 61, 1, {3}, false}, dtype);
  launch_case(Linear{9, 33, 61, 1, {3}, true}, dtype);
  launch_case(Linear{16, 66, 72, 0, {4, 40}, false}, dtype);
  if (dtype == DType::kFloat32) return;  // no tiles
  launch_case(Linear{17, 66, 72, 0, {4, 40}, true}, dtype);
  if (!quick) launch_case(Linear{129, 66, 72, 0, {4}, true}, dtype);
}

}  // namespace
}  // namespace he::cuda

int main(int count, char** arguments) {
  using namespace he::cuda;
  return check_memory(count, arguments, {{"attention", attentions}, {"linear", linears}});
}
