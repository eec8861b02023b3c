#include "ops/depthwise.h"

namespace dsconv {

Tensor undefined() { return Tensor(); }

static DepthwiseProblem depthwise_problem(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                          const WindowArguments& arguments, ActivationSpec activation) {
  return problem_of(depthwise_layer_for(x, weight, bias, arguments, activation), x);
}

// The composition of PyTorch operators that Python registers, for a device this library has no kernel for. It says so
// itself.
static Tensor depthwise_torch(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const IntList& stride,
                              const IntList& padding, const IntList& dilation, const std::string& activation,
                              double activation_param) {
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{from(x),       from(weight),   from(bias),       from(stride),
                                    from(padding), from(dilation), from(activation), from(activation_param)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("dsconv::depthwise_torch", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor depthwise_forward(const char* op, DepthwiseProblem p, ActivationSpec activation, const Tensor& x) {
  p.activation = activation;
  Tensor y = empty_output(x, channels_of(p), spatial_of(x, p.window.out));
  p.y = view_of(y);
  if (p.batch > 0) run(op, Pass::depthwise_fwd, p, x);
  return y;
}

Tensor depthwise(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const IntList& stride,
                 const IntList& padding, const IntList& dilation, const std::string& activation,
                 double activation_param) {
  const ActivationSpec spec = parse_activation("activation", activation, activation_param);
  const DepthwiseProblem p = depthwise_problem(x, weight, bias, {stride, padding, dilation}, spec);
  if (!has_kernels(x)) return depthwise_torch(x, weight, bias, stride, padding, dilation, activation, activation_param);
  return depthwise_forward("depthwise", p, spec, x);
}

DepthwiseProblem map_problem(DType dtype, int64_t batch, int64_t channels, const int64_t (&size)[3],
                             ActivationSpec activation) {
  DepthwiseProblem p{};
  p.dtype = dtype;
  p.batch = batch;
  p.channels = channels;
  p.multiplier = 1;
  p.activation = activation;
  for (int dim = 0; dim < 3; ++dim) {
    p.window.in[dim] = p.window.out[dim] = size[dim];
    p.window.taps[dim] = p.window.stride[dim] = p.window.dilation[dim] = 1;
  }
  return p;
}

Tensor masked_gradient(const char* op, DepthwiseProblem p, const Tensor& grad, const OptionalTensor& saved,
                       const Tensor& x) {
  Tensor masked = empty_output(x, p.channels, spatial_of(x, p.window.out), &grad);
  p.grad = view_of(grad);
  p.saved = view_of(saved);
  p.grad_x = view_of(masked);
  if (p.batch > 0) run(op, Pass::mask, p, x);
  return masked;
}

DepthwiseGradients depthwise_gradients(const char* op, DepthwiseProblem p, const Tensor& grad,
                                       const OptionalTensor& saved, const Tensor& x, const Tensor& weight, bool need_x,
                                       bool need_weight, bool need_bias) {
  DepthwiseGradients gradients{undefined(), undefined(), undefined()};
  if (!need_x && !need_weight && !need_bias) return gradients;
  Tensor pre_activation = grad;
  if (p.activation.kind != Activation::none) {
    const DepthwiseProblem map = map_problem(p.dtype, p.batch, channels_of(p), p.window.out, p.activation);
    pre_activation = masked_gradient(op, map, grad, saved, x);
    p.activation = {Activation::none, 0};
  }
  p.grad = view_of(pre_activation);
  if (need_x) {
    gradients.x = empty_output(x, p.channels, spatial_of(x, p.window.in), &pre_activation);
    p.grad_x = view_of(gradients.x);
    if (p.batch > 0) run(op, Pass::depthwise_dgrad, p, x);
  }
  if (!need_weight && !need_bias) return gradients;
  if (need_weight) {
    gradients.weight = torch::stable::empty_like(weight);
    p.grad_weight = view_of(gradients.weight);
  }
  if (need_bias) {
    gradients.bias = torch::stable::new_empty(weight, {channels_of(p)});
    p.grad_bias = view_of(gradients.bias);
  }
  run(op, Pass::depthwise_wgrad, p, x);  // an empty batch gives zeros
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                      const OptionalTensor& bias, const OptionalTensor& output,
                                                      const IntList& stride, const IntList& padding,
                                                      const IntList& dilation, const std::string& activation,
                                                      double activation_param, bool need_x, bool need_weight,
                                                      bool need_bias) {
  const ActivationSpec spec = parse_activation("activation", activation, activation_param);
  const DepthwiseProblem p = depthwise_problem(x, weight, bias, {stride, padding, dilation}, spec);
  IntList size{p.batch, channels_of(p)};
  for (int64_t i = 5 - x.dim(); i < 3; ++i) size.push_back(p.window.out[i]);
  check_like("grad", grad, x, size);
  check_like("output", output, x, size);
  OptionalTensor saved;
  if (derivative_from_output(spec)) {
    DSCONV_CHECK(output.has_value(), "output", "None", "the forward's output, from which the derivative of ",
                 activation, " is read");
    saved = output;
  } else if (spec.kind != Activation::none) {
    saved = depthwise_forward("depthwise_backward", p, {Activation::none, 0}, x);
  }
  DepthwiseGradients g =
      depthwise_gradients("depthwise_backward", p, grad, saved, x, weight, need_x, need_weight, need_bias && bias);
  return {g.x, g.weight, g.bias};
}

}  // namespace dsconv
