// A linear layer for few rows, which is bound by reading the weights once. A block takes a few
// columns of the result: all its warps read the same rows of the weight matrix, each another part
// of the inner dimension, and meet in shared memory. An adapter is two such products, the first
// with a, whose result, kept in fp32, never leaves shared memory; every block computes it again for
// itself.
//
// An engine says how the products are formed:
//   kRows, kColumns, kThreads   of a block
//   kBlocks                     that a multiprocessor should hold
//   multiply<T>(p, first_row, matrix, columns, products)
// The last is for all threads and leaves products[r][c] = x row . matrix row c in shared memory; it
// has a barrier before it writes and one after.
#pragma once

#include "cuda/linear_params.cuh"

namespace he::cuda {

template <typename Engine, typename T>
class RowsProduct {
 public:
  using Products = float[Engine::kRows][Engine::kColumns];

  __device__ __forceinline__ RowsProduct(const LinearParams<T>& p, Products& products)
      : p_(p), products_(products) {
    const int64_t column_tiles = ceil_div<int64_t>(p.out_dim, Engine::kColumns);
    first_row_ = blockIdx.x / column_tiles * Engine::kRows;
    first_column_ = blockIdx.x % column_tiles * Engine::kColumns;
  }

  __device__ __forceinline__ void run() {
    const unsigned used = p_.template used_adapters<Engine::kRows>(first_row_);
    for (int i = 0; i < p_.num_adapters; ++i) {
      if (used >> i & 1) add_adapter(i);
    }
    const int columns =
        static_cast<int>(min(p_.out_dim - first_column_, int64_t{Engine::kColumns}));
    Engine::multiply(p_, first_row_, p_.weight + first_column_ * p_.in_dim, columns, products_);
    for_each_own([&](int i, int row, int64_t packed_row, int column, int64_t packed_column) {
      float sum = own_[i] + products_[row][column];
      if (p_.bias) sum += to_float(p_.bias[packed_column]);
      p_.out[packed_row * p_.out_dim + packed_column] = from_float<T>(sum);
    });
  }

 private:
  static constexpr int kOwn = ceil_div(Engine::kRows * Engine::kColumns, Engine::kThreads);

  // Calls body(i, row, row in x, column, column in out) for the results of this thread that exist.
  template <typename Body>
  __device__ __forceinline__ void for_each_own(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int index = threadIdx.x + i * Engine::kThreads;
      const int row = index / Engine::kColumns, column = index % Engine::kColumns;
      const int64_t packed_row = first_row_ + row, packed_column = first_column_ + column;
      if (row < Engine::kRows && packed_row < p_.rows && packed_column < p_.out_dim) {
        body(i, row, packed_row, column, packed_column);
      }
    }
  }

  __device__ __forceinline__ void add_adapter(int index) {
    const Adapter<T>& adapter = p_.adapters[index];
    float sums[kOwn] = {};  // x a^T b^T
    for (int first = 0; first < adapter.rank; first += Engine::kColumns) {
      const int ranks = min(Engine::kColumns, adapter.rank - first);
      const T* a = adapter.a + static_cast<int64_t>(first) * p_.in_dim;
      Engine::multiply(p_, first_row_, a, ranks, products_);
      for_each_own([&](int i, int row, int64_t, int, int64_t packed_column) {
        const T* b = adapter.b + packed_column * adapter.rank + first;
        for (int r = 0; r < ranks; ++r) sums[i] = fmaf(products_[row][r], to_float(b[r]), sums[i]);
      });
    }
    for_each_own([&](int i, int, int64_t packed_row, int, int64_t) {
      if (p_.uses(packed_row, index)) own_[i] += adapter.scale * sums[i];
    });
  }

  const LinearParams<T>& p_;
  Products& products_;
  int64_t first_row_, first_column_;
  float own_[kOwn] = {};
};

template <typename Engine, typename T>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    linear_rows_kernel(const __grid_constant__ LinearParams<T> p) {
  __shared__ typename RowsProduct<Engine, T>::Products products;
  RowsProduct<Engine, T>(p, products).run();
}

}  // namespace he::cuda
