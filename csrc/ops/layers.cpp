#include "ops/layers.h"

namespace dsconv {

ActivationSpec parse_activation(const char* argument, const std::string& name, double param) {
  static constexpr const char* kNames[] = {"none", "relu",      "relu6",      "hardswish", "hardsigmoid", "silu",
                                           "gelu", "gelu_tanh", "leaky_relu", "sigmoid",   "tanh",        "elu"};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (name == kNames[i]) return {static_cast<Activation>(i), param};
  }
  DSCONV_CHECK(false, argument, "'" + name + "'",
               "none, relu, relu6, hardswish, hardsigmoid, silu, gelu, gelu_tanh, leaky_relu, sigmoid, tanh or elu");
}

Fuse parse_fuse(const std::string& fuse) {
  if (fuse == "auto") return Fuse::automatic;
  if (fuse == "always") return Fuse::always;
  DSCONV_CHECK(fuse == "never", "fuse", "'" + fuse + "'", "auto, always or never");
  return Fuse::never;
}

DepthwiseLayer depthwise_layer(const Tensor& weight, const OptionalTensor& bias, const WindowArguments& arguments,
                               ActivationSpec activation) {
  const int64_t rank = weight.dim(), spatial = rank - 2;
  DSCONV_CHECK(rank >= 3 && rank <= 5, "weight", std::to_string(rank) + " dimensions", "3 to 5: [C*m, 1, taps...]");
  DSCONV_CHECK(weight.size(1) == 1 && weight.size(0) > 0, "weight",
               "shape [" + std::to_string(weight.size(0)) + ", " + std::to_string(weight.size(1)) + ", ...]",
               "shape [C*m, 1, ...]");
  DepthwiseLayer layer{};
  layer.rank = rank;
  DepthwiseProblem& p = layer.problem;
  p.dtype = dtype_of("weight", weight);
  p.channels = weight.size(0);
  p.multiplier = 1;
  p.activation = activation;
  check_like("bias", bias, weight, {p.channels});
  const auto length = static_cast<size_t>(spatial);
  DSCONV_CHECK(arguments.stride.size() == length, "stride", std::to_string(arguments.stride.size()) + " numbers",
               spatial);
  DSCONV_CHECK(arguments.dilation.size() == length, "dilation", std::to_string(arguments.dilation.size()) + " numbers",
               spatial);
  DSCONV_CHECK(arguments.padding.size() == 2 * length, "padding", std::to_string(arguments.padding.size()) + " numbers",
               2 * spatial);
  Window& w = p.window;
  for (int dim = 0; dim < 3; ++dim) {
    const int64_t i = dim - (3 - spatial);
    w.in[dim] = w.out[dim] = w.taps[dim] = w.stride[dim] = w.dilation[dim] = 1;
    if (i < 0) continue;
    w.taps[dim] = weight.size(2 + i);
    w.stride[dim] = arguments.stride[i];
    w.dilation[dim] = arguments.dilation[i];
    w.pad[dim] = arguments.padding[2 * i];
    layer.pad_high[dim] = arguments.padding[2 * i + 1];
    DSCONV_CHECK(w.taps[dim] > 0, "weight", "an empty kernel", "at least one tap in every dimension");
    DSCONV_CHECK(w.stride[dim] > 0, "stride", w.stride[dim], "at least 1");
    DSCONV_CHECK(w.dilation[dim] > 0, "dilation", w.dilation[dim], "at least 1");
    DSCONV_CHECK(w.pad[dim] >= 0 && layer.pad_high[dim] >= 0, "padding", min64(w.pad[dim], layer.pad_high[dim]),
                 "at least 0");
  }
  p.weight = view_of(weight);
  p.bias = view_of(bias);
  return layer;
}

DepthwiseLayer depthwise_layer_for(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const WindowArguments& arguments, ActivationSpec activation) {
  const int64_t rank = x.dim();
  DSCONV_CHECK(rank >= 3 && rank <= 5, "x", std::to_string(rank) + " dimensions", "3 to 5: [N, C, spatial...]");
  IntList size(rank, -1);
  size[1] = 1;
  check_like("weight", weight, x, size);
  return depthwise_layer(weight, bias, arguments, activation);
}

PointwiseProblem pointwise_layer(const Tensor& weight, const OptionalTensor& bias, int64_t rank, int64_t in_channels,
                                 const Tensor& like, ActivationSpec activation) {
  PointwiseProblem p{};
  p.dtype = dtype_of("pointwise_weight", like);
  p.in_channels = in_channels;
  p.activation = activation;
  IntList size(rank, 1);
  size[0] = -1;
  size[1] = p.in_channels;
  check_like("pointwise_weight", weight, like, size);
  p.out_channels = weight.size(0);
  DSCONV_CHECK(p.out_channels > 0, "pointwise_weight", "no filters", "at least one");
  check_like("pointwise_bias", bias, like, {p.out_channels});
  p.weight = view_of(weight);
  p.bias = view_of(bias);
  return p;
}

DepthwiseProblem problem_of(const DepthwiseLayer& layer, const Tensor& x) {
  DepthwiseProblem p = layer.problem;
  DSCONV_CHECK(x.dim() == layer.rank, "x", std::to_string(x.dim()) + " dimensions", layer.rank);
  DSCONV_CHECK(dtype_of("x", x) == p.dtype, "x", name_of(dtype_of("x", x)), name_of(p.dtype),
               ", the dtype of the weights");
  p.batch = x.size(0);
  p.channels = x.size(1);
  DSCONV_CHECK(p.channels > 0 && layer.problem.channels % p.channels == 0, "weight",
               std::to_string(layer.problem.channels) + " filters", "a multiple of the ", p.channels, " channels of x");
  p.multiplier = layer.problem.channels / p.channels;
  Window& w = p.window;
  for (int64_t i = 2; i < layer.rank; ++i) {
    const int64_t dim = i + 3 - layer.rank, high = layer.pad_high[dim];
    w.in[dim] = x.size(i);
    DSCONV_CHECK(w.in[dim] > 0, "x", "an empty spatial dimension", "at least one position");
    w.out[dim] = output_size(w.in[dim], w.taps[dim], w.stride[dim], w.dilation[dim], w.pad[dim], high);
    DSCONV_CHECK(w.out[dim] > 0, "x", "a padded size of " + std::to_string(w.in[dim] + w.pad[dim] + high),
                 "at least the ", w.dilation[dim] * (w.taps[dim] - 1) + 1, " positions the kernel spans");
  }
  p.x = view_of(x);
  return p;
}

SeparableProblem problem_of(const SeparableLayer& layer, const Tensor& x, const OptionalTensor& residual) {
  SeparableProblem p{problem_of(layer.depthwise, x), layer.pointwise};
  p.pointwise.batch = p.depthwise.batch;
  for (int dim = 0; dim < 3; ++dim) p.pointwise.size[dim] = p.depthwise.window.out[dim];
  if (residual) check_like("residual", *residual, x, output_sizes(p.pointwise, x));
  p.pointwise.residual = view_of(residual);
  return p;
}

PointwiseProblem problem_of(const PointwiseProblem& layer, const Tensor& x, const OptionalTensor& residual) {
  PointwiseProblem p = layer;
  DSCONV_CHECK(dtype_of("x", x) == p.dtype, "x", name_of(dtype_of("x", x)), name_of(p.dtype),
               ", the dtype of the weights");
  p.batch = x.size(0);
  for (int64_t dim = 0; dim < 3; ++dim) {
    const int64_t i = dim + x.dim() - 3;
    p.size[dim] = i < 2 ? 1 : x.size(i);
    DSCONV_CHECK(p.size[dim] > 0, "x", "an empty spatial dimension", "at least one position");
  }
  if (residual) check_like("residual", *residual, x, output_sizes(p, x));
  p.a = view_of(x);
  p.residual = view_of(residual);
  return p;
}

IntList output_sizes(const PointwiseProblem& p, const Tensor& x) {
  IntList size{p.batch, p.out_channels};
  for (int64_t i = 5 - x.dim(); i < 3; ++i) size.push_back(p.size[i]);
  return size;
}

}  // namespace dsconv
