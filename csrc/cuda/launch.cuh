// A launch, and the shared memory it asked for. What g++ cannot compile is here, in copy_async.cuh and in mma.cuh, and
// nowhere else: tests/simt has headers of the same names that run kernels on the CPU.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "problem.h"

namespace dsconv::cuda {

// Shared memory that a block gets without asking.
constexpr int64_t kUsualSharedBytes = 48 << 10;

// Kernels take one struct by value. Blocks go on grid.x alone, whose limit is 2^31 - 1.
template <class Parameters>
void launch(const char* name, void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared_bytes,
            const Runtime& runtime, const Parameters& parameters) {
  if (shared_bytes > kUsualSharedBytes)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(runtime.stream)>>>(
      parameters);
  check_launch(name);
}

// The number, of which the compiler then knows nothing.
__device__ inline int opaque(int number) {
  asm volatile("" : "+r"(number));
  return number;
}

// The dynamic shared memory of the block, aligned for vectors.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ uint4 dsconv_shared[];
  return reinterpret_cast<T*>(dsconv_shared);
}

}  // namespace dsconv::cuda
