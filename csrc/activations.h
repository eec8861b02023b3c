// Activations and their derivatives, one value at a time, for every target. Values at kinks and for NaN are ATen's.
// Everything is static and always inlined: an ISA-specific object must not share a copy with the others.
#pragma once

#include <math.h>
#include <string.h>

#include "geometry.h"

#define DSCONV_SCALAR DSCONV_HD static inline __attribute__((always_inline))

namespace dsconv {

DSCONV_SCALAR uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
DSCONV_SCALAR float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

// exp to about 1 ulp without branches, so that loops over it vectorise: 2^n * exp(r), |r| <= ln2/2, polynomial of
// degree 6 (Cephes).
DSCONV_SCALAR float fast_exp(float x) {
  const float clamped = x < -87.3f ? -87.3f : x > 88.72f ? 88.72f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low mantissa bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // The scale is applied in two halves: 2^128 alone would not be a float.
  const int32_t k = static_cast<int32_t>(bits_of(shifted)) - 0x4b400000, half = k >> 1;
  const float low = float_of(static_cast<uint32_t>(half + 127) << 23),
              high = float_of(static_cast<uint32_t>(k - half + 127) << 23);
  const float y = p * low * high;
  return x != x ? x : x > 88.72f ? INFINITY : x < -87.3f ? 0.0f : y;
}
#if defined(__CUDA_ARCH__)
DSCONV_SCALAR float exponential(float x) { return expf(x); }
#else
DSCONV_SCALAR float exponential(float x) { return fast_exp(x); }
#endif
DSCONV_SCALAR double exponential(double x) { return exp(x); }
DSCONV_SCALAR float error_function(float x) { return erff(x); }
DSCONV_SCALAR double error_function(double x) { return erf(x); }
DSCONV_SCALAR float hyperbolic_tangent(float x) { return tanhf(x); }
DSCONV_SCALAR double hyperbolic_tangent(double x) { return ::tanh(x); }
DSCONV_SCALAR float exp_minus_one(float x) { return expm1f(x); }
DSCONV_SCALAR double exp_minus_one(double x) { return expm1(x); }

template <class T>
DSCONV_SCALAR T logistic(T x) {
  return T(1) / (T(1) + exponential(-x));
}
template <class T>
DSCONV_SCALAR T clamp_0_6(T x) {  // NaN stays NaN
  return x < T(0) ? T(0) : x > T(6) ? T(6) : x;
}

constexpr double kSqrtHalf = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794,
                 kSqrt2OverPi = 0.79788456080286535588;

template <class T>
DSCONV_SCALAR T gelu_tanh_argument(T x) {
  return T(kSqrt2OverPi) * (x + T(0.044715) * x * x * x);
}

template <Activation kind, class T>
DSCONV_SCALAR T activate(T x, T param) {
  if constexpr (kind == Activation::relu) return x < T(0) ? T(0) : x;
  if constexpr (kind == Activation::relu6) return clamp_0_6(x);
  if constexpr (kind == Activation::hardswish) return x * clamp_0_6(x + T(3)) / T(6);
  if constexpr (kind == Activation::hardsigmoid) return clamp_0_6(x + T(3)) / T(6);
  if constexpr (kind == Activation::silu) return x / (T(1) + exponential(-x));
  if constexpr (kind == Activation::gelu) return T(0.5) * x * (T(1) + error_function(x * T(kSqrtHalf)));
  if constexpr (kind == Activation::gelu_tanh) return T(0.5) * x * (T(1) + hyperbolic_tangent(gelu_tanh_argument(x)));
  if constexpr (kind == Activation::leaky_relu) return x > T(0) ? x : x * param;
  if constexpr (kind == Activation::sigmoid) return logistic(x);
  if constexpr (kind == Activation::tanh) return hyperbolic_tangent(x);
  if constexpr (kind == Activation::elu) return x > T(0) ? x : param * exp_minus_one(x);
  return x;
}

// d activation / d pre-activation, times the gradient g. `saved` is the output where derivative_from_output() says so,
// else the pre-activation. Comparisons are written as ATen writes them: they decide what a NaN does.
template <Activation kind, bool from_output, class T>
DSCONV_SCALAR T masked_gradient(T g, T saved, T param) {
  const T s = saved;
  if constexpr (kind == Activation::relu) return s <= T(0) ? T(0) : g;
  if constexpr (kind == Activation::relu6) return s <= T(0) || s >= T(6) ? T(0) : g;
  if constexpr (kind == Activation::hardsigmoid)
    return s > T(from_output ? 0 : -3) && s < T(from_output ? 1 : 3) ? g / T(6) : T(0);
  if constexpr (kind == Activation::sigmoid) return g * (T(1) - s) * s;
  if constexpr (kind == Activation::tanh) return g * (T(1) - s * s);
  if constexpr (kind == Activation::leaky_relu) return s > T(0) ? g : g * param;
  if constexpr (kind == Activation::elu) return s > T(0) ? g : g * (from_output ? s + param : param * exponential(s));
  if constexpr (kind == Activation::hardswish) return s <= T(-3) ? T(0) : s < T(3) ? g * (s / T(3) + T(0.5)) : g;
  if constexpr (kind == Activation::silu) {
    const T sigmoid = logistic(s);
    return g * sigmoid * (T(1) + s * (T(1) - sigmoid));
  }
  if constexpr (kind == Activation::gelu) {
    const T cdf = T(0.5) * (T(1) + error_function(s * T(kSqrtHalf)));
    return g * (cdf + s * T(kInvSqrt2Pi) * exponential(T(-0.5) * s * s));
  }
  if constexpr (kind == Activation::gelu_tanh) {
    const T t = hyperbolic_tangent(gelu_tanh_argument(s));
    const T inner = T(kSqrt2OverPi) * (T(1) + T(3 * 0.044715) * s * s);
    return g * (T(0.5) * (T(1) + t) + T(0.5) * s * (T(1) - t * t) * inner);
  }
  return g;
}

// Calls fn.template operator()<kind>() for the run-time kind.
template <class Fn>
DSCONV_SCALAR void with_activation(Activation kind, Fn fn) {
  switch (kind) {
#define DSCONV_CASE(name) \
  case Activation::name: return fn.template operator()<Activation::name>();
    DSCONV_CASE(none)
    DSCONV_CASE(relu)
    DSCONV_CASE(relu6)
    DSCONV_CASE(hardswish)
    DSCONV_CASE(hardsigmoid)
    DSCONV_CASE(silu)
    DSCONV_CASE(gelu)
    DSCONV_CASE(gelu_tanh)
    DSCONV_CASE(leaky_relu)
    DSCONV_CASE(sigmoid)
    DSCONV_CASE(tanh)
    DSCONV_CASE(elu)
#undef DSCONV_CASE
  }
}

}  // namespace dsconv
