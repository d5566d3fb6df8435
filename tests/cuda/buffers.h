// Memory for one launch, in which every operand is an allocation that ends where its data ends: on
// a GPU, or under the emulator on the heap.
#pragma once

#include <cstdlib>
#include <vector>

#include "cuda/common.cuh"

namespace he::cuda {

#ifdef HE_CUDA_EMULATOR
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
  return memory;
}
inline void release(void* memory) { std::free(memory); }
inline void upload(void* memory, const void* data, size_t bytes) {
  std::memcpy(memory, data, bytes);
}
inline void finish() {}
#else
inline void* allocate(size_t bytes) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, bytes), "cannot allocate device memory");
  return memory;
}
inline void release(void* memory) { cudaFree(memory); }
inline void upload(void* memory, const void* data, size_t bytes) {
  check_cuda(cudaMemcpy(memory, data, bytes, cudaMemcpyHostToDevice), "cannot copy to the device");
}
inline void finish() { check_cuda(cudaDeviceSynchronize(), "a kernel failed"); }
#endif

// The memory of one launch.
class Buffers {
 public:
  Buffers() = default;
  Buffers(const Buffers&) = delete;
  ~Buffers() {
    for (void* memory : owned_) release(memory);
  }

  template <typename T>
  T* of(const std::vector<T>& values) {
    owned_.push_back(allocate(values.size() * sizeof(T)));
    upload(owned_.back(), values.data(), values.size() * sizeof(T));
    return static_cast<T*>(owned_.back());
  }

  // Numbers in [1, 2); `shift` elements behind a 16-byte boundary.
  void* numbers(DType dtype, int64_t count, int64_t shift = 0) {
    if (dtype == DType::kFloat32) {
      std::vector<uint32_t> bits(count + shift);
      for (uint32_t& b : bits) b = 0x3f800000u | (std::rand() & 0x7fffff);
      return of(bits) + shift;
    }
    const bool brain = dtype == DType::kBFloat16;
    std::vector<uint16_t> bits(count + shift);
    for (uint16_t& b : bits)
      b = brain ? 0x3f80 | (std::rand() & 0x7f) : 0x3c00 | (std::rand() & 0x3ff);
    return of(bits) + shift;
  }

 private:
  std::vector<void*> owned_;
};

using Sizes = std::vector<int64_t>;

}  // namespace he::cuda
