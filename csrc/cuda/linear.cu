// Linear layers whose weights are read once: for few rows, as in decoding, bound by memory
// (linear_rows.cuh), and for many rows with LoRA adapters, bound by arithmetic (linear_tile.cuh).
//
// skinny_linear is fused_lora without adapters. Up to 16 rows of 16-bit elements go through
// MmaEngine, whose block takes as many of 8, 16 or 32 columns as leave a block to each
// multiprocessor; it reads its rows of weight once from memory and x, and a of the adapters in use,
// from the caches. More rows go through tiles of 64 by 64, or of 128 by 128. fp32, and rows that do
// not start at multiples of 16 bytes, go through FmaEngine at any size, 4 columns to a block.
//
// Instantiations: 2 types x (3 column counts + 2 tiles), and 3 types x {1, 8} rows.
#include "cuda/linear_engines.cuh"
#include "cuda/linear_tile.cuh"

namespace he::cuda {
namespace {

constexpr int64_t kSmallTileRows = 64;

int64_t multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cannot tell the current device");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cannot tell the number of multiprocessors");
  return count;
}

template <typename T>
LinearParams<T> make_params(const FusedLora& args) {
  LinearParams<T> p{};
  p.out = static_cast<T*>(args.out);
  p.x = static_cast<const T*>(args.x);
  p.weight = static_cast<const T*>(args.weight);
  p.bias = static_cast<const T*>(args.bias);
  p.adapter_index = args.adapter_index;
  p.rows = args.rows;
  p.out_dim = args.out_dim;
  p.in_dim = static_cast<int>(args.in_dim);
  p.num_adapters = static_cast<int>(args.num_adapters);
  p.aligned = packs_aligned<T>(args.in_dim, {args.x, args.weight});
  p.aligned_pairs =
      args.out_dim % 2 == 0 && reinterpret_cast<uintptr_t>(args.out) % (2 * sizeof(T)) == 0;
  for (int64_t i = 0; i < args.num_adapters; ++i) {
    const LoraAdapter& adapter = args.adapters[i];
    p.adapters[i] = {static_cast<const T*>(adapter.a), static_cast<const T*>(adapter.b),
                     static_cast<int>(adapter.rank), adapter.scale};
    p.aligned = p.aligned && packs_aligned<T>(args.in_dim, {adapter.a});
  }
  return p;
}

template <typename Engine, typename T>
void launch_rows(const LinearParams<T>& p, Stream stream) {
  const int64_t tiles =
      ceil_div<int64_t>(p.rows, Engine::kRows) * ceil_div<int64_t>(p.out_dim, Engine::kColumns);
  launch(linear_rows_kernel<Engine, T>, grid_of(tiles), Engine::kThreads, 0, stream, p);
}

template <typename Shape, typename T>
void launch_tiles(const LinearParams<T>& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.rows, Shape::kRows)),
                  static_cast<unsigned>(ceil_div<int64_t>(p.out_dim, Shape::kColumns)));
  launch(linear_tile_kernel<Shape, T>, grid, Shape::kThreads, Shape::kSharedBytes, stream, p);
}

template <typename T>
void launch_tensor_cores(const LinearParams<T>& p, Stream stream) {
  if (p.rows > kSmallTileRows) return launch_tiles<TileShape<128, 128, 2, 4>>(p, stream);
  if (p.rows > MmaEngine<1>::kRows) return launch_tiles<TileShape<64, 64, 2, 2>>(p, stream);
  const int64_t columns_each = p.out_dim / multiprocessors();
  if (columns_each >= 32) return launch_rows<MmaEngine<4>>(p, stream);
  if (columns_each >= 16) return launch_rows<MmaEngine<2>>(p, stream);
  launch_rows<MmaEngine<1>>(p, stream);
}

}  // namespace

void fused_lora(const FusedLora& args, Stream stream) {
  dispatch(args.dtype, [&](auto t) {
    using T = decltype(t);
    const LinearParams<T> p = make_params<T>(args);
    if constexpr (sizeof(T) == 2) {
      if (p.aligned) return launch_tensor_cores(p, stream);
    }
    if (p.rows == 1) return launch_rows<FmaEngine<1>>(p, stream);
    launch_rows<FmaEngine<8>>(p, stream);
  });
}

void skinny_linear(void* out, const void* x, const void* weight, const void* bias, int64_t rows,
                   int64_t out_dim, int64_t in_dim, DType dtype, Stream stream) {
  FusedLora args{};
  args.out = out;
  args.x = x;
  args.weight = weight;
  args.bias = bias;
  args.rows = rows;
  args.out_dim = out_dim;
  args.in_dim = in_dim;
  args.dtype = dtype;
  fused_lora(args, stream);
}

}  // namespace he::cuda
