// Twins of the ldmatrix and mma.sync functions in csrc/cuda/ptx.cuh, which gives the layouts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

namespace he::emulator {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <int kMatrices, bool kTranspose>
void load_matrices(uint32_t (&fragment)[kMatrices], const void* row, Site site) {
  const char* operation = "ldmatrix";
  const int lane = current_lane();
  if (lane < kMatrices * 8) check_shared_row(operation, row);
  const Exchange& rows = exchange(operation, kWholeWarp, row, site);
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int along = lane % 4 * 2 + i, across = lane / 4;
      const int row_index = kTranspose ? along : across, column = kTranspose ? across : along;
      const auto* elements = rows.from<const uint16_t*>(matrix * 8 + row_index);
      pair[i] = elements[column];
    }
    fragment[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

template <typename T>
float element(uint32_t pair, int index) {
  const auto bits = static_cast<uint16_t>(pair >> index * 16);
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(value));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else {
    static_assert(std::is_same_v<T, __half>, "tensor core inputs are __nv_bfloat16 or __half");
    return __half2float(value);
  }
}

struct MmaInputs {
  uint32_t a[4], b[2];
};

constexpr int kDepth = 16;  // the k of m16n8k16

// Row `row` of a: four lanes hold it, registers 0 and 2 in the upper half, 1 and 3 in the lower.
template <typename T>
void gather_row(const Exchange& inputs, int row, float (&values)[kDepth]) {
  for (int q = 0; q < 4; ++q) {
    const auto lane = inputs.from<MmaInputs>(row % 8 * 4 + q);
    for (int i = 0; i < 4; ++i) {
      values[i / 2 * 8 + q * 2 + i % 2] = element<T>(lane.a[row / 8 + i / 2 * 2], i % 2);
    }
  }
}

template <typename T>
void gather_column(const Exchange& inputs, int column, float (&values)[kDepth]) {
  for (int q = 0; q < 4; ++q) {
    const auto lane = inputs.from<MmaInputs>(column * 4 + q);
    for (int i = 0; i < 4; ++i) {
      values[i / 2 * 8 + q * 2 + i % 2] = element<T>(lane.b[i / 2], i % 2);
    }
  }
}

}  // namespace he::emulator

namespace he::cuda {

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row,
                        emulator::Site site = emulator::Site::here()) {
  emulator::load_matrices<4, false>(fragment, row, site);
}

inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row,
                              emulator::Site site = emulator::Site::here()) {
  emulator::load_matrices<4, true>(fragment, row, site);
}

inline void ldmatrix_x2(uint32_t (&fragment)[2], const void* row,
                        emulator::Site site = emulator::Site::here()) {
  emulator::load_matrices<2, false>(fragment, row, site);
}

inline void ldmatrix_x2_trans(uint32_t (&fragment)[2], const void* row,
                              emulator::Site site = emulator::Site::here()) {
  emulator::load_matrices<2, true>(fragment, row, site);
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulator::Site site = emulator::Site::here()) {
  const emulator::MmaInputs mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const emulator::Exchange& inputs =
      emulator::exchange("mma.sync", emulator::kWholeWarp, mine, site);
  const int g = emulator::current_lane() / 4, q = emulator::current_lane() % 4;
  float rows[2][emulator::kDepth], columns[2][emulator::kDepth];
  for (int i = 0; i < 2; ++i) {
    emulator::gather_row<T>(inputs, g + 8 * i, rows[i]);
    emulator::gather_column<T>(inputs, 2 * q + i, columns[i]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < emulator::kDepth; ++k) c[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}

}  // namespace he::cuda
