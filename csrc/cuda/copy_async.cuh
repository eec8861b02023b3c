// Copies from global to shared memory that do not wait for the data (cp.async, sm_80), or that do, before sm_80.
#pragma once

#include <vector_types.h>

#include <cstdint>

namespace dsconv::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kAsynchronousCopies = false;
#else
constexpr bool kAsynchronousCopies = true;
#endif

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ inline void copy_async(float* shared, const float* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#else
  *shared = *global;
#endif
}

// 16 bytes of shared memory: the first `bytes` of them from global memory, zeros behind. Both addresses are multiples
// of 16, that of global memory also where no byte is read.
__device__ inline void copy_async_16(void* shared, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
#else
  uint4 all{};
  if (bytes == 16) all = *static_cast<const uint4*>(global);
  *static_cast<uint4*>(shared) = all;
  if (bytes == 16) return;
#pragma unroll 1
  for (int i = 0; i < bytes; ++i) static_cast<char*>(shared)[i] = static_cast<const char*>(global)[i];
#endif
}

// This thread's copies since the last commit become a group.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All groups of this thread but the last n are done; others see them after a barrier.
template <int n>
__device__ inline void wait_for_copies_but() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// All copies of this thread are done, committed or not; others see them after a barrier.
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace dsconv::cuda
