// Layers: checked weights, window and activations that have not met an input. An input completes one to a problem.
#pragma once

#include "ops/common.h"

namespace dsconv {

// Stride, padding and dilation of a convolution, per spatial dimension; padding holds (low, high) pairs.
struct WindowArguments {
  const IntList &stride, &padding, &dilation;
};

// In `problem` the batch, the sizes of input and output and the views of both are open. Its channels are those of the
// output, and the multiplier is 1.
struct DepthwiseLayer {
  DepthwiseProblem problem;
  int64_t rank;
  int64_t pad_high[3];
};

struct SeparableLayer {
  DepthwiseLayer depthwise;
  PointwiseProblem pointwise;
  Fuse fuse;
};

ActivationSpec parse_activation(const char* argument, const std::string& name, double param);
Fuse parse_fuse(const std::string& fuse);

DepthwiseLayer depthwise_layer(const Tensor& weight, const OptionalTensor& bias, const WindowArguments& arguments,
                               ActivationSpec activation);
// The same with dtype, device and rank checked against an input.
DepthwiseLayer depthwise_layer_for(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const WindowArguments& arguments, ActivationSpec activation);
// A pointwise convolution of `in_channels`, with dtype and device of `like`.
PointwiseProblem pointwise_layer(const Tensor& weight, const OptionalTensor& bias, int64_t rank, int64_t in_channels,
                                 const Tensor& like, ActivationSpec activation);

// The problem of a layer with input x, and its residual. The output is open still.
DepthwiseProblem problem_of(const DepthwiseLayer& layer, const Tensor& x);
SeparableProblem problem_of(const SeparableLayer& layer, const Tensor& x, const OptionalTensor& residual);
// For an x of the layer's rank and channels.
PointwiseProblem problem_of(const PointwiseProblem& layer, const Tensor& x, const OptionalTensor& residual);

// The sizes of a problem's output as a tensor of x's rank has them.
IntList output_sizes(const PointwiseProblem& p, const Tensor& x);

}  // namespace dsconv
