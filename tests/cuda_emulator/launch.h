// The part of the CUDA runtime that launches kernels; grid.cpp has the functions without templates.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <tuple>
#include <utility>

#include "shared_memory.h"

namespace he::emulator {

// Runs `body` as every thread of every block, one block after another.
cudaError_t run_grid(const void* kernel, const cudaLaunchConfig_t& config,
                     const std::function<void()>& body);

}  // namespace he::emulator

template <typename... Parameters, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Args&&... args) {
  const std::tuple<Parameters...> values(std::forward<Args>(args)...);
  return he::emulator::run_grid(reinterpret_cast<const void*>(kernel), *config,
                                [&] { std::apply(kernel, values); });
}

namespace he::cuda {
extern thread_local unsigned char smem_raw[];  // for kernels directly in he::cuda
namespace {                                    // for those in the unnamed namespace of this file
alignas(1024) thread_local unsigned char smem_raw[emulator::kDynamicArrayBytes];
[[maybe_unused]] const bool registered_smem_raw =
    emulator::register_dynamic_array([]() -> unsigned char* { return smem_raw; });
}  // namespace
}  // namespace he::cuda
