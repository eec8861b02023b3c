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

// An activation as limits where they make it. The others are a call, which keeps them out of the registers of the loop.
template <class T>
struct Limits {
  const ActivationSpec& activation;
  bool any, others;
  T low, high;

  static bool make(const ActivationSpec& spec) { return spec.kind <= Activation::relu6; }
  explicit Limits(const ActivationSpec& spec)
      : activation(spec), any(spec.kind == Activation::relu || spec.kind == Activation::relu6), low(0) {
    others = !make(spec);
    high = spec.kind == Activation::relu6 ? T(6) : static_cast<T>(__builtin_inf());
  }
  // For activations that limits make (`make`).
  template <int kCount>
  __attribute__((always_inline)) void bound(Vec<T>* values) const {
    if (!any) return;
    unroll<kCount>([&]<int i>() __attribute__((always_inline)) {
      values[i] = at_most(at_least(values[i], splat(low)), splat(high));
    });
  }
  template <int kCount>
  __attribute__((always_inline)) void apply(Vec<T>* values) const {
    bound<kCount>(values);
    if (__builtin_expect(others, false)) {
      Vec<T> copy[kCount];  // the others' address is not taken
      unroll<kCount>([&]<int i>() __attribute__((always_inline)) { copy[i] = values[i]; });
      call<kCount>(activation, copy);
      unroll<kCount>([&]<int i>() __attribute__((always_inline)) { values[i] = copy[i]; });
    }
  }
  template <int kCount>
  __attribute__((noinline)) static void call(const ActivationSpec& spec, Vec<T>* values) {
    activate_vectors<kCount, T>(spec, values);
  }
};

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
