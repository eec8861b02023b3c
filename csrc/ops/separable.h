// The separable operators.
#pragma once

#include <tuple>

#include "ops/layers.h"

namespace dsconv {

Tensor separable(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                 const OptionalTensor& depthwise_bias, const OptionalTensor& pointwise_bias,
                 const OptionalTensor& residual, const IntList& stride, const IntList& padding, const IntList& dilation,
                 const std::string& mid_activation, double mid_param, const std::string& activation,
                 double activation_param, const std::string& fuse, bool allow_tf32);

// The pointwise product alone, into a new tensor. `op` names the operator in explanations.
Tensor pointwise_forward(const char* op, PointwiseProblem problem, const Tensor& x);

// The forward of `problem` into a new tensor.
Tensor separable_forward(const SeparableProblem& problem, Fuse fuse, const Tensor& x);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_backward(
    const Tensor& grad, const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
    const OptionalTensor& depthwise_bias, const OptionalTensor& pointwise_bias, const OptionalTensor& residual,
    const OptionalTensor& output, const IntList& stride, const IntList& padding, const IntList& dilation,
    const std::string& mid_activation, double mid_param, const std::string& activation, double activation_param,
    bool need_x, bool need_depthwise_weight, bool need_pointwise_weight, bool need_depthwise_bias,
    bool need_pointwise_bias, bool need_residual);

}  // namespace dsconv
