// Attention over the paged cache, decoding and prefill alike: split-KV flash attention.
//
// A block takes one kv head of one sequence, a tile of the (query token, query head) rows that read
// it, and one of `num_splits` ranges of the keys that the tile sees; where there are several
// ranges, a second kernel merges them. 16-bit elements go through the tensor cores
// (attention_mma.cuh): up to 16 rows, as in decoding, with all warps on different keys, and more
// rows with a warp's rows to itself. fp32, and head dimensions that are no multiple of 16 bytes, go
// through fused multiply-adds (attention_fma.cuh).
//
// Decoding reads keys and values once from memory for each 16 (fp32: 8) query heads of a kv head,
// and with splits moves rows * splits * head_dim floats to the workspace and back. The launch shape
// comes from sizes alone: a sequence divides the keys that it has among its splits on the device,
// and splits left over return at once.
//
// Instantiations: 2 types x 4 dimensions x 2 shapes on the tensor cores, 3 types x 3 dimensions x 2
// shapes elsewhere, and one combine kernel a type.
#include <algorithm>

#include "cuda/attention_combine.cuh"
#include "cuda/attention_fma.cuh"
#include "cuda/attention_mma.cuh"

namespace he::cuda {
namespace {

constexpr int64_t kMaxHeadDim = 256;
constexpr int kFmaRows = 8;
constexpr int64_t kMaxGridSide = 65535;  // of y and z

// MmaShape<dimensions, warps on rows, warps on keys, tiles of 16 rows of a warp, keys of a tile>. A
// warp keeps its sums and scores in registers, which bounds its rows and keys at wide heads.
template <int kDim>
struct Shapes {
  using Decode = MmaShape<kDim, 1, 4, 1, 64>;
  using Prefill = MmaShape<kDim, 4, 1, 2, 64>;
};
template <>
struct Shapes<128> {
  using Decode = MmaShape<128, 1, 4, 1, 64>;
  using Prefill = MmaShape<128, 4, 1, 2, 48>;
};
template <>
struct Shapes<256> {
  using Decode = MmaShape<256, 1, 2, 1, 32>;
  using Prefill = MmaShape<256, 4, 1, 1, 32>;
};

// How the work is cut into blocks.
struct Plan {
  bool tensor_cores;
  int64_t block_rows, row_tiles, split_step, num_splits;
};

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether every row of q, of the cache and of the result starts at a multiple of 16 bytes.
bool has_aligned_rows(const PagedAttention& args) {
  return args.head_dim * element_bytes(args.dtype) % 16 == 0 && is_aligned(args.q) &&
         is_aligned(args.k_cache) && is_aligned(args.v_cache) && is_aligned(args.out);
}

int64_t multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cannot tell the current device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cannot tell the number of multiprocessors");
  return count;
}

// As many as fill the device, if the longest possible sequence has keys for them.
int64_t choose_splits(const PagedAttention& args, const Plan& plan, int64_t blocks_per_sm) {
  if (args.num_splits > 0) return std::min<int64_t>(args.num_splits, CombineShape::kMaxSplits);
  int64_t keys = args.max_blocks * args.block_size;
  if (args.window > 0) keys = std::min(keys, args.window + args.max_query_len);
  const int64_t blocks = plan.row_tiles * args.num_kv_heads * args.sequences;
  const int64_t wanted = multiprocessors() * blocks_per_sm / blocks;
  const int64_t most = std::min<int64_t>(ceil_div(keys, plan.split_step), CombineShape::kMaxSplits);
  return std::max<int64_t>(1, std::min(wanted, most));
}

int64_t block_elements(const PagedAttention& args) {
  return args.num_kv_heads * args.block_size * args.head_dim;
}

void check_between(const char* what, int64_t found, int64_t least, int64_t most) {
  if (least <= found && found <= most) return;
  throw std::runtime_error(std::string(what) + ": expected " + std::to_string(least) + " to " +
                           std::to_string(most) + ", got " + std::to_string(found));
}

void check(const PagedAttention& args) {
  check_between("head_dim", args.head_dim, 1, kMaxHeadDim);
  check_between("max_query_len", args.max_query_len, 1, INT32_MAX);
  check_between("sequences", args.sequences, 1, kMaxGridSide);
  check_between("kv heads", args.num_kv_heads, 1, kMaxGridSide);
  check_between("elements of a cache block", block_elements(args), 1, INT32_MAX);
  check_between("rows of q", args.tokens * args.num_heads, 1, INT32_MAX);
}

Plan make_plan(const PagedAttention& args) {
  check(args);
  const int64_t rows = args.max_query_len * (args.num_heads / args.num_kv_heads);
  Plan plan{};
  plan.tensor_cores = args.dtype != DType::kFloat32 && has_aligned_rows(args);
  const int64_t most_few = plan.tensor_cores ? Shapes<128>::Decode::kRows : 1;
  const bool few_rows = rows <= most_few;
  const int64_t many =
      args.head_dim > 128 ? Shapes<256>::Prefill::kRows : Shapes<128>::Prefill::kRows;
  plan.block_rows = few_rows ? most_few : plan.tensor_cores ? many : kFmaRows;
  plan.row_tiles = ceil_div(rows, plan.block_rows);
  // Where a block has few rows, keys are little work: short splits, and two blocks to a processor.
  const bool little_work = few_rows || !plan.tensor_cores;
  plan.split_step = little_work ? 64 : 256;
  plan.num_splits = choose_splits(args, plan, little_work ? 2 : 1);
  return plan;
}

int64_t partial_stride(const PagedAttention& args) {
  return ceil_div<int64_t>(args.head_dim, 4) * 4;
}

template <typename T>
AttentionParams<T> make_params(const PagedAttention& args, const Plan& plan) {
  constexpr float kLog2E = 1.44269504f;
  AttentionParams<T> p{};
  p.out = static_cast<T*>(args.out);
  p.q = static_cast<const T*>(args.q);
  p.k_cache = static_cast<const T*>(args.k_cache);
  p.v_cache = static_cast<const T*>(args.v_cache);
  p.block_tables = args.block_tables;
  p.cu_seqlens = args.cu_seqlens;
  p.seq_lens = args.seq_lens;
  p.alibi_slopes = args.alibi_slopes;
  p.num_heads = static_cast<int>(args.num_heads);
  p.head_dim = static_cast<int>(args.head_dim);
  p.max_blocks = static_cast<int>(args.max_blocks);
  p.block_elements = static_cast<int>(block_elements(args));
  p.partial_stride = static_cast<int>(partial_stride(args));
  p.num_splits = static_cast<int>(plan.num_splits);
  p.split_step = static_cast<int>(plan.split_step);
  p.window = static_cast<int>(args.window);
  p.group = FastDivisor(args.num_heads / args.num_kv_heads);
  p.block_size = FastDivisor(args.block_size);
  p.score_scale = args.softcap > 0.f ? args.scale / args.softcap : args.scale * kLog2E;
  p.cap = args.softcap * kLog2E;
  p.aligned = has_aligned_rows(args);
  if (plan.num_splits > 1) {
    const int64_t parts = args.tokens * args.num_heads * plan.num_splits;
    p.partials = args.workspace;
    p.statistics = reinterpret_cast<float2*>(args.workspace + parts * p.partial_stride);
  }
  return p;
}

dim3 grid_of(const PagedAttention& args, const Plan& plan) {
  return dim3(static_cast<unsigned>(plan.row_tiles * plan.num_splits),
              static_cast<unsigned>(args.num_kv_heads), static_cast<unsigned>(args.sequences));
}

template <typename Shape, typename T>
void launch_mma(const AttentionParams<T>& p, dim3 grid, Stream stream) {
  launch(attention_mma_kernel<Shape, T>, grid, Shape::kThreads, Shape::kSharedBytes, stream, p);
}

template <typename Shape, typename T>
void launch_fma(const AttentionParams<T>& p, dim3 grid, Stream stream) {
  launch(attention_fma_kernel<Shape, T>, grid, Shape::kThreads, Shape::kSharedBytes, stream, p);
}

template <int kDim, typename T>
void launch_mma_of_dim(const AttentionParams<T>& p, const Plan& plan, dim3 grid, Stream stream) {
  if (plan.block_rows == Shapes<kDim>::Decode::kRows) {
    launch_mma<typename Shapes<kDim>::Decode>(p, grid, stream);
  } else {
    launch_mma<typename Shapes<kDim>::Prefill>(p, grid, stream);
  }
}

template <int kDim, typename T>
void launch_fma_of_dim(const AttentionParams<T>& p, const Plan& plan, dim3 grid, Stream stream) {
  if (plan.block_rows == 1) {
    launch_fma<FmaShape<kDim, 1>>(p, grid, stream);
  } else {
    launch_fma<FmaShape<kDim, kFmaRows>>(p, grid, stream);
  }
}

template <typename T>
void launch_splits(const AttentionParams<T>& p, const Plan& plan, dim3 grid, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    if (plan.tensor_cores) {
      if (p.head_dim <= 64) return launch_mma_of_dim<64>(p, plan, grid, stream);
      if (p.head_dim <= 96) return launch_mma_of_dim<96>(p, plan, grid, stream);
      if (p.head_dim <= 128) return launch_mma_of_dim<128>(p, plan, grid, stream);
      return launch_mma_of_dim<256>(p, plan, grid, stream);
    }
  }
  if (p.head_dim <= 64) return launch_fma_of_dim<64>(p, plan, grid, stream);
  if (p.head_dim <= 128) return launch_fma_of_dim<128>(p, plan, grid, stream);
  return launch_fma_of_dim<256>(p, plan, grid, stream);
}

}  // namespace

int64_t paged_attention_workspace(const PagedAttention& args) {
  const int64_t splits = make_plan(args).num_splits;
  return splits == 1 ? 0 : args.tokens * args.num_heads * splits * (partial_stride(args) + 2);
}

void paged_attention(const PagedAttention& args, Stream stream) {
  const Plan plan = make_plan(args);
  dispatch(args.dtype, [&](auto t) {
    const auto p = make_params<decltype(t)>(args, plan);
    launch_splits(p, plan, grid_of(args, plan), stream);
    if (plan.num_splits == 1) return;
    const dim3 rows(static_cast<unsigned>(args.tokens * args.num_heads));
    launch(attention_combine_kernel<decltype(t)>, rows, CombineShape::kThreads, 0, stream, p);
  });
}

}  // namespace he::cuda
