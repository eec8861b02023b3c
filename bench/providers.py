"""Who computes: each provider turns a problem and a pass into a function of no arguments that does the work once.

A new provider is an entry of `PROVIDERS`, or an attribute of any importable module, named ``module:attribute``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsconv_ext.nn
from dsconv_ext import activations, autograd, functional

from . import peers
from .problems import ARGUMENTS, PASSES, Case, arrange, oracle

aten = torch.ops.aten
Work = Callable[[], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Provider:
    """One way to compute a problem.

    ``build(case, pass_name, tensors, g)`` gets the arguments by name, contiguous: ``x``, the residual and the
    upstream gradient ``g`` in the order of ``case.layout``, the rest as nn.Conv2d has them. Its function returns what
    `problems.results` lists, in that order; None is skipped.
    """

    build: Callable[[Case, str, dict[str, Tensor], Tensor], Work]
    layout: str | None = None  # the only layout it computes in; None: the one asked for
    ops: tuple[str, ...] = ("dw", "sep")
    passes: tuple[str, ...] = PASSES
    dtypes: tuple[str, ...] = ("fp64", "fp32", "bf16", "fp16")
    packages: tuple[str, ...] = ()  # what it imports that is optional
    settle: float = 0.002  # seconds after a visit until its threads have gone to sleep
    baseline: bool = False  # ratios are relative to the fastest of these

    def takes(self, case: Case, pass_name: str) -> bool:
        return case.op in self.ops and pass_name in self.passes and case.dtype_name in self.dtypes

    def missing(self) -> list[str]:
        """The packages it needs that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


def find(name: str) -> Provider:
    """The provider of that name."""
    module, _, attribute = name.partition(":")
    if attribute:
        return getattr(importlib.import_module(module), attribute)
    if name not in PROVIDERS:
        raise ValueError(f"providers: got {name!r}, expected module:attribute or one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


def _needs(case: Case, pass_name: str, given: dict[str, Tensor]) -> list[bool]:
    """Which arguments' gradients a backward pass computes."""
    wanted = {"dgrad": ("x",), "wgrad": [name for name in given if name not in ("x", "residual")]}
    return [name in given and name in wanted.get(pass_name, given) for name in ARGUMENTS[case.op]]


def _step(forward: Callable[[], Tensor], leaves: list[Tensor], g: Tensor) -> Work:
    """Forward and backward through autograd, without the accumulation into ``.grad``."""

    def work() -> tuple[Tensor | None, ...]:
        y = forward()
        return (y, *torch.autograd.grad(y, leaves, g))

    return work


def _leaves(case: Case, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: given[name].requires_grad_() for name in ARGUMENTS[case.op] if name in given}


# dsconv_ext


def dsconv(case: Case, pass_name: str, given: dict[str, Tensor], g: Tensor, fuse: str | None = None) -> Work:
    """This library: modules where they can express the problem, else functions; the operators' backward passes."""
    fuse = fuse or case.fuse
    if pass_name in ("fwd", "step"):
        if pass_name == "step":
            given = _leaves(case, given)
        forward = _module_call(case, given, fuse) or _function_call(case, given, fuse)
        return _step(forward, list(given.values()), g) if pass_name == "step" else lambda: (forward(),)
    from_output = activations.from_output(*case.activation)
    saved = None
    if from_output and case.activation[0] != "none":
        with torch.no_grad():
            saved = _function_call(case, given, fuse)()
    arguments: list[Any] = [given.get(name) for name in ARGUMENTS[case.op]]
    settings: list[Any] = [list(case.stride), [side for pair in case.padding for side in pair], list(case.dilation)]
    settings += [*(case.mid if case.op == "sep" else ()), *case.activation, *_needs(case, pass_name, given)]
    # What autograd calls: the operators themselves would go through Python in the dispatcher first.
    backward: Any = autograd.depthwise_backward if case.op == "dw" else autograd.separable_backward
    if case.op == "sep" and from_output:
        arguments[5] = None  # the residual is read only where the pre-activation is computed anew
    return lambda: backward(g, *arguments, saved, *settings)


def _spelled(activation: tuple[str, float]) -> Any:
    return activation if activation[0] in oracle.DEFAULT_PARAM else activation[0]


def _function_call(case: Case, given: dict[str, Tensor], fuse: str) -> Callable[[], Tensor]:
    options: dict[str, Any] = {"activation": _spelled(case.activation)}
    if case.op == "sep":
        options |= {"mid_activation": _spelled(case.mid), "fuse": fuse}
    name = "depthwise" if case.op == "dw" else "separable"
    function = getattr(functional, f"{name}_conv{case.spatial}d")
    where = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    return functools.partial(function, **given, **where, **options)


def _module_call(case: Case, given: dict[str, Tensor], fuse: str) -> Callable[[], Tensor] | None:
    """The call of a module, or None: modules pad both sides alike, and DepthwiseConv has no activation."""
    kind = {"dw": "DepthwiseConv", "sep": "DepthwiseSeparableConv"}[case.op]
    uneven = any(low != high for low, high in case.padding)
    if uneven or (case.op == "dw" and case.activation[0] != "none"):
        return None
    geometry = (case.kernel, case.stride, tuple(low for low, _ in case.padding), case.dilation)
    make = getattr(dsconv_ext.nn, f"{kind}{case.spatial}d")
    if case.op == "dw":
        module = make(case.channels, case.channels * case.multiplier, *geometry, device="meta")
        parts = {"": module}
    else:
        names = {"mid_activation": _spelled(case.mid), "activation": _spelled(case.activation)}
        module = make(case.channels, case.out_channels, *geometry, case.multiplier, device="meta", **names)
        module.fuse = fuse
        parts = {"depthwise_": module.depthwise, "pointwise_": module.pointwise}
    for prefix, part in parts.items():
        for parameter in ("weight", "bias"):
            part.register_parameter(parameter, _parameter(given, prefix + parameter))
    module.eval()
    x, residual = given["x"], given.get("residual")
    return (lambda: module(x)) if residual is None else lambda: module(x, residual)


def _parameter(given: dict[str, Tensor], name: str) -> nn.Parameter | None:
    """The argument as a Parameter, which takes its place among the leaves of autograd."""
    if name not in given:
        return None
    given[name] = parameter = nn.Parameter(given[name].detach(), requires_grad=given[name].requires_grad)
    return parameter


# PyTorch

# Per activation: its fastest form, in place where there is one; and its derivative from (g, pre-activation, output,
# parameter), as autograd computes it.
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "none": (lambda z, _: z, lambda g, z, y, _: g),
    "relu": (lambda z, _: torch.relu_(z), lambda g, z, y, _: aten.threshold_backward(g, y, 0)),
    "relu6": (lambda z, _: F.relu6(z, True), lambda g, z, y, _: aten.hardtanh_backward(g, z, 0.0, 6.0)),
    "hardswish": (lambda z, _: F.hardswish(z, True), lambda g, z, y, _: aten.hardswish_backward(g, z)),
    "hardsigmoid": (lambda z, _: F.hardsigmoid(z, True), lambda g, z, y, _: aten.hardsigmoid_backward(g, z)),
    "silu": (lambda z, _: F.silu(z, True), lambda g, z, y, _: aten.silu_backward(g, z)),
    "gelu": (lambda z, _: F.gelu(z), lambda g, z, y, _: aten.gelu_backward(g, z, approximate="none")),
    "gelu_tanh": (
        lambda z, _: F.gelu(z, approximate="tanh"),
        lambda g, z, y, _: aten.gelu_backward(g, z, approximate="tanh"),
    ),
    "leaky_relu": (
        lambda z, slope: F.leaky_relu(z, slope, True),
        lambda g, z, y, slope: aten.leaky_relu_backward(g, z, slope, False),
    ),
    "sigmoid": (lambda z, _: torch.sigmoid_(z), lambda g, z, y, _: aten.sigmoid_backward(g, y)),
    "tanh": (lambda z, _: torch.tanh_(z), lambda g, z, y, _: aten.tanh_backward(g, y)),
    "elu": (lambda z, a: F.elu(z, a, True), lambda g, z, y, a: aten.elu_backward(g, a, 1.0, 1.0, False, z)),
}


class _Stage:
    """A convolution of PyTorch and the activation after it; forward, and backward from what autograd would save."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        activation: tuple[str, float],
        where: Any,
        groups: int,
    ) -> None:
        stride, padding, dilation = where
        self.uneven = padding if any(low != high for low, high in padding) else None
        even = tuple(0 if self.uneven else low for low, _ in padding)
        channels, kernel = (weight.size(1) * groups, weight.size(0)), tuple(weight.shape[2:])
        make: Any = getattr(nn, f"Conv{len(kernel)}d")
        self.conv = make(*channels, kernel, stride, even, dilation, groups, device="meta")
        self.conv.register_parameter("weight", weight)
        self.conv.register_parameter("bias", bias)
        (self.activate, self.derive), self.parameter = ACTIVATIONS[activation[0]], activation[1]

    def pad(self, x: Tensor) -> Tensor:
        return x if self.uneven is None else oracle.pad(x, self.uneven)

    def sum(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(x))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = self.sum(x)
        return self.activate(z if residual is None else z.add_(residual), self.parameter)

    def save(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Keep what `backward` reads; return the output."""
        z = self.sum(x)
        self.z = z if residual is None else z + residual
        self.x, self.y = self.pad(x), self.activate(self.z.clone(), self.parameter)
        return self.y

    def derivative(self, g: Tensor) -> Tensor:
        return self.derive(g, self.z, self.y, self.parameter)

    def backward(self, g: Tensor, need_x: bool, need_weight: bool, need_bias: bool) -> tuple[Any, ...]:
        x_grad, weight_grad, bias_grad = aten.convolution_backward(
            g,
            self.x,
            self.conv.weight,
            [self.conv.out_channels],
            self.conv.stride,
            self.conv.padding,
            self.conv.dilation,
            False,
            [0] * len(self.conv.padding),
            self.conv.groups,
            [need_x, need_weight, need_bias],
        )
        if self.uneven is not None and need_x:
            x_grad = oracle.pad(x_grad, [(-low, -high) for low, high in self.uneven])
        return x_grad, weight_grad, bias_grad


def composition(case: Case, pass_name: str, given: dict[str, Tensor], g: Tensor) -> Work:
    """PyTorch's own modules and operators in eager mode; the backward pass finds the map between the stages saved."""
    given = {name: arrange(t, case.layout) if "weight" in name else t for name, t in given.items()}
    if pass_name == "step":
        given = _leaves(case, given)
    x, residual = given["x"], given.get("residual")
    prefix, last = ("", case.activation) if case.op == "dw" else ("depthwise", case.mid)

    def stage(prefix: str, *settings: Any) -> _Stage:
        weight, bias = (_parameter(given, f"{prefix}_{name}".lstrip("_")) for name in ("weight", "bias"))
        return _Stage(weight, bias, *settings)

    first = stage(prefix, last, case.geometry, case.channels)
    second = None
    if case.op == "sep":
        ones, none = (1,) * case.spatial, ((0, 0),) * case.spatial
        second = stage("pointwise", case.activation, (ones, none, ones), 1)

    def forward() -> Tensor:
        return first.forward(x) if second is None else second.forward(first.forward(x), residual)

    if pass_name == "fwd":
        return lambda: (forward(),)
    if pass_name == "step":
        return _step(forward, list(given.values()), g)
    with torch.no_grad():
        middle = first.save(x)
        if second is not None:
            second.save(middle, residual)
    return functools.partial(_backward, first, second, g, *_needs(case, pass_name, given))


def _backward(first: _Stage, second: _Stage | None, g: Tensor, *needs: bool) -> tuple[Tensor | None, ...]:
    """The gradients of one stage, or of both, in the order of `ARGUMENTS`."""
    if second is None:
        return first.backward(first.derivative(g), *needs)
    need_x, need_depthwise, need_pointwise, need_depthwise_bias, need_pointwise_bias, need_residual = needs
    g = second.derivative(g)
    middle, pointwise, pointwise_bias = second.backward(g, True, need_pointwise, need_pointwise_bias)
    x, depthwise, depthwise_bias = first.backward(first.derivative(middle), need_x, need_depthwise, need_depthwise_bias)
    return x, depthwise, pointwise, depthwise_bias, pointwise_bias, g if need_residual else None


PROVIDERS = {
    "dsconv": Provider(dsconv),
    # Only fwd and step can be fused; in the other passes this does what dsconv does.
    "dsconv-unfused": Provider(functools.partial(dsconv, fuse="never"), ops=("sep",)),
    "torch": Provider(composition, layout="nchw", baseline=True),
    "torch-channels-last": Provider(composition, layout="nhwc", baseline=True),
    "onnxruntime": Provider(
        peers.onnxruntime,
        layout="nchw",
        passes=("fwd",),
        dtypes=("fp32",),
        packages=("onnx", "onnxruntime"),
        settle=0.06,  # its pool of threads spins for 35 ms
    ),
    "openvino": Provider(peers.openvino, passes=("fwd",), dtypes=("fp32", "bf16"), packages=("onnx", "openvino")),
}
