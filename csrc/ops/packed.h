// Packed layers: an opaque tensor of bytes that holds a whole layer (weights in the order the kernels of this machine
// read them, biases, window, activations), so that a call brings its input alone. Operators cache nothing.
#pragma once

#include "ops/layers.h"

namespace dsconv {

// A depthwise convolution of `groups` channels, which `activation` follows; or with a pointwise weight a separable one.
Tensor pack(const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& pointwise_weight,
            const OptionalTensor& pointwise_bias, int64_t groups, const IntList& stride, const IntList& padding,
            const IntList& dilation, const std::string& mid_activation, double mid_param, const std::string& activation,
            double activation_param, const std::string& fuse);

// A pointwise convolution alone.
Tensor pack_pointwise(const Tensor& weight, const OptionalTensor& bias, const std::string& activation,
                      double activation_param);

// Refuses bytes that these did not write, or wrote for another machine.
Tensor run_packed(const Tensor& x, const Tensor& packed, const OptionalTensor& residual);

}  // namespace dsconv
