// Shared memory: the thread-local variables of the library that holds the kernels.
//
// `__shared__ float x[32];` becomes a thread-local variable, and `extern __shared__ ... smem_raw[]`
// names the thread-local array of the namespace around the kernel: he::cuda, or the unnamed
// namespace of a file in it. Nothing else in an emulated library may be thread-local.
#pragma once

#include <cstddef>
#include <string>

namespace he::emulator {

constexpr size_t kMaxDynamicSharedBytes = 227 * 1024;  // what sm_90 grants a block
constexpr size_t kRedZoneBytes = 1024;
constexpr size_t kDynamicArrayBytes = kMaxDynamicSharedBytes + kRedZoneBytes;

// Tells of an array of kDynamicArrayBytes called smem_raw; the function gives its address.
bool register_dynamic_array(unsigned char* (*address)());

// Fills all shared memory with 0xff bytes: NaN in every float type, -1 in every integer.
void poison_shared_memory(size_t dynamic_bytes);

// Says whether a block wrote behind its dynamic shared memory; "" if not.
std::string shared_memory_overrun(size_t dynamic_bytes);

}  // namespace he::emulator
