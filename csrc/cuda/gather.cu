// Unpacks an all-gathered bucket, one launch for up to 32 entries: they travel in the kernel's
// parameters, so nothing is copied to the device first. Every block works on one entry. A thread
// moves 8 neighbours of a destination row at a time, through fp32: one or two 16-byte accesses on
// either side where both are aligned and no rank's part ends between them. Where a low-rank product
// is added, a thread has 4 rows of 8, so that each element of a factor is used 4 times once loaded.
// Every element is read once and written once. Types are told apart at run time: 2 instantiations,
// with and without low-rank products, which take registers that plain copies need for occupancy.
#include <algorithm>

#include "cuda/vector.cuh"

namespace he::cuda {
namespace {

constexpr int kThreads = 256, kUnitsPerThread = 2;
constexpr int kRun = 8;         // elements that a thread moves together
constexpr int kMergedRows = 4;  // rows of them where a low-rank product is added
constexpr int kMaxEntries = 32;

// How the slice of an entry is cut: lines of the destination, in units of `height` lines by kRun.
struct Units {
  int64_t lines, length, height, runs;

  explicit __host__ __device__ Units(const UnpackEntry& entry) {
    const int64_t rows = entry.row_end - entry.row_begin;
    const int64_t width = entry.column_end - entry.column_begin;
    const bool merged = entry.lora_a != nullptr;
    const bool flat = !merged && width == entry.columns;  // the rows lie behind each other
    lines = flat ? 1 : rows;
    length = flat ? rows * width : width;
    height = merged ? kMergedRows : 1;
    runs = ceil_div<int64_t>(length, kRun);
  }

  __host__ __device__ int64_t count() const { return ceil_div(lines, height) * runs; }
};

struct Batch {
  const void* bucket;  // [world, rank_length]
  int64_t rank_length;
  UnpackEntry entries[kMaxEntries];
  unsigned first_block[kMaxEntries];  // of each entry; of those behind the last: all blocks
  DType dtype;
};
static_assert(sizeof(Batch) <= 4096, "kernel parameters are limited");

template <typename Body>
__device__ __forceinline__ void device_dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    case DType::kFloat16:
      return body(__half{});
  }
}

__device__ __forceinline__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(uint4) == 0;
}

// `count` neighbours, of at most kRun.
template <typename T>
__device__ __forceinline__ void load_run(float (&values)[kRun], const T* source, int count) {
  const bool aligned = is_aligned(source);
#pragma unroll
  for (int j = 0; j < kRun; j += Pack<T>::kSize) {
    load_floats(values + j, source + j, count - j, aligned);
  }
}

__device__ __forceinline__ void store_run(void* destination, int64_t place, DType dtype,
                                          const float (&values)[kRun], int count) {
  device_dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    T* to = static_cast<T*>(destination) + place;
    const bool aligned = is_aligned(to);
#pragma unroll
    for (int j = 0; j < kRun; j += Pack<T>::kSize) {
      store_floats(to + j, values + j, count - j, aligned);
    }
  });
}

// Elements [i, i + count) of the flat parameter, from whichever ranks have them.
__device__ __forceinline__ void gather_run(float (&values)[kRun], const Batch& batch,
                                           const UnpackEntry& entry, int64_t i, int count) {
  const int64_t rank = i / entry.partition;
  int64_t offset = i - rank * entry.partition;
  device_dispatch(batch.dtype, [&](auto t) {
    using T = decltype(t);
    const T* part = static_cast<const T*>(batch.bucket) + rank * batch.rank_length + entry.source;
    if (offset + count <= entry.partition) return load_run(values, part + offset, count);
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      if (offset == entry.partition) {
        offset = 0;
        part += batch.rank_length;
      }
      if (j < count) values[j] = to_float(part[offset++]);
    }
  });
}

// products = lora_b[row.., :] lora_a[:, column..column + count)
__device__ __forceinline__ void multiply_factors(float (&products)[kMergedRows][kRun],
                                                 const UnpackEntry& entry, int64_t row,
                                                 int64_t column, int rows, int count) {
  device_dispatch(entry.lora_dtype, [&](auto t) {
    using T = decltype(t);
    const T* a = static_cast<const T*>(entry.lora_a) + column;
    const T* b = static_cast<const T*>(entry.lora_b) + row * entry.lora_rank;
    for (int64_t r = 0; r < entry.lora_rank; ++r, a += entry.columns) {
      float run[kRun];
      load_run(run, a, count);
#pragma unroll
      for (int line = 0; line < kMergedRows; ++line) {
        const float weight = line < rows ? to_float(b[line * entry.lora_rank + r]) : 0.f;
#pragma unroll
        for (int j = 0; j < kRun; ++j) products[line][j] = fmaf(weight, run[j], products[line][j]);
      }
    }
  });
}

template <bool kMerging>
__global__ void __launch_bounds__(kThreads, kMerging ? 2 : 4)
    unpack_kernel(const __grid_constant__ Batch batch) {
  constexpr int kRows = kMerging ? kMergedRows : 1;
  int number = 0;
  while (number + 1 < kMaxEntries && blockIdx.x >= batch.first_block[number + 1]) ++number;
  const UnpackEntry& entry = batch.entries[number];
  const Units units(entry);
  const int64_t block = blockIdx.x - batch.first_block[number];
  for (int step = 0; step < kUnitsPerThread; ++step) {
    const int64_t unit = (block * kUnitsPerThread + step) * kThreads + threadIdx.x;
    if (unit >= units.count()) return;
    const int64_t group = unit / units.runs, begin = (unit - group * units.runs) * kRun;
    const int64_t line = group * units.height, row = entry.row_begin + line;
    const int64_t column = entry.column_begin + begin;
    const int lines = static_cast<int>(min(units.height, units.lines - line));
    const int count = static_cast<int>(min(int64_t{kRun}, units.length - begin));
    float products[kRows][kRun] = {};
    if constexpr (kMerging) {
      if (entry.lora_a) multiply_factors(products, entry, row, column, lines, count);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= lines) break;
      float values[kRun];
      gather_run(values, batch, entry, (row + i) * entry.columns + column, count);
      if (kMerging && entry.lora_a) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
          values[j] = fmaf(entry.lora_scale, products[i][j], values[j]);
        }
      }
      store_run(entry.destination, (line + i) * units.length + begin, entry.dtype, values, count);
    }
  }
}

void launch_batch(const GatherUnpack& a, int64_t begin, int64_t end, Stream stream) {
  Batch batch{a.bucket, a.rank_length, {}, {}, a.dtype};
  int64_t blocks = 0;
  bool merging = false;
  for (int64_t i = 0; i < kMaxEntries; ++i) {
    batch.first_block[i] = grid_of(blocks).x;
    if (begin + i >= end) continue;
    batch.entries[i] = a.entries[begin + i];
    merging |= batch.entries[i].lora_a != nullptr;
    blocks += ceil_div<int64_t>(Units(batch.entries[i]).count(), kThreads * kUnitsPerThread);
  }
  if (blocks == 0) return;
  launch(merging ? unpack_kernel<true> : unpack_kernel<false>, grid_of(blocks), kThreads, 0, stream,
         batch);
}

}  // namespace

void gather_unpack(const GatherUnpack& args, Stream stream) {
  for (int64_t begin = 0; begin < args.num_entries; begin += kMaxEntries) {
    launch_batch(args, begin, std::min(begin + kMaxEntries, args.num_entries), stream);
  }
}

}  // namespace he::cuda
