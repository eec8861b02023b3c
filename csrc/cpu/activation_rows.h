// Activations and their derivatives over arrays of the compute type.
#pragma once

#include "unroll.h"

namespace dsconv::cpu::DSCONV_ISA {

template <class T>
__attribute__((noinline)) static void activate_row(ActivationSpec spec, T* values, int64_t count) {
  if (spec.kind == Activation::none) return;
  with_activation(spec.kind, [&]<Activation kind>() {
    const T param = static_cast<T>(spec.param);
    for (int64_t i = 0; i < count; ++i) values[i] = activate<kind>(values[i], param);
  });
}

// relu, relu6 and hardswish stay in registers; the others go through memory, a row of values at a time.
template <int kCount, class T>
DSCONV_INLINE void activate_vectors(ActivationSpec spec, Vec<T>* values) {
  if (spec.kind == Activation::none) return;
  const Vec<T> zero = splat(T(0)), six = splat(T(6));
  if (spec.kind == Activation::relu || spec.kind == Activation::relu6) {
    const bool bounded = spec.kind == Activation::relu6;
    unroll<kCount>([&]<int i>() __attribute__((always_inline)) {
      values[i] = at_least(values[i], zero);
      if (bounded) values[i] = at_most(values[i], six);
    });
    return;
  }
  if (spec.kind == Activation::hardswish) {
    const Vec<T> three = splat(T(3)), part = splat(sixth(T(1)));
    unroll<kCount>([&]<int i>() __attribute__((always_inline)) {
      values[i] *= at_most(at_least(values[i] + three, zero), six) * part;
    });
    return;
  }
  T memory[kCount * kLanes<T>];
  unroll<kCount>([&]<int i>() __attribute__((always_inline)) { store(memory + i * kLanes<T>, values[i]); });
  activate_row(spec, memory, kCount * kLanes<T>);
  unroll<kCount>([&]<int i>() __attribute__((always_inline)) { values[i] = load(memory + i * kLanes<T>); });
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
