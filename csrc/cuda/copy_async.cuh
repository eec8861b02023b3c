// Copies from global to shared memory that do not wait for the data (cp.async, sm_80), or that do, before sm_80.
#pragma once

namespace dsconv::cuda {

__device__ inline void copy_async(float* shared, const float* global) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
#else
  *shared = *global;
#endif
}

// 16 bytes of shared memory: the first `bytes` of them from global memory, zeros behind. Both addresses are multiples
// of 16, that of global memory also where no byte is read.
__device__ inline void copy_async_16(void* shared, const void* global, int bytes) {
#if __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
  uint4 all{};
  if (bytes == 16) all = *static_cast<const uint4*>(global);
  *static_cast<uint4*>(shared) = all;
  if (bytes == 16) return;
#pragma unroll 1
  for (int i = 0; i < bytes; ++i) static_cast<char*>(shared)[i] = static_cast<const char*>(global)[i];
#endif
}

// The copies of this thread are done; others see them after a barrier.
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace dsconv::cuda
