"""The activations of the operators in torch ops: names, parameters, values and derivatives (ATen's own formulas)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class _Activation(NamedTuple):
    forward: Callable[[Tensor, float], Tensor]
    # (grad, value, parameter): value is the output where `from_output` holds, else the pre-activation.
    backward: Callable[[Tensor, Tensor, float], Tensor]
    from_output: Callable[[float], bool]
    parameter: float | None = None  # the default of the parameter; None: there is no parameter


def _always(_: float) -> bool:
    return True


def _never(_: float) -> bool:
    return False


def _not_negative(parameter: float) -> bool:
    return parameter >= 0


def _hardsigmoid_backward(y: Tensor, grad: Tensor) -> Tensor:
    return torch.where((y > 0) & (y < 1), grad / 6, 0.0)


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    sigmoid = torch.sigmoid(wide)
    return (grad * (sigmoid * (1 + wide * (1 - sigmoid)))).to(grad.dtype)


# ATen's backward ops fix the derivatives at kinks and for NaN, and are differentiable themselves; but for silu's.
_TABLE: dict[str, _Activation] = {
    "none": _Activation(lambda z, _: z, lambda g, y, _: g, _always),
    "relu": _Activation(lambda z, _: F.relu(z), lambda g, y, _: _aten.threshold_backward(g, y, 0), _always),
    "relu6": _Activation(lambda z, _: F.relu6(z), lambda g, y, _: _aten.hardtanh_backward(g, y, 0.0, 6.0), _always),
    "hardswish": _Activation(lambda z, _: F.hardswish(z), lambda g, z, _: _aten.hardswish_backward(g, z), _never),
    # F.hardsigmoid has no second derivative.
    "hardsigmoid": _Activation(lambda z, _: F.relu6(z + 3) / 6, lambda g, y, _: _hardsigmoid_backward(y, g), _always),
    "silu": _Activation(lambda z, _: F.silu(z), lambda g, z, _: _silu_backward(g, z), _never),
    "gelu": _Activation(lambda z, _: F.gelu(z), lambda g, z, _: _aten.gelu_backward(g, z, approximate="none"), _never),
    "gelu_tanh": _Activation(
        lambda z, _: F.gelu(z, approximate="tanh"),
        lambda g, z, _: _aten.gelu_backward(g, z, approximate="tanh"),
        _never,
    ),
    "leaky_relu": _Activation(
        F.leaky_relu, lambda g, v, slope: _aten.leaky_relu_backward(g, v, slope, slope >= 0), _not_negative, 0.01
    ),
    "sigmoid": _Activation(lambda z, _: torch.sigmoid(z), lambda g, y, _: _aten.sigmoid_backward(g, y), _always),
    "tanh": _Activation(lambda z, _: torch.tanh(z), lambda g, y, _: _aten.tanh_backward(g, y), _always),
    "elu": _Activation(
        F.elu, lambda g, v, alpha: _aten.elu_backward(g, alpha, 1.0, 1.0, alpha >= 0, v), _not_negative, 1.0
    ),
}

NAMES: tuple[str, ...] = tuple(_TABLE)


def parse(activation: Any, argument: str = "activation") -> tuple[str, float]:
    """Split an activation into its name and its parameter.

    Parameters
    ----------
    activation : str or (str, float)
        A name of `NAMES`, or a pair for the two that have a parameter: ``("leaky_relu", slope)``, ``("elu", alpha)``.
    argument : str
        How an error message names the argument.

    Returns
    -------
    (str, float)
        The name, and the parameter (0.0 where there is none).

    Raises
    ------
    TypeError, ValueError
        For anything else.

    Examples
    --------
    >>> parse("leaky_relu"), parse(("elu", 0.5)), parse("relu")
    (('leaky_relu', 0.01), ('elu', 0.5), ('relu', 0.0))
    """
    name: Any = activation
    parameter: Any = None
    pair = isinstance(activation, (tuple, list)) and len(activation) == 2
    if pair:
        name, parameter = activation
    if not isinstance(name, str) or (pair and (isinstance(parameter, bool) or not isinstance(parameter, (int, float)))):
        raise TypeError(f"{argument}: got {activation!r}, expected a name or a pair (name, number)")
    if name not in _TABLE:
        raise ValueError(f"{argument}: got {name!r}, expected one of {', '.join(NAMES)}")
    default = _TABLE[name].parameter
    if default is None and pair:
        raise ValueError(f"{argument}: got {activation!r}, expected {name!r} alone: it has no parameter")
    return name, 0.0 if default is None else float(default if parameter is None else parameter)


def forward(pre_activation: Tensor, name: str, parameter: float) -> Tensor:
    """Apply the activation."""
    return _TABLE[name].forward(pre_activation, parameter)


def backward(
    grad: Tensor, output: Tensor | None, pre_activation: Callable[[], Tensor], name: str, parameter: float
) -> Tensor:
    """Multiply `grad` by the derivative: read off `output` where `from_output` holds, else off `pre_activation()`."""
    if name == "none":
        return grad
    value = output if output is not None and from_output(name, parameter) else pre_activation()
    return _TABLE[name].backward(grad, value, parameter)


def backward_between(grad: Tensor, output: Tensor, pre_activation: Tensor, name: str, parameter: float) -> Tensor:
    """As `backward`, for the activation between two stages, of which both values are at hand."""
    if name == "hardsigmoid":  # an output just below 1 is 1 in half precision, where the derivative is 0
        return torch.where(pre_activation.abs() < 3, grad / 6, 0.0)
    return backward(grad, output, lambda: pre_activation, name, parameter)


def from_output(name: str, parameter: float) -> bool:
    """Whether the derivative can be read off the output (true of the identity, which needs neither)."""
    return _TABLE[name].from_output(parameter)
