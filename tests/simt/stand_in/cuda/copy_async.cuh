// csrc/cuda/copy_async.cuh for the CPU. Inlined, so that the harness tells one copy of the source from another.
#pragma once

#include "simt/simt.h"

namespace dsconv::cuda {

constexpr bool kAsynchronousCopies = true;

__attribute__((always_inline)) inline void copy_async(float* shared, const float* global) {
  simt::copy_async(shared, global, sizeof *shared, sizeof *shared);
}
__attribute__((always_inline)) inline void copy_async_16(void* shared, const void* global, int bytes) {
  simt::copy_async(shared, global, 16, bytes);
}
inline void commit_copies() { simt::commit_copies(); }
template <int n>
void wait_for_copies_but() {
  simt::wait_for_copies_but(n);
}
inline void wait_for_copies() {
  simt::commit_copies();
  simt::wait_for_copies_but(0);
}

}  // namespace dsconv::cuda
