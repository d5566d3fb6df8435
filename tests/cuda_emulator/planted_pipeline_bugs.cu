// A matrix product as kernels really do it: tensor cores fed by a double-buffered cp.async
// pipeline, from which one wait or one barrier is missing.
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"
#include "planted_bugs.h"

namespace he::cuda {
namespace {

enum class Bug { kNone, kMissingWait, kMissingBarrier };

constexpr int kTileM = 32, kTileN = 32, kTileK = 32;
constexpr int kThreads = 64;                  // two warps, one for each 16 rows of the tile
constexpr int kPackSize = 8;                  // elements in one cp.async
constexpr int kRowSize = kTileK + kPackSize;  // padded, so that ldmatrix has no bank conflicts
constexpr int kStages = 2;

struct Tile {
  __nv_bfloat16 rows[kTileM][kRowSize];
};

__device__ void load_tile(Tile& tile, const __nv_bfloat16* in, int first_row, int first_column,
                          int rows, int stride) {
  constexpr int kPacksPerRow = kTileK / kPackSize;
  for (int i = threadIdx.x; i < kTileM * kPacksPerRow; i += kThreads) {
    const int row = i / kPacksPerRow, column = i % kPacksPerRow * kPackSize;
    const bool valid = first_row + row < rows;
    const int64_t source = int64_t{valid ? first_row + row : 0} * stride + first_column + column;
    cp_async_16(&tile.rows[row][column], in + source, valid);
  }
}

__device__ void multiply_tiles(float (&c)[kTileN / 8][4], const Tile& a, const Tile& b) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int k = 0; k < kTileK; k += 16) {
    uint32_t a_fragment[4];
    ldmatrix_x4(a_fragment, &a.rows[warp * 16 + lane % 16][k + lane / 16 * 8]);
    for (int n = 0; n < kTileN / 8; ++n) {
      uint32_t b_fragment[2];
      ldmatrix_x2(b_fragment, &b.rows[n * 8 + lane % 8][k + lane / 8 % 2 * 8]);
      mma_m16n8k16<__nv_bfloat16>(c[n], a_fragment, b_fragment);
    }
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(kThreads) matmul_kernel(float* out,              // [m, n]
                                                          const __nv_bfloat16* a,  // [m, k]
                                                          const __nv_bfloat16* b,  // [n, k]
                                                          int m, int n, int k) {
  extern __shared__ __align__(16) unsigned char smem_raw[];
  auto* a_tiles = reinterpret_cast<Tile*>(smem_raw);
  Tile* b_tiles = a_tiles + kStages;
  const int row = blockIdx.y * kTileM, column = blockIdx.x * kTileN, steps = k / kTileK;
  const auto load = [&](int step) {
    load_tile(a_tiles[step % kStages], a, row, step * kTileK, m, k);
    load_tile(b_tiles[step % kStages], b, column, step * kTileK, n, k);
    cp_async_commit();
  };
  float c[kTileN / 8][4] = {};
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      cp_async_wait<kBug == Bug::kMissingWait ? 2 : 1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    multiply_tiles(c, a_tiles[step % kStages], b_tiles[step % kStages]);
    if constexpr (kBug != Bug::kMissingBarrier) __syncthreads();  // before the tile is refilled
  }
  const int lane = threadIdx.x % kWarpSize, first = row + threadIdx.x / kWarpSize * 16 + lane / 4;
  for (int i = 0; i < kTileN / 8 * 4; ++i) {
    const int y = first + i % 4 / 2 * 8, x = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (y < m && x < n) out[int64_t{y} * n + x] = c[i / 4][i % 4];
  }
}

template <Bug kBug>
void run_matmul() {
  constexpr int kM = 50, kN = 35, kK = 4 * kTileK;  // ragged in both directions
  std::vector<__nv_bfloat16> a(kM * kK), b(kN * kK);
  // Small integers, whose products and sums are exact.
  for (size_t i = 0; i < a.size(); ++i) a[i] = __float2bfloat16(static_cast<float>(i * 7 % 11) - 5);
  for (size_t i = 0; i < b.size(); ++i) b[i] = __float2bfloat16(static_cast<float>(i * 5 % 13) - 6);
  std::vector<float> out(kM * kN, NAN), expected(kM * kN);
  for (int i = 0; i < kM * kN; ++i) {
    for (int k = 0; k < kK; ++k) {
      expected[i] += __bfloat162float(a[i / kN * kK + k]) * __bfloat162float(b[i % kN * kK + k]);
    }
  }
  const dim3 grid(ceil_div(kN, kTileN), ceil_div(kM, kTileM));
  launch(matmul_kernel<kBug>, grid, kThreads, 2 * kStages * sizeof(Tile), nullptr, out.data(),
         a.data(), b.data(), kM, kN, kK);
  expect_equal(out, expected);
}

void missing_async_wait(bool broken) {
  broken ? run_matmul<Bug::kMissingWait>() : run_matmul<Bug::kNone>();
}

void missing_pipeline_barrier(bool broken) {
  broken ? run_matmul<Bug::kMissingBarrier>() : run_matmul<Bug::kNone>();
}

}  // namespace

std::vector<PlantedBug> pipeline_bugs() {
  return {
      {"missing_async_wait", missing_async_wait},
      {"missing_pipeline_barrier", missing_pipeline_barrier},
  };
}

}  // namespace he::cuda
