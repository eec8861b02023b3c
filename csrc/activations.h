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

// The fast_ functions are right to 1 to 3 ulp and have no branches, so that loops over them vectorise.

// exp(x) = scale * (1 + rest) for x <= 0 (larger ones mean nothing), with scale = 2^n and |rest| < 0.42. Below the normal
// numbers the scale is zero.
struct Exponential {
  float scale, rest;
};
DSCONV_SCALAR Exponential split_exp(float x) {
  const float bounded = x < -88.0f ? -88.0f : x;  // n >= -127, of which the scale is zero
  // 1.5 * 2^23 + 127: n + 127 lands in the low mantissa bits.
  const float shifted = bounded * 1.44269504f + 12583039.0f;
  const float n = shifted - 12583039.0f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // |r| <= ln2 / 2
  float p = 1.9875691500e-4f;                                         // polynomial of degree 6 (Cephes)
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {float_of(bits_of(shifted) << 23), p * r * r + r};
}
// Both for x <= 0.
DSCONV_SCALAR float fast_exp(float x) {
  const Exponential e = split_exp(x);
  return e.rest * e.scale + e.scale;
}
DSCONV_SCALAR float fast_exp_minus_one(float x) {
  const Exponential e = split_exp(x);
  return e.rest * e.scale + (e.scale - 1.0f);
}
// Polynomials of the next two: our own fits, minimax by reweighted least squares.
DSCONV_SCALAR float fast_tanh(float x) {
  const float magnitude = fabsf(x), z = x * x;
  float p = -5.717036562e-3f;  // (tanh(x) / x - 1) / z up to 0.625
  p = p * z + 2.065057900e-2f;
  p = p * z - 5.374349526e-2f;
  p = p * z + 1.333149125e-1f;
  p = p * z - 3.333328392e-1f;
  const float e = fast_exp(-2.0f * magnitude), small = x + x * z * p, large = 1.0f - 2.0f * e / (1.0f + e);
  return magnitude < 0.625f ? small : x < 0.0f ? -large : large;
}
DSCONV_SCALAR float fast_erf(float x) {
  const float magnitude = fabsf(x), z = x * x;
  float p = 7.853857422e-5f;  // erf(x) / x - 1 up to 1
  p = p * z - 8.010192434e-4f;
  p = p * z + 5.188327550e-3f;
  p = p * z - 2.685381186e-2f;
  p = p * z + 1.128358515e-1f;
  p = p * z - 3.761262582e-1f;
  p = p * z + 1.283791660e-1f;
  const float t = magnitude > 3.95f ? 3.95f : magnitude;  // beyond, erf is 1
  float q = 2.241751405e-7f;                              // -log(1 - erf(t)) from 1 on
  q = q * t + 1.850257480e-5f;
  q = q * t - 4.219647304e-4f;
  q = q * t + 4.138620653e-3f;
  q = q * t - 2.507083480e-2f;
  q = q * t + 1.082389563e-1f;
  q = q * t + 6.333637690e-1f;
  q = q * t + 1.129513816e+0f;
  q = q * t - 1.755789266e-4f;
  const float small = x + x * p, large = 1.0f - fast_exp(-q);
  return magnitude < 1.0f ? small : x < 0.0f ? -large : large;
}
// exponential and exp_minus_one are for x <= 0.
#if defined(__CUDA_ARCH__)
DSCONV_SCALAR float exponential(float x) { return expf(x); }
DSCONV_SCALAR float error_function(float x) { return erff(x); }
DSCONV_SCALAR float hyperbolic_tangent(float x) { return tanhf(x); }
DSCONV_SCALAR float exp_minus_one(float x) { return expm1f(x); }
#else
DSCONV_SCALAR float exponential(float x) { return fast_exp(x); }
DSCONV_SCALAR float error_function(float x) { return fast_erf(x); }
DSCONV_SCALAR float hyperbolic_tangent(float x) { return fast_tanh(x); }
DSCONV_SCALAR float exp_minus_one(float x) { return fast_exp_minus_one(x); }
#endif
DSCONV_SCALAR double exponential(double x) { return exp(x); }
DSCONV_SCALAR double error_function(double x) { return erf(x); }
DSCONV_SCALAR double hyperbolic_tangent(double x) { return ::tanh(x); }
DSCONV_SCALAR double exp_minus_one(double x) { return expm1(x); }

// factor / (1 + exp(-x)).
template <class T>
DSCONV_SCALAR T times_logistic(T factor, T x) {
  const T e = exponential(-fabs(x));
  return (x > T(0) ? factor : factor * e) / (T(1) + e);
}
template <class T>
DSCONV_SCALAR T clamp_0_6(T x) {  // NaN stays NaN
  return x < T(0) ? T(0) : x > T(6) ? T(6) : x;
}
// x / 6, without the division. A sixth of 6 is 1.
template <class T>
DSCONV_SCALAR T sixth(T x) {
  return x * T(1.0 / 6.0);
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
  if constexpr (kind == Activation::hardswish) return x * sixth(clamp_0_6(x + T(3)));
  if constexpr (kind == Activation::hardsigmoid) return sixth(clamp_0_6(x + T(3)));
  if constexpr (kind == Activation::silu) return times_logistic(x, x);
  if constexpr (kind == Activation::gelu) return T(0.5) * x * (T(1) + error_function(x * T(kSqrtHalf)));
  if constexpr (kind == Activation::gelu_tanh) return T(0.5) * x * (T(1) + hyperbolic_tangent(gelu_tanh_argument(x)));
  if constexpr (kind == Activation::leaky_relu) return x > T(0) ? x : x * param;
  if constexpr (kind == Activation::sigmoid) return times_logistic(T(1), x);
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
    return s > T(from_output ? 0 : -3) && s < T(from_output ? 1 : 3) ? sixth(g) : T(0);
  if constexpr (kind == Activation::sigmoid) return g * (T(1) - s) * s;
  if constexpr (kind == Activation::tanh) return g * (T(1) - s * s);
  if constexpr (kind == Activation::leaky_relu) return s > T(0) ? g : g * param;
  if constexpr (kind == Activation::elu) return s > T(0) ? g : g * (from_output ? s + param : param * exponential(s));
  if constexpr (kind == Activation::hardswish)
    return s <= T(-3) ? T(0) : s < T(3) ? g * (s * T(1.0 / 3.0) + T(0.5)) : g;
  if constexpr (kind == Activation::silu) {
    const T sigmoid = times_logistic(T(1), s);
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
