// The depthwise operators, also called by the separable ones.
#pragma once

#include <tuple>

#include "ops/layers.h"

namespace dsconv {

Tensor depthwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const IntList& stride,
                 const IntList& padding, const IntList& dilation, const std::string& activation,
                 double activation_param);

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& output,
                                                      const IntList& stride, const IntList& padding,
                                                      const IntList& dilation, const std::string& activation,
                                                      double activation_param, bool need_x, bool need_weight,
                                                      bool need_bias);

// The forward of `problem` with another activation into a new tensor.
Tensor depthwise_forward(const char* op, DepthwiseProblem problem, ActivationSpec activation, const Tensor& x);

// A map as a problem of the mask pass, and `grad` times the activation's derivative at `saved` as a new tensor.
DepthwiseProblem map_problem(DType dtype, int64_t batch, int64_t channels, const int64_t (&size)[3],
                             ActivationSpec activation);
Tensor masked_gradient(const char* op, DepthwiseProblem map, const Tensor& grad, const OptionalTensor& saved,
                       const Tensor& x);

// The gradients of `problem` (its activation included) from the gradient of its output; `saved` as DepthwiseProblem
// says.
struct DepthwiseGradients {
  Tensor x, weight, bias;  // undefined where not asked for
};
DepthwiseGradients depthwise_gradients(const char* op, DepthwiseProblem problem, const Tensor& grad,
                                       const OptionalTensor& saved, const Tensor& x, const Tensor& weight, bool need_x,
                                       bool need_weight, bool need_bias);

// A tensor no caller asked for, as autograd expects it.
Tensor undefined();

}  // namespace dsconv
