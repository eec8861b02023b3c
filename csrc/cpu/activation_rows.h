// Activations and their derivatives over arrays of the compute type.
#pragma once

#include "vec.h"

namespace dsconv::cpu::DSCONV_ISA {

template <class T>
__attribute__((noinline)) static void activate_row(ActivationSpec spec, T* values, int64_t count) {
  if (spec.kind == Activation::none) return;
  with_activation(spec.kind, [&]<Activation kind>() {
    const T param = static_cast<T>(spec.param);
    for (int64_t i = 0; i < count; ++i) values[i] = activate<kind>(values[i], param);
  });
}

template <class T>
static void mask_row(ActivationSpec spec, T* gradient, const T* saved, int64_t count) {
  with_activation(spec.kind, [&]<Activation kind>() {
    const T param = static_cast<T>(spec.param);
    if (derivative_from_output(spec)) {
      for (int64_t i = 0; i < count; ++i) gradient[i] = masked_gradient<kind, true>(gradient[i], saved[i], param);
    } else {
      for (int64_t i = 0; i < count; ++i) gradient[i] = masked_gradient<kind, false>(gradient[i], saved[i], param);
    }
  });
}

}  // namespace dsconv::cpu::DSCONV_ISA
