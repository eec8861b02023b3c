"""Differentiation: the entry points of the four compute operators, and which form of them a call takes.

An operator with a registered autograd formula alone gives wrong tangents in forward mode, raises under torch.func.grad
and is slow in eager mode. `depthwise` and `separable` therefore choose, in this order: the plain operator while
compiling (its registered formula serves); an autograd.Function with setup_context, jvp and vmap under a functorch
transform or forward-mode AD; a ctx-style autograd.Function (the fast one) if a gradient is wanted; the operator below
Autograd. One spec per operator makes the three differentiable forms. All formulas are written with the entry points
themselves, so derivatives of any order are closed under them: a depthwise convolution is bilinear, as is its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from . import activations, ops
from .backends import pointwise

Ints = Sequence[int]
Grads = tuple[Tensor | None, ...]

_ops = torch.ops.dsconv
# What OpOverload.__call__ forwards to: one Python frame less per call.
_call_depthwise = _ops.depthwise.default._op
_call_depthwise_backward = _ops.depthwise_backward.default._op
_call_separable = _ops.separable.default._op
_call_separable_backward = _ops.separable_backward.default._op

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_functorch_level = torch._C._functorch.peek_interpreter_stack
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing differentiates or transforms this call."""
    if _is_compiling():
        return True
    if _functorch_level() is not None or forward_ad._current_level >= 0:
        return False
    return not (_is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    activation: str = "none",
    activation_param: float = 0.0,
) -> Tensor:
    """Compute ``dsconv::depthwise``, differentiable in x, weight and bias in every mode, to any order."""
    if _is_compiling():
        return _ops.depthwise.default(x, weight, bias, stride, padding, dilation, activation, activation_param)
    if _functorch_level() is not None or forward_ad._current_level >= 0:
        return _transformable_depthwise(x, weight, bias, stride, padding, dilation, activation, activation_param)
    if _is_grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _fast_depthwise(x, weight, bias, stride, padding, dilation, activation, activation_param)
    with _BelowAutograd():
        return _call_depthwise(x, weight, bias, stride, padding, dilation, activation, activation_param)


def separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    mid_activation: str,
    mid_param: float,
    activation: str,
    activation_param: float,
    fuse: str,
    allow_tf32: bool = False,
) -> Tensor:
    """Compute ``dsconv::separable``, differentiable in its first six arguments in every mode, to any order."""
    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    settings = (stride, padding, dilation, mid_activation, mid_param, activation, activation_param, fuse, allow_tf32)
    if _is_compiling():
        return _ops.separable.default(*tensors, *settings)
    if _functorch_level() is not None or forward_ad._current_level >= 0:
        return _transformable_separable(*tensors, *settings)
    if _is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _fast_separable(*tensors, *settings)
    with _BelowAutograd():
        return _call_separable(*tensors, *settings)


def depthwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    activation: str,
    activation_param: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> Grads:
    """Compute ``dsconv::depthwise_backward``; as a composition where it is differentiated itself."""
    geometry = (stride, padding, dilation)
    if _is_plain(grad, x, weight, bias, output):
        settings = (activation, activation_param, need_x, need_weight, need_bias)
        with _BelowAutograd():
            return _call_depthwise_backward(grad, x, weight, bias, output, *geometry, *settings)
    grad = activations.backward(
        grad, output, lambda: depthwise(x, weight, bias, *geometry), activation, activation_param
    )
    grads: Iterator[Tensor] = iter(())
    if need_x or need_weight:
        grads = iter(_transformable_gradients(grad, x, weight, *geometry, need_x, need_weight))
    return (
        next(grads) if need_x else None,
        next(grads) if need_weight else None,
        _sum_channels(grad) if need_bias and bias is not None else None,
    )


def separable_backward(
    grad: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    mid_activation: str,
    mid_param: float,
    activation: str,
    activation_param: float,
    *need: bool,
) -> Grads:
    """Compute ``dsconv::separable_backward``; as a composition where it is differentiated itself."""
    tensors = (grad, x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual, output)
    geometry = (stride, padding, dilation)
    if _is_plain(*tensors):
        settings = (mid_activation, mid_param, activation, activation_param)
        with _BelowAutograd():
            return _call_separable_backward(*tensors, *geometry, *settings, *need)
    need_x, need_depthwise_weight, need_pointwise_weight, need_depthwise_bias, need_pointwise_bias, need_residual = need
    middle_pre = depthwise(x, depthwise_weight, depthwise_bias, *geometry)
    middle = activations.forward(middle_pre, mid_activation, mid_param)
    grad = activations.backward(
        grad,
        output,
        lambda: pointwise(middle, pointwise_weight, pointwise_bias, residual),
        activation,
        activation_param,
    )
    stage: Grads = (None, None, None)
    if need_x or need_depthwise_weight or need_depthwise_bias:
        middle_grad = pointwise(grad, pointwise_weight.transpose(0, 1))
        middle_grad = activations.backward_between(middle_grad, middle, middle_pre, mid_activation, mid_param)
        stage_need = (need_x, need_depthwise_weight, need_depthwise_bias)
        stage = depthwise_backward(
            middle_grad, x, depthwise_weight, depthwise_bias, None, *geometry, "none", 0.0, *stage_need
        )
    pointwise_grad = None
    if need_pointwise_weight:
        pointwise_grad = torch.einsum("nkl,ncl->kc", grad.flatten(2), middle.flatten(2))
        pointwise_grad = pointwise_grad.reshape(pointwise_weight.shape)
    return (
        stage[0],
        stage[1],
        pointwise_grad,
        stage[2],
        _sum_channels(grad) if need_pointwise_bias and pointwise_bias is not None else None,
        grad.clone() if need_residual else None,
    )


def _sum_channels(grad: Tensor) -> Tensor:
    return grad.sum([0, *range(2, grad.dim())])


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Add what is there."""
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]) if present else None


class _Depthwise:
    """activation(depthwise(x, weight) + bias)."""

    tensors = 3
    forward = staticmethod(_call_depthwise)

    @staticmethod
    def saved(inputs: Sequence[Any], output: Tensor) -> tuple[Tensor | None, ...]:
        activation, parameter = inputs[6:8]
        keep = activation != "none" and activations.from_output(activation, parameter)
        return (*inputs[:3], output if keep else None)

    @staticmethod
    def vjp(saved: Sequence[Any], settings: Sequence[Any], need: Sequence[bool], grad: Tensor) -> Grads:
        return depthwise_backward(grad, *saved, *settings[:5], *need)

    @staticmethod
    def jvp(saved: Sequence[Any], settings: Sequence[Any], x_t: Any, weight_t: Any, bias_t: Any) -> Tensor | None:
        x, weight, bias, output = saved
        *geometry, activation, parameter = settings
        tangent = _depthwise_tangent(x, weight, x_t, weight_t, bias_t, geometry)
        if tangent is None:
            return None
        return activations.backward(
            tangent, output, lambda: depthwise(x, weight, bias, *geometry), activation, parameter
        )


class _Separable:
    """activation(pointwise(mid_activation(depthwise(x) + depthwise_bias)) + pointwise_bias + residual)."""

    tensors = 6
    forward = staticmethod(_call_separable)

    @staticmethod
    def saved(inputs: Sequence[Any], output: Tensor) -> tuple[Tensor | None, ...]:
        activation, parameter = inputs[11:13]
        from_output = activations.from_output(activation, parameter)
        keep = activation != "none" and from_output
        return (*inputs[:5], None if from_output else inputs[5], output if keep else None)

    @staticmethod
    def vjp(saved: Sequence[Any], settings: Sequence[Any], need: Sequence[bool], grad: Tensor) -> Grads:
        return separable_backward(grad, *saved, *settings[:7], *need)

    @staticmethod
    def jvp(
        saved: Sequence[Any],
        settings: Sequence[Any],
        x_t: Any,
        depthwise_weight_t: Any,
        pointwise_weight_t: Any,
        depthwise_bias_t: Any,
        pointwise_bias_t: Any,
        residual_t: Any,
    ) -> Tensor | None:
        x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual, output = saved
        *geometry, mid_activation, mid_parameter, activation, parameter = settings[:7]
        middle_pre = depthwise(x, depthwise_weight, depthwise_bias, *geometry)
        middle = activations.forward(middle_pre, mid_activation, mid_parameter)
        middle_t = _depthwise_tangent(x, depthwise_weight, x_t, depthwise_weight_t, depthwise_bias_t, geometry)
        if middle_t is not None:
            middle_t = activations.backward_between(middle_t, middle, middle_pre, mid_activation, mid_parameter)
        tangent = _sum(
            None if middle_t is None else pointwise(middle_t, pointwise_weight),
            None if pointwise_weight_t is None else pointwise(middle, pointwise_weight_t),
            None if pointwise_bias_t is None else _as_channels(pointwise_bias_t, middle),
            residual_t,
        )
        if tangent is None:
            return None
        tangent = tangent.expand(x.size(0), pointwise_weight.size(0), *middle.shape[2:])
        if activation == "none":
            return tangent.clone()
        return activations.backward(
            tangent,
            output,
            lambda: pointwise(middle, pointwise_weight, pointwise_bias, residual),
            activation,
            parameter,
        )


class _Gradients:
    """The needed gradients of a depthwise convolution for x and weight: bilinear in grad and the other."""

    tensors = 3

    @staticmethod
    def forward(grad: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, ...]:
        *geometry, need_x, need_weight = settings
        grads = _call_depthwise_backward(
            grad, x, weight, None, None, *geometry, "none", 0.0, need_x, need_weight, False
        )
        return tuple(g for g in grads if g is not None)

    @staticmethod
    def saved(inputs: Sequence[Any], output: Any) -> tuple[Tensor | None, ...]:
        return tuple(inputs[:3])

    @staticmethod
    def vjp(saved: Sequence[Any], settings: Sequence[Any], need: Sequence[bool], *grads: Tensor | None) -> Grads:
        grad, x, weight = saved
        x_grad, weight_grad = _place(grads, settings)
        geometry = settings[:3]
        return (
            _depthwise_tangent(x, weight, x_grad, weight_grad, None, geometry) if need[0] else None,
            _gradient(grad, x, weight_grad, geometry, 0) if need[1] else None,
            _gradient(grad, x_grad, weight, geometry, 1) if need[2] else None,
        )

    @staticmethod
    def jvp(saved: Sequence[Any], settings: Sequence[Any], grad_t: Any, x_t: Any, weight_t: Any) -> Grads:
        grad, x, weight = saved
        *geometry, need_x, need_weight = settings
        x_grad_t = _sum(_gradient(grad_t, x, weight, geometry, 0), _gradient(grad, x, weight_t, geometry, 0))
        weight_grad_t = _sum(_gradient(grad_t, x, weight, geometry, 1), _gradient(grad, x_t, weight, geometry, 1))
        pairs = [(x_grad_t, x)] * need_x + [(weight_grad_t, weight)] * need_weight
        return tuple(torch.zeros_like(like) if tangent is None else tangent for tangent, like in pairs)


def _place(grads: Sequence[Tensor | None], settings: Sequence[Any]) -> Grads:
    """Put the outputs of `_Gradients` in their places: (for x, for weight)."""
    remaining = iter(grads)
    return tuple(next(remaining) if needed else None for needed in settings[3:5])


def _gradient(grad: Any, x: Any, weight: Any, geometry: Sequence[Any], index: int) -> Tensor | None:
    """Gradient for x (index 0) or weight (index 1); None where a factor of it is zero."""
    if grad is None or x is None or weight is None:
        return None
    stride, padding, dilation = geometry
    need_x = index == 0
    return depthwise_backward(
        grad, x, weight, None, None, stride, padding, dilation, "none", 0.0, need_x, not need_x, False
    )[index]


def _depthwise_tangent(
    x: Tensor, weight: Tensor, x_t: Any, weight_t: Any, bias_t: Any, geometry: Sequence[Any]
) -> Tensor | None:
    """Differential of depthwise(x, weight) + bias."""
    of_x = None if x_t is None else depthwise(x_t, weight, None, *geometry)
    if weight_t is not None:
        return _sum(of_x, depthwise(x, weight_t, bias_t, *geometry))
    if bias_t is not None:
        weight_t = torch.zeros_like(weight)
        return _sum(of_x, depthwise(x, weight_t, bias_t, *geometry))
    return of_x


def _as_channels(bias: Tensor, like: Tensor) -> Tensor:
    return bias.reshape(-1, *[1] * (like.dim() - 2))


class _Settings(tuple[Any, ...]):
    """The arguments that are no tensors, as one leaf: nested tuples confuse the generated vmap rules."""


def _setup_context(spec: Any) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        saved = spec.saved(inputs, output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.settings = inputs[spec.tensors :]
        ctx.set_materialize_grads(False)

    return setup_context


def _backward(spec: Any) -> Callable[..., Grads]:
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        nothing = (None,) * (len(ctx.needs_input_grad) - spec.tensors)
        if all(g is None for g in grads):
            return (None,) * spec.tensors + nothing
        return (*spec.vjp(ctx.saved_tensors, ctx.settings, ctx.needs_input_grad[: spec.tensors], *grads), *nothing)

    return backward


def _fast_function(name: str, spec: Any) -> Callable[..., Any]:
    setup_context = _setup_context(spec)

    def forward(ctx: Any, *args: Any) -> Any:
        with _BelowAutograd():
            output = spec.forward(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(_backward(spec))}
    function: Any = type(name, (torch.autograd.Function,), members)
    # Function.apply inspects functorch on every call; here no transform is active, so the C++ apply is enough.
    return super(torch.autograd.Function, function).apply


def _transformable_function(name: str, spec: Any) -> Callable[..., Any]:
    flat_setup_context = _setup_context(spec)

    def forward(*args: Any) -> Any:
        with _BelowAutograd():
            return spec.forward(*args[:-1], *args[-1])

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        flat_setup_context(ctx, (*inputs[:-1], *inputs[-1]), output)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        return spec.jvp(ctx.saved_tensors, ctx.settings, *tangents[: spec.tensors])

    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(_backward(spec)),
        "jvp": staticmethod(jvp),
    }
    function: Any = type(name, (torch.autograd.Function,), members)
    return lambda *args: function.apply(*args[: spec.tensors], _Settings(args[spec.tensors :]))


_fast_depthwise = _fast_function("Depthwise", _Depthwise)
_fast_separable = _fast_function("Separable", _Separable)
_transformable_depthwise = _transformable_function("TransformableDepthwise", _Depthwise)
_transformable_separable = _transformable_function("TransformableSeparable", _Separable)
_transformable_gradients = _transformable_function("TransformableGradients", _Gradients)


def _differentiate(entry: Callable[..., Grads], tensors: int) -> Info:
    """Make the registered formula of a `*_backward`: differentiate the composition its entry point is in grad mode."""

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.settings = inputs[tensors:]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, so that the graph ends here; detached ones unless this result is to be differentiated again.
            inputs: list[Any] = [
                t if t is None else t.view_as(t) if create_graph and t.requires_grad else t.detach().requires_grad_()
                for t in ctx.saved_tensors
            ]
            outputs = entry(*inputs, *ctx.settings)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:tensors]) if needed]
        pairs = [
            (o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None and o.requires_grad
        ]
        result: list[Tensor | None] = [None] * (tensors + len(ctx.settings))
        if pairs and wanted:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [inputs[i] for i in wanted],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, g in zip(wanted, found, strict=True):
                result[i] = g
        return tuple(result)

    return Info(backward, setup_context)


def _register(name: str, info: Info) -> None:
    op = getattr(_ops, name).default
    implementation = make_autograd_impl(op, info)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(a) for a in args if isinstance(a, Tensor)):
            raise NotImplementedError(
                f"dsconv::{name}: got an input with a tangent, expected none: the operator itself has no forward-mode "
                "derivative; call it through dsconv_ext.functional, which has"
            )
        return implementation(keyset, *args)

    ops.library.impl(name, kernel, "Autograd", with_keyset=True)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


_register("depthwise", Info(_backward(_Depthwise), _setup_context(_Depthwise)))
_register("separable", Info(_backward(_Separable), _setup_context(_Separable)))
_register("depthwise_backward", _differentiate(depthwise_backward, 5))
_register("separable_backward", _differentiate(separable_backward, 8))
