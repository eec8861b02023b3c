#include "cuda/device.h"

#include <cuda_runtime_api.h>

#include <array>
#include <mutex>
#include <optional>
#include <stdexcept>

namespace dsconv::cuda {
namespace {

// Loading this kernel tells whether the binary holds code (SASS, or PTX to compile) for the current device.
__global__ void probe() {}

Machine describe(int device) {
  Machine none{Target::cuda, 0, 1, 1, 1, 0, 1};
  int previous = 0;
  if (cudaGetDevice(&previous) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) {
    cudaGetLastError();
    return none;
  }
  cudaFuncAttributes attributes;
  const bool loads = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  cudaDeviceProp properties;
  const bool known = cudaGetDeviceProperties(&properties, device) == cudaSuccess;
  int core_khz = 0, memory_khz = 0;
  cudaDeviceGetAttribute(&core_khz, cudaDevAttrClockRate, device);
  cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, device);
  cudaGetLastError();
  cudaSetDevice(previous);
  if (!loads || !known) return none;
  const int sm = properties.major * 10 + properties.minor;
  // fp32 lanes per multiprocessor: 64 on Turing and GA100, 128 since.
  const double lanes = sm == 75 || sm == 80 ? 64 : 128;
  const double peak = 2e-6 * lanes * properties.multiProcessorCount * core_khz;
  const double memory = 2e-6 * memory_khz * properties.memoryBusWidth / 8;
  return {Target::cuda,
          sm,
          peak,
          3 * memory,
          memory,
          properties.l2CacheSize,
          properties.multiProcessorCount,
          static_cast<int64_t>(properties.sharedMemPerMultiprocessor)};
}

}  // namespace

const Machine& machine(int device) {
  static std::mutex mutex;
  static std::array<std::optional<Machine>, 64> machines;
  const std::lock_guard<std::mutex> lock(mutex);
  std::optional<Machine>& slot = machines.at(device);
  if (!slot) slot = describe(device);
  return *slot;
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("dsconv: launch of ") + kernel + " failed: " + cudaGetErrorString(error));
}

}  // namespace dsconv::cuda
