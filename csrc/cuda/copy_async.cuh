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

// The copies of this thread are done; others see them after a barrier.
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace dsconv::cuda
