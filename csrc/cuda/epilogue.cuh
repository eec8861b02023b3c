// The activation of a thread's results.
#pragma once

#include "activations.h"

namespace dsconv::cuda {

// One copy of each activation for all kernels of a source, and loops that are not unrolled: inlined into every kernel
// they would be most of the library.
template <class T>
__device__ __noinline__ void activate_in_memory(T* values, int count, ActivationSpec activation) {
  with_activation(activation.kind, [&]<Activation kind>() {
#pragma unroll 1
    for (int i = 0; i < count; ++i) values[i] = activate<kind>(values[i], static_cast<T>(activation.param));
  });
}

// The cheap ones stay in registers.
template <int count, class T>
__device__ inline void activate_values(T (&values)[count], const ActivationSpec& activation) {
  const auto apply = [&]<Activation kind>() {
#pragma unroll
    for (int i = 0; i < count; ++i) values[i] = activate<kind>(values[i], T(0));
  };
  switch (activation.kind) {
    case Activation::none: return;
    case Activation::relu: return apply.template operator()<Activation::relu>();
    case Activation::relu6: return apply.template operator()<Activation::relu6>();
    default: break;
  }
  T copy[count + 1];  // of two arrays of one size nvcc makes one, in memory from the first sum on
#pragma unroll
  for (int i = 0; i < count; ++i) copy[i] = values[i];
  activate_in_memory(copy, count, activation);
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = copy[i];
}

}  // namespace dsconv::cuda
