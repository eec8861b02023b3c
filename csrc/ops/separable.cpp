#include "ops/separable.h"

#include "ops/depthwise.h"

namespace dsconv {
namespace {

SeparableProblem separable_problem(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                                   const OptionalTensor& depthwise_bias, const OptionalTensor& pointwise_bias,
                                   const OptionalTensor& residual, const WindowArguments& arguments, ActivationSpec mid,
                                   ActivationSpec activation) {
  const DepthwiseLayer depthwise = depthwise_layer_for(x, depthwise_weight, depthwise_bias, arguments, mid);
  const PointwiseProblem pointwise =
      pointwise_layer(pointwise_weight, pointwise_bias, depthwise.rank, depthwise.problem.channels, x, activation);
  return problem_of(SeparableLayer{depthwise, pointwise, Fuse::automatic}, x, residual);
}

SeparableChoice choose_rows(const SeparableProblem& p, Fuse fuse, const Tensor& x) {
  if (!recording()) return choose_separable(p, fuse, machine_of(x), preferred_rows());
  std::vector<Candidate> candidates;
  const SeparableChoice choice = choose_separable(p, fuse, machine_of(x), preferred_rows(), &candidates);
  // Without code for the GPU something else runs, and says so itself.
  if (!has_kernels(x)) return choice;
  record("separable", Pass::separable_fwd, describe(p), choice.fused ? choice.fused->name : candidates.back().name,
         candidates);
  return choice;
}

// What Python registers for a GPU that this library holds no code for.
Tensor separable_torch(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                       const OptionalTensor& depthwise_bias, const OptionalTensor& pointwise_bias,
                       const OptionalTensor& residual, const IntList& stride, const IntList& padding,
                       const IntList& dilation, const std::string& mid_activation, double mid_param,
                       const std::string& activation, double activation_param, const std::string& fuse) {
  using torch::stable::detail::from;
  std::array<StableIValue, 14> stack{from(x),
                                     from(depthwise_weight),
                                     from(pointwise_weight),
                                     from(depthwise_bias),
                                     from(pointwise_bias),
                                     from(residual),
                                     from(stride),
                                     from(padding),
                                     from(dilation),
                                     from(mid_activation),
                                     from(mid_param),
                                     from(activation),
                                     from(activation_param),
                                     from(fuse)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("dsconv::separable_torch", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// PyTorch's matrix product: the second stage on a GPU where nothing is fused.
Tensor pointwise_torch(const Tensor& map, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const std::string& activation, double activation_param) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(map),      from(weight),     from(bias),
                                    from(residual), from(activation), from(activation_param)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("dsconv::pointwise_torch", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor run_rows(SeparableProblem p, const SeparableChoice& choice, const Tensor& x) {
  STD_TORCH_CHECK(choice.fused || (choice.depthwise && choice.pointwise),
                  "dsconv::separable: no kernel of this library runs here: ", describe(p));
  Tensor y = empty_output(x, p.pointwise.out_channels, spatial_of(x, p.pointwise.size));
  p.pointwise.y = view_of(y);
  if (choice.fused) {
    launch(*choice.fused, p, x);
    return y;
  }
  Tensor map = empty_output(x, p.pointwise.in_channels, spatial_of(x, p.pointwise.size));
  p.depthwise.y = p.pointwise.a = view_of(map);
  launch(*choice.depthwise, p.depthwise, x);
  launch(*choice.pointwise, p.pointwise, x);
  return y;
}

}  // namespace

Tensor pointwise_forward(const char* op, PointwiseProblem p, const Tensor& x) {
  Tensor y = empty_output(x, p.out_channels, spatial_of(x, p.size));
  p.y = view_of(y);
  if (p.batch > 0) run(op, Pass::pointwise_fwd, p, x);
  return y;
}

Tensor separable_forward(const SeparableProblem& p, Fuse fuse, const Tensor& x) {
  if (p.pointwise.batch == 0) return empty_output(x, p.pointwise.out_channels, spatial_of(x, p.pointwise.size));
  return run_rows(p, choose_rows(p, fuse, x), x);
}

Tensor separable(const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                 const OptionalTensor& depthwise_bias, const OptionalTensor& pointwise_bias,
                 const OptionalTensor& residual, const IntList& stride, const IntList& padding, const IntList& dilation,
                 const std::string& mid_activation, double mid_param, const std::string& activation,
                 double activation_param, const std::string& fuse, bool allow_tf32) {
  SeparableProblem p =
      separable_problem(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual,
                        {stride, padding, dilation}, parse_activation("mid_activation", mid_activation, mid_param),
                        parse_activation("activation", activation, activation_param));
  p.pointwise.allow_tf32 = allow_tf32;
  const Fuse how = parse_fuse(fuse);
  if (x.is_cpu() || p.pointwise.batch == 0) return separable_forward(p, how, x);
  if (!has_kernels(x))
    return separable_torch(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual, stride,
                           padding, dilation, mid_activation, mid_param, activation, activation_param, fuse);
  const SeparableChoice choice = how == Fuse::never ? SeparableChoice{} : choose_rows(p, how, x);
  if (choice.fused) return run_rows(p, choice, x);
  const Tensor map = depthwise_forward("separable", p.depthwise, p.depthwise.activation, x);
  return pointwise_torch(map, pointwise_weight, pointwise_bias, residual, activation, activation_param);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> separable_backward(
    const Tensor& grad, const Tensor& x, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
    const OptionalTensor& depthwise_bias, const OptionalTensor& pointwise_bias, const OptionalTensor& residual,
    const OptionalTensor& output, const IntList& stride, const IntList& padding, const IntList& dilation,
    const std::string& mid_activation, double mid_param, const std::string& activation, double activation_param,
    bool need_x, bool need_depthwise_weight, bool need_pointwise_weight, bool need_depthwise_bias,
    bool need_pointwise_bias, bool need_residual) {
  constexpr const char* kOp = "separable_backward";
  constexpr ActivationSpec kNone{Activation::none, 0};
  ActivationSpec mid = parse_activation("mid_activation", mid_activation, mid_param);
  // A hardsigmoid just below 1 is 1 as a half, where the derivative is 0: the pre-activation is read, as PyTorch does.
  mid.hides_kinks = element_size(dtype_of("x", x)) == 2;
  const ActivationSpec last = parse_activation("activation", activation, activation_param);
  SeparableProblem p = separable_problem(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias,
                                         residual, {stride, padding, dilation}, mid, last);
  check_like("grad", grad, x, output_sizes(p.pointwise, x));
  check_like("output", output, x, output_sizes(p.pointwise, x));
  const PointwiseProblem& pw = p.pointwise;

  need_depthwise_bias &= depthwise_bias.has_value();
  need_pointwise_bias &= pointwise_bias.has_value();

  // The depthwise map after its activation, and what its derivative is read off; recomputed from x, never stored by the
  // forward.
  OptionalTensor map, mid_saved;
  const bool need_mid = need_x || need_depthwise_weight || need_depthwise_bias;
  const bool recompute_last = last.kind != Activation::none && !derivative_from_output(last);
  const bool mid_from_output = derivative_from_output(mid);
  if (need_pointwise_weight || recompute_last || (need_mid && mid_from_output))
    map = depthwise_forward(kOp, p.depthwise, mid, x);
  if (need_mid && mid.kind != Activation::none)
    mid_saved = mid_from_output ? map : depthwise_forward(kOp, p.depthwise, kNone, x);

  OptionalTensor last_saved = output;
  if (recompute_last) {
    PointwiseProblem again = pw;
    again.a = view_of(map);
    again.activation = kNone;
    last_saved = pointwise_forward(kOp, again, x);
  }
  DSCONV_CHECK(last.kind == Activation::none || last_saved.has_value(), "output", "None",
               "the forward's output, from which the derivative of ", activation, " is read");

  // The gradient of the pre-activation of the output: also the residual's, so never the incoming tensor itself.
  Tensor grad_z = grad;
  if (last.kind != Activation::none || need_residual) {
    const DepthwiseProblem map_of_y = map_problem(pw.dtype, pw.batch, pw.out_channels, pw.size, last);
    grad_z = masked_gradient(kOp, map_of_y, grad, last_saved, x);
  }

  Tensor grad_pointwise_weight = undefined(), grad_pointwise_bias = undefined();
  if (need_pointwise_weight || need_pointwise_bias) {
    PointwiseProblem weights = pw;
    weights.a = view_of(map);
    weights.grad = view_of(grad_z);
    if (need_pointwise_weight) {
      grad_pointwise_weight = torch::stable::empty_like(pointwise_weight);
      weights.grad_weight = view_of(grad_pointwise_weight);
    } else {
      weights.in_channels = 1;  // the bias alone: one panel that is never read
      weights.a = weights.grad;
    }
    if (need_pointwise_bias) {
      grad_pointwise_bias = torch::stable::new_empty(pointwise_weight, {pw.out_channels});
      weights.grad_bias = view_of(grad_pointwise_bias);
    }
    run(kOp, Pass::pointwise_wgrad, weights, x);
  }

  DepthwiseGradients g{undefined(), undefined(), undefined()};
  if (need_mid) {
    // grad of the map = pointwise_weight^T grad_z: the forward product with transposed weight strides.
    PointwiseProblem transposed = pw;
    transposed.in_channels = pw.out_channels;
    transposed.out_channels = pw.in_channels;
    transposed.a = view_of(grad_z);
    transposed.weight.stride[0] = pw.weight.stride[1];
    transposed.weight.stride[1] = pw.weight.stride[0];
    transposed.bias = transposed.residual = View{};
    transposed.activation = kNone;
    const Tensor grad_map = pointwise_forward(kOp, transposed, x);
    g = depthwise_gradients(kOp, p.depthwise, grad_map, mid_saved, x, depthwise_weight, need_x, need_depthwise_weight,
                            need_depthwise_bias);
  }
  return {g.x, g.weight, grad_pointwise_weight, g.bias, grad_pointwise_bias, need_residual ? grad_z : undefined()};
}

}  // namespace dsconv
