// A linear layer for many rows, on the tensor cores: the classic tiled product. A block takes a
// tile of rows and columns of the result and walks the inner dimension in steps of 32, whose pieces
// of x and of the matrix cp.async brings into a ring of stages. With an adapter comes first the
// same walk against 32 rows of a at a time; the result, split in two 16-bit terms so that nothing
// is lost, takes the place of x in one step against b.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/linear_params.cuh"
#include "cuda/ptx.cuh"

namespace he::cuda {

template <int kRows_, int kColumns_, int kRowWarps_, int kColumnWarps_>
struct TileShape {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kRowWarps = kRowWarps_, kColumnWarps = kColumnWarps_;
  static constexpr int kWarps = kRowWarps * kColumnWarps, kThreads = kWarps * kWarpSize;
  static constexpr int kRowTiles = kRows / kRowWarps / 16;        // of a warp, of 16 rows
  static constexpr int kFragments = kColumns / kColumnWarps / 8;  // of a warp, of 8 columns
  static constexpr int kDepth = 32, kPiece = 8, kPieces = kDepth / kPiece;
  static constexpr int kStages = 4;
  static constexpr int kStageElements = (kRows + kColumns) * kDepth;
  static constexpr int kSharedBytes = 2 * kStages * kStageElements;
  static_assert(kWarps * 16 == kRows && kDepth <= kColumns, "a warp has 16 rows of x a^T");

  // Where a piece of 16 bytes of a row is kept, in elements: moved within the row such that the 8
  // rows that ldmatrix reads at once lie in different banks.
  __device__ static __forceinline__ unsigned element(unsigned row, unsigned piece) {
    return row * kDepth + (piece ^ row / 2 % kPieces) * kPiece;
  }
};

// What a warp adds up: kRowTiles by kFragments fragments of 16 by 8.
template <int kRowTiles, int kFragments>
using Sums = float[kRowTiles][kFragments][4];

// The ring of stages, each a piece of x and one of a matrix.
template <typename Shape, typename T>
struct Stages {
  T* shared;  // [kStages, kRows + kColumns, kDepth]

  __device__ __forceinline__ T* x(int stage) const {
    return shared + stage * Shape::kStageElements;
  }
  __device__ __forceinline__ T* matrix(int stage) const {
    return x(stage) + Shape::kRows * Shape::kDepth;
  }

  // Starts the copy of kCount rows, elements [k, k + kDepth) of each. The last of `rows` stands in
  // for those that do not exist; elements from in_dim on are zero.
  template <int kCount>
  __device__ __forceinline__ static void load(T* target, const T* source, int rows, int k,
                                              int in_dim) {
    constexpr int kPassRows = Shape::kThreads / Shape::kPieces;
    const int piece = threadIdx.x % Shape::kPieces, first_row = threadIdx.x / Shape::kPieces;
    const int column = k + piece * Shape::kPiece;
    const bool exists = column < in_dim;
#pragma unroll
    for (int row = first_row; row < kCount; row += kPassRows) {
      const int64_t offset = static_cast<int64_t>(min(row, rows - 1)) * in_dim;
      cp_async_16(target + Shape::element(row, piece), source + offset + (exists ? column : 0),
                  exists);
    }
  }

  // sums += x matrix^T of one stage, for the warp's rows from `row` and columns from `column` on.
  template <int kRowTiles, int kFragments>
  __device__ __forceinline__ static void multiply(Sums<kRowTiles, kFragments>& sums, const T* x,
                                                  int row, const T* matrix, int column) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int k = 0; k < Shape::kPieces; k += 2) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        ldmatrix_x4(a[t], x + Shape::element(row + t * 16 + lane % 16, k + lane / 16));
      }
#pragma unroll
      for (int f = 0; f < kFragments; f += 2) {
        uint32_t b[4];
        const int matrix_row = column + f * 8 + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(b, matrix + Shape::element(matrix_row, k + lane / 8 % 2));
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          mma_m16n8k16<T>(sums[t][f], a[t], {b[0], b[1]});
          mma_m16n8k16<T>(sums[t][f + 1], a[t], {b[2], b[3]});
        }
      }
    }
  }

  // sums += x matrix^T over the whole inner dimension, with kCount rows of the matrix, of which
  // `columns` exist. Begins and ends with a barrier.
  template <int kCount, int kRowTiles, int kFragments>
  __device__ __forceinline__ void walk(Sums<kRowTiles, kFragments>& sums, const LinearParams<T>& p,
                                       int64_t first_row, int row, const T* source, int columns,
                                       int column) const {
    const int steps = ceil_div(p.in_dim, Shape::kDepth);
    const int rows = static_cast<int>(min(p.rows - first_row, int64_t{Shape::kRows}));
    const T* x_source = p.x + first_row * p.in_dim;
    const auto load_step = [&](int step) {
      if (step < steps) {
        const int stage = step % Shape::kStages;
        load<Shape::kRows>(x(stage), x_source, rows, step * Shape::kDepth, p.in_dim);
        load<kCount>(matrix(stage), source, columns, step * Shape::kDepth, p.in_dim);
      }
      cp_async_commit();  // also without copies, so that groups can be counted
    };
    __syncthreads();
#pragma unroll
    for (int step = 0; step < Shape::kStages - 1; ++step) load_step(step);
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<Shape::kStages - 2>();
      __syncthreads();  // the stage is complete, and every warp is done with the one before
      load_step(step + Shape::kStages - 1);
      const int stage = step % Shape::kStages;
      multiply(sums, x(stage), row, matrix(stage), column);
    }
    cp_async_wait<0>();
    __syncthreads();
  }
};

template <typename Shape, typename T>
class TileProduct {
 public:
  __device__ __forceinline__ TileProduct(const LinearParams<T>& p, unsigned char* shared)
      : p_(p), stages_{reinterpret_cast<T*>(shared)} {}

  __device__ __forceinline__ void run() {
    const unsigned used = p_.template used_adapters<Shape::kRows>(first_row());
    for (int i = 0; i < p_.num_adapters; ++i) {
      if (!(used >> i & 1)) continue;
      for (int first = 0; first < p_.adapters[i].rank; first += Shape::kDepth)
        add_adapter(i, first);
    }
    const int columns =
        static_cast<int>(min(p_.out_dim - first_column(), int64_t{Shape::kColumns}));
    stages_.template walk<Shape::kColumns>(sums_, p_, first_row(), row_offset(),
                                           p_.weight + first_column() * p_.in_dim, columns,
                                           column_offset());
    store();
  }

 private:
  static constexpr int kNarrowFragments = Shape::kDepth / 8;

  __device__ __forceinline__ static int warp() { return threadIdx.x / kWarpSize; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarpSize; }
  __device__ __forceinline__ static int64_t first_row() {
    return static_cast<int64_t>(blockIdx.x) * Shape::kRows;
  }
  __device__ __forceinline__ static int64_t first_column() {
    return static_cast<int64_t>(blockIdx.y) * Shape::kColumns;
  }
  __device__ __forceinline__ static int row_offset() {
    return warp() / Shape::kColumnWarps * Shape::kRowTiles * 16;
  }
  __device__ __forceinline__ static int column_offset() {
    return warp() % Shape::kColumnWarps * Shape::kFragments * 8;
  }

  // Adds what ranks [first, first + kDepth) of an adapter contribute.
  __device__ __forceinline__ void add_adapter(int index, int first) {
    const Adapter<T>& adapter = p_.adapters[index];
    const int ranks = min(Shape::kDepth, adapter.rank - first);
    Sums<1, kNarrowFragments> narrow = {};
    stages_.template walk<Shape::kDepth>(narrow, p_, first_row(), warp() * 16,
                                         adapter.a + static_cast<int64_t>(first) * p_.in_dim, ranks,
                                         0);
    store_narrow(narrow, index, adapter.scale);
    if (__syncthreads_or(!load_b(adapter, first, ranks))) {
      multiply_where_used(index, ranks);
    } else {
#pragma unroll 1
      for (int term = 0; term < 2; ++term) {
        stages_.multiply(sums_, stages_.x(term), row_offset(), stages_.matrix(0), column_offset());
      }
    }
  }

  // What the tensor cores do otherwise. They would let an infinite or NaN b through to the rows
  // that do not use the adapter, since times 0 it is NaN.
  __device__ __forceinline__ void multiply_where_used(int index, int ranks) {
#pragma unroll
    for (int r = 0; r < 2 * Shape::kRowTiles; ++r) {
      const int row = row_offset() + r * 8 + lane() / 4;
      if (first_row() + row >= p_.rows || !p_.uses(first_row() + row, index)) continue;
#pragma unroll
      for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = column_offset() + f * 8 + lane() % 4 * 2 + i;
          float& sum = sums_[r / 2][f][r % 2 * 2 + i];
#pragma unroll 1
          for (int rank = 0; rank < ranks; ++rank) {
            const float x = element(stages_.x(0), row, rank) + element(stages_.x(1), row, rank);
            sum = fmaf(x, element(stages_.matrix(0), column, rank), sum);
          }
        }
      }
    }
  }

  __device__ __forceinline__ static float element(const T* piece, int row, int column) {
    return to_float(piece[Shape::element(row, column / Shape::kPiece) + column % Shape::kPiece]);
  }

  // scale x a^T as two 16-bit terms in the places of x; zero for rows that do not use the adapter.
  __device__ __forceinline__ void store_narrow(const Sums<1, kNarrowFragments>& narrow, int index,
                                               float scale) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp() * 16 + half * 8 + lane() / 4;
      const bool used = first_row() + row < p_.rows && p_.uses(first_row() + row, index);
#pragma unroll
      for (int f = 0; f < kNarrowFragments; ++f) {
        float high[2], low[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = used ? narrow[0][f][half * 2 + i] * scale : 0.f;
          high[i] = to_float(from_float<T>(value));
          low[i] = value - high[i];
        }
        const unsigned target = Shape::element(row, f) + lane() % 4 * 2;
        store_elements(stages_.x(0) + target, high, 2, true);
        store_elements(stages_.x(1) + target, low, 2, true);
      }
    }
  }

  // b[first_column().., first..] in the place of the matrix, zero where it does not exist. Returns
  // whether all that this thread has loaded is finite.
  __device__ __forceinline__ bool load_b(const Adapter<T>& adapter, int first, int ranks) const {
    bool finite = true;
    for (int i = threadIdx.x; i < Shape::kColumns * Shape::kDepth; i += Shape::kThreads) {
      const int row = i / Shape::kDepth, rank = i % Shape::kDepth;
      const int64_t column = first_column() + row;
      const bool exists = column < p_.out_dim && rank < ranks;
      const unsigned target = Shape::element(row, rank / Shape::kPiece) + rank % Shape::kPiece;
      const T b = exists ? adapter.b[column * adapter.rank + first + rank] : from_float<T>(0.f);
      stages_.matrix(0)[target] = b;
      finite = finite && std::isfinite(to_float(b));
    }
    return finite;
  }

  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int f = 0; f < Shape::kFragments; ++f) {
      const int64_t column = first_column() + column_offset() + f * 8 + lane() % 4 * 2;
      const int columns = static_cast<int>(min(p_.out_dim - column, int64_t{2}));
      float bias[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (p_.bias && i < columns) bias[i] = to_float(p_.bias[column + i]);
      }
#pragma unroll
      for (int r = 0; r < 2 * Shape::kRowTiles; ++r) {
        const int64_t row = first_row() + row_offset() + r * 8 + lane() / 4;
        const float* sums = &sums_[r / 2][f][r % 2 * 2];
        const float pair[2] = {sums[0] + bias[0], sums[1] + bias[1]};
        if (row >= p_.rows) continue;
        store_elements(p_.out + row * p_.out_dim + column, pair, columns, p_.aligned_pairs);
      }
    }
  }

  const LinearParams<T>& p_;
  const Stages<Shape, T> stages_;
  Sums<Shape::kRowTiles, Shape::kFragments> sums_ = {};
};

template <typename Shape, typename T>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    linear_tile_kernel(const __grid_constant__ LinearParams<T> p) {
  extern __shared__ __align__(16) unsigned char smem_raw[];
  TileProduct<Shape, T>(p, smem_raw).run();
}

}  // namespace he::cuda
