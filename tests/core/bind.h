// From a Spec and its tensors to the problem struct of its pass.
#pragma once

#include <map>

#include "spec.h"

namespace dsconv::core_test {

using Views = std::array<View, kRoles>;

// Weights as a target's packers wrote them, or null.
struct Packed {
  const void *depthwise = nullptr, *pointwise = nullptr;
};

inline DepthwiseProblem depthwise_problem(const Spec& s, const Views& v, const Packed& packed) {
  DepthwiseProblem p{};
  p.dtype = s.dtype;
  p.batch = s.batch;
  p.channels = s.channels;
  p.multiplier = s.multiplier;
  for (int dim = 0; dim < 3; ++dim) {
    p.window.in[dim] = s.in[dim];
    p.window.out[dim] = s.out[dim];
    p.window.taps[dim] = s.taps[dim];
    p.window.stride[dim] = s.stride[dim];
    p.window.dilation[dim] = s.dilation[dim];
    p.window.pad[dim] = s.pad[dim];
  }
  p.activation = s.pass == Pass::separable_fwd ? s.mid : s.activation;
  p.x = v[kX];
  p.weight = v[kWeight];
  p.bias = v[kBias];
  p.grad = v[kGrad];
  p.saved = v[kSaved];
  p.grad_weight = v[kGradWeight];
  p.grad_bias = v[kGradBias];
  if (s.pass == Pass::depthwise_fwd) p.y = v[kOutput];
  if (s.pass == Pass::depthwise_dgrad || s.pass == Pass::mask) p.grad_x = v[kOutput];
  p.packed = packed.depthwise;
  return p;
}

inline PointwiseProblem pointwise_problem(const Spec& s, const Views& v, const Packed& packed) {
  PointwiseProblem p{};
  p.dtype = s.dtype;
  p.batch = s.batch;
  p.in_channels = s.map_channels();
  p.out_channels = s.filters;
  for (int dim = 0; dim < 3; ++dim) p.size[dim] = s.out[dim];
  p.activation = s.activation;
  if (s.pass != Pass::separable_fwd) p.a = v[kX];
  p.weight = v[kPointwiseWeight];
  p.bias = v[kPointwiseBias];
  p.residual = v[kResidual];
  p.y = v[kOutput];
  p.grad = v[kGrad];
  p.grad_weight = v[kGradWeight];
  p.grad_bias = v[kGradBias];
  p.packed = packed.pointwise;
  p.allow_tf32 = s.tf32 != 0;
  return p;
}

// Calls use(problem) with the struct of the pass.
template <class Use>
auto with_problem(const Spec& s, const Views& v, const Packed& packed, Use use) {
  if (s.pass == Pass::separable_fwd)
    return use(SeparableProblem{depthwise_problem(s, v, packed), pointwise_problem(s, v, packed)});
  if (s.pointwise()) return use(pointwise_problem(s, v, packed));
  return use(depthwise_problem(s, v, packed));
}

using Tensors = std::map<Role, Tensor>;

// The inputs (not yet filled) or the outputs of a problem.
inline Tensors tensors_of(const Spec& s, bool written) {
  Tensors tensors;
  for (int i = 0; i < kRoles; ++i) {
    const auto role = static_cast<Role>(i);
    const std::optional<Shape> shape = shape_of(s, role);
    if (shape && is_written(role) == written) tensors.emplace(role, tensor_of(s, role, *shape));
  }
  return tensors;
}

inline Views views_of(const Tensors& inputs, const Tensors& outputs) {
  Views views{};
  for (const Tensors* tensors : {&inputs, &outputs}) {
    for (const auto& [role, tensor] : *tensors) views[role] = tensor.view();
  }
  return views;
}

}  // namespace dsconv::core_test
