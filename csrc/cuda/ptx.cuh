// Instructions that CUDA C++ has no name for: cp.async, ex2, ldmatrix and mma.sync (sm_80 and
// later).
// This is the only file with inline PTX; the emulator has a C++ twin of each function.
#pragma once

#include "cuda/common.cuh"

#ifdef HE_CUDA_EMULATOR
#include "async_copy.h"
#include "tensor_core.h"
#else

namespace he::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- cp.async -----------------------------------------------------------------------------------

// Copies 16 bytes past the registers; both pointers 16-byte aligned. Where `valid` is false it
// writes zeros, and `global` must still be an address that exists.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group: the copies that this thread has issued since the last commit.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPendingGroups` of this thread's groups are unfinished. Other threads see
// the data after a __syncthreads() that follows.
template <int kPendingGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPendingGroups) : "memory");
}

// ---- arithmetic ---------------------------------------------------------------------------------

// 2^x within 2 units in the last place, one instruction where exp2f takes four: subnormal results
// are 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- ldmatrix -----------------------------------------------------------------------------------

// Loads 8x8 matrices of 16-bit elements from shared memory into the fragments of mma.sync. Lanes
// 8 i to 8 i + 7 point at the rows of matrix i, each 16 bytes and 16-byte aligned. Register i of
// lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix i, `trans`: of column.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&fragment)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&fragment)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
}

// ---- mma.sync -----------------------------------------------------------------------------------

// c[16x8] += a[16x16] * b[16x8] over the warp, accumulated in fp32. T is the type of a and b:
// __nv_bfloat16 or __half. With g = lane / 4 and q = lane % 4, two elements to a register:
//   a[0]: row g, columns 2 q..     a[1]: row g + 8     a[2], a[3]: the same, columns 2 q + 8..
//   b[0]: rows 2 q.., column g     b[1]: rows 2 q + 8..
//   c[0], c[1]: row g, columns 2 q, 2 q + 1            c[2], c[3]: row g + 8
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __half>, "tensor core inputs are __nv_bfloat16 or __half");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace he::cuda

#endif  // HE_CUDA_EMULATOR
