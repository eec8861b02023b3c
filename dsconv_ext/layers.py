"""What the layers of other people's models compute, as far as `dsconv_ext.convert` knows them.

Classes of timm and torchvision are known by name, so that neither is imported.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .functional import Activation

# Asked in every call, so that a later change of the module's parameter is seen.
_Spelling = Callable[[Any], Activation | None]

_ACTIVATIONS: dict[str, _Spelling] = {
    "torch.nn.modules.linear.Identity": lambda m: "none",
    "torch.nn.modules.activation.ReLU": lambda m: "relu",
    "torch.nn.modules.activation.ReLU6": lambda m: "relu6",
    "torch.nn.modules.activation.Hardtanh": lambda m: "relu6" if (m.min_val, m.max_val) == (0, 6) else None,
    "torch.nn.modules.activation.Hardswish": lambda m: "hardswish",
    "torch.nn.modules.activation.Hardsigmoid": lambda m: "hardsigmoid",
    "torch.nn.modules.activation.SiLU": lambda m: "silu",
    "torch.nn.modules.activation.GELU": lambda m: "gelu" if m.approximate == "none" else "gelu_tanh",
    "torch.nn.modules.activation.LeakyReLU": lambda m: ("leaky_relu", m.negative_slope),
    "torch.nn.modules.activation.Sigmoid": lambda m: "sigmoid",
    "torch.nn.modules.activation.Tanh": lambda m: "tanh",
    "torch.nn.modules.activation.ELU": lambda m: ("elu", m.alpha),
    "timm.layers.activations.Swish": lambda m: "silu",
    "timm.layers.activations.HardSwish": lambda m: "hardswish",
    "timm.layers.activations.HardSigmoid": lambda m: "hardsigmoid",
    "timm.layers.activations.Sigmoid": lambda m: "sigmoid",
    "timm.layers.activations.Tanh": lambda m: "tanh",
    "timm.layers.activations.GELU": lambda m: "gelu",
    "timm.layers.activations.GELUTanh": lambda m: "gelu_tanh",
}
_BATCH_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.BatchNorm3d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
}
_DROPOUTS = {
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.dropout.Dropout1d",
    "torch.nn.modules.dropout.Dropout2d",
    "torch.nn.modules.dropout.Dropout3d",
    "timm.layers.drop.DropPath",
    "timm.layers.drop.DropBlock2d",
    "torchvision.ops.stochastic_depth.StochasticDepth",
}
_SAME_CONV = "timm.layers.conv2d_same.Conv2dSame"
_PLAIN_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _name(module: Any) -> str:
    cls: Any = type(module)
    return _class_name(cls)


@functools.cache
def _class_name(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def rank(module: Any) -> int | None:
    """Number of spatial dimensions of a convolution; None for a module that does not compute what nn.ConvNd computes.

    Subclasses count as long as they leave the arithmetic alone, as parametrized convolutions do.
    """
    cls: Any = type(module)
    return _class_rank(cls)


@functools.cache
def _class_rank(cls: Any) -> int | None:
    if _class_name(cls) == _SAME_CONV:
        return 2
    for nd, conv in _PLAIN_CONV.items():
        if issubclass(cls, conv) and cls.forward is conv.forward and cls._conv_forward is conv._conv_forward:
            return nd
    return None


def is_depthwise(conv: Any) -> bool:
    return isinstance(conv, _ConvNd) and not conv.transposed and conv.groups == conv.in_channels > 1


def is_pointwise(conv: Any) -> bool:
    """Whether `conv` is a 1x1 convolution of stride 1 without padding, in one group."""
    return (
        isinstance(conv, _ConvNd)
        and not conv.transposed
        and conv.groups == 1
        and {*conv.kernel_size, *conv.stride} == {1}
        and (conv.padding in ("valid", "same") or not any(conv.padding))
    )


def describe(conv: Any) -> str:
    """The kind of a convolution and its geometry: "depthwise 3x3 stride 2"."""
    kind = "grouped" if conv.groups > 1 else "dense"
    kind = "transposed" if conv.transposed else kind
    kind = "depthwise" if is_depthwise(conv) else "pointwise" if is_pointwise(conv) else kind
    for name, values in (("stride", conv.stride), ("dilation", conv.dilation)):
        if set(values) != {1}:
            values = values[:1] if len(set(values)) == 1 else values
            kind += f" {name} " + "x".join(map(str, values))
    first, *rest = kind.split(" ", 1)
    return " ".join([first, "x".join(map(str, conv.kernel_size)), *rest])


def _same_padding(conv: Any, x: Tensor) -> tuple[tuple[int, int], ...]:
    """Padding of TensorFlow's "SAME": it depends on the size of the input and puts the odd element at the end."""
    totals = (
        max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
        for size, k, s, d in zip(x.shape[-2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    )
    return tuple((total // 2, total - total // 2) for total in totals)


def convolve(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the convolution `conv` with other weights, by PyTorch."""
    if _name(conv) == _SAME_CONV:
        x = F.pad(x, [side for pair in reversed(_same_padding(conv, x)) for side in pair])
    return conv._conv_forward(x, weight, bias)


def padded(conv: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Pad `x` as far as the operators cannot; return also the padding that is left to them."""
    if _name(conv) == _SAME_CONV:
        return x, _same_padding(conv, x)
    if conv.padding_mode != "zeros":
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    return x, conv.padding


def is_batch_norm(module: Any) -> bool:
    """Whether `module` is a BatchNorm, frozen or not, perhaps with an activation inside (and no dropout)."""
    drop = module.__dict__.get("_modules", {}).get("drop") if isinstance(module, nn.Module) else None
    return _name(module) in _BATCH_NORMS and (drop is None or type(drop) is nn.Identity)


def uses_batch_statistics(norm: Any) -> bool:
    return isinstance(norm, _NormBase) and (norm.training or norm._buffers["running_mean"] is None)


def is_dropout(module: Any) -> bool:
    return _name(module) in _DROPOUTS


@dataclass(frozen=True)
class Step:
    """One operation on a tensor: a module, or a function (a method, if it is a str) with its other arguments."""

    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.target, str):
            return getattr(x, self.target)(*self.args, **self.kwargs)
        return self.target(x, *self.args, **self.kwargs)


def _no_arguments(name: str) -> Callable[..., Activation]:
    return lambda inplace=False: name


def _gelu(approximate: str = "none") -> Activation:
    return {"none": "gelu", "tanh": "gelu_tanh"}[approximate]


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return "leaky_relu", negative_slope


def _elu(alpha: float = 1.0, inplace: bool = False) -> Activation:
    return "elu", alpha


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Activation | None:
    return "relu6" if (min_val, max_val) == (0, 6) else None


_FUNCTIONS: dict[Any, Callable[..., Activation | None]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _no_arguments("relu")),
    F.relu6: _no_arguments("relu6"),
    F.hardswish: _no_arguments("hardswish"),
    F.hardsigmoid: _no_arguments("hardsigmoid"),
    F.silu: _no_arguments("silu"),
    **dict.fromkeys(
        (F.sigmoid, torch.sigmoid, torch.sigmoid_, torch.special.expit, "sigmoid", "sigmoid_"), _no_arguments("sigmoid")
    ),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), _no_arguments("tanh")),
    F.gelu: _gelu,
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((F.elu, F.elu_), _elu),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
}
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")


def activation(step: Step | Any) -> Activation | None:
    """The activation a module or a `Step` computes, as the operators spell it; None if it is none of theirs.

    Examples
    --------
    >>> activation(nn.LeakyReLU(0.2)), activation(Step(F.gelu, (), {"approximate": "tanh"})), activation(nn.Mish())
    (('leaky_relu', 0.2), 'gelu_tanh', None)
    """
    target = step.target if isinstance(step, Step) else step
    if isinstance(target, nn.Module):
        spelling = _ACTIVATIONS.get(_name(target))
        return None if spelling is None else spelling(target)
    try:
        return _FUNCTIONS[target](*step.args, **step.kwargs)
    except (KeyError, TypeError):  # not an activation, or with arguments that make it something else
        return None
