// Grids of blocks, and the few functions of the CUDA runtime that launchers call.
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <vector>

#include "block.h"
#include "builtin_variables.h"
#include "launch.h"
#include "shared_memory.h"

namespace he::emulator {
namespace {

constexpr unsigned kMaxThreads = 1024, kMaxBlockDepth = 64, kMaxGridHeight = 65535;
constexpr unsigned kMaxGridWidth = 0x7fffffff;
constexpr size_t kGrantedSharedBytes = 48 * 1024;  // more only after cudaFuncSetAttribute
constexpr int kMultiprocessors = 4;  // few, so that launchers that fill the machine stay small

std::mutex launch_mutex;
std::string last_error;
std::map<const void*, size_t> granted_shared_bytes;

cudaError_t error(cudaError_t code, std::string message) {
  last_error = std::move(message);
  return code;
}

std::string to_string(const dim3& dim) {
  return "(" + std::to_string(dim.x) + ", " + std::to_string(dim.y) + ", " + std::to_string(dim.z) +
         ")";
}

cudaError_t check_config(const void* kernel, const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const auto exceeds = [](unsigned value, unsigned limit) { return value == 0 || value > limit; };
  if (exceeds(grid.x, kMaxGridWidth) || exceeds(grid.y, kMaxGridHeight) ||
      exceeds(grid.z, kMaxGridHeight)) {
    return error(cudaErrorInvalidConfiguration, "invalid grid " + to_string(grid));
  }
  if (exceeds(block.x, kMaxThreads) || exceeds(block.y, kMaxThreads) ||
      exceeds(block.z, kMaxBlockDepth) || exceeds(block.x * block.y * block.z, kMaxThreads)) {
    return error(cudaErrorInvalidConfiguration, "invalid block " + to_string(block));
  }
  const auto granted = granted_shared_bytes.find(kernel);
  const size_t limit =
      granted == granted_shared_bytes.end() ? kGrantedSharedBytes : granted->second;
  if (config.dynamicSmemBytes > limit) {
    return error(cudaErrorInvalidValue, std::to_string(config.dynamicSmemBytes) +
                                            " bytes of dynamic shared memory, where " +
                                            std::to_string(limit) + " are granted");
  }
  return cudaSuccess;
}

std::string run_block(const dim3& grid, int index, const cudaLaunchConfig_t& config,
                      const std::function<void()>& body, Turns& turns) {
  blockIdx = uint3{index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y)};
  poison_shared_memory(config.dynamicSmemBytes);
  std::string problem = Block::current().run(config.blockDim, body, turns);
  if (problem.empty()) problem = shared_memory_overrun(config.dynamicSmemBytes);
  if (problem.empty()) return "";
  return problem + " [block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
         ", " + std::to_string(blockIdx.z) + "]";
}

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

cudaError_t run_grid(const void* kernel, const cudaLaunchConfig_t& config,
                     const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  if (const cudaError_t status = check_config(kernel, config); status != cudaSuccess) return status;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  Turns turns(settings());
  std::vector<int> blocks(gridDim.x * gridDim.y * gridDim.z);
  turns.arrange(blocks);
  for (int block : blocks) {
    std::string problem = run_block(gridDim, block, config, body, turns);
    if (!problem.empty()) return error(cudaErrorLaunchFailure, std::move(problem));
  }
  return cudaSuccess;
}

}  // namespace he::emulator

extern "C" {

// Sets how the launches that follow run; nonzero if a value is out of range.
__attribute__((visibility("default"))) int he_emulator_configure(int order, uint64_t seed,
                                                                 int async_policy) {
  using namespace he::emulator;
  if (order < 0 || order > static_cast<int>(Order::kGreedy)) return 1;
  if (async_policy < 0 || async_policy > static_cast<int>(AsyncPolicy::kEager)) return 1;
  settings() = {static_cast<Order>(order), seed, static_cast<AsyncPolicy>(async_policy)};
  return 0;
}

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : he::emulator::last_error.c_str();
}

cudaError_t cudaGetLastError() { return cudaSuccess; }  // launches report their errors themselves

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > static_cast<int>(he::emulator::kMaxDynamicSharedBytes)) {
    return he::emulator::error(cudaErrorInvalidValue,
                               std::to_string(value) + " bytes of dynamic shared memory");
  }
  const std::lock_guard<std::mutex> lock(he::emulator::launch_mutex);
  he::emulator::granted_shared_bytes[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* destination, int value, size_t bytes, cudaStream_t) {
  std::memset(destination, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(destination, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = he::emulator::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(he::emulator::kMaxDynamicSharedBytes);
      return cudaSuccess;
    default:
      return he::emulator::error(cudaErrorInvalidValue,
                                 "a device attribute that the emulator lacks");
  }
}

}  // extern "C"
