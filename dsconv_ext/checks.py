"""Checks of the tensors of a call; every message is "<function>: <argument>: got <what>, expected <what>"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import activations
from .geometry import output_size, per_dimension

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FUSE = ("auto", "always", "never")


def check_depthwise(
    function: str,
    nd: int,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    weight_name: str = "weight",
    bias_name: str = "bias",
) -> None:
    """Raise TypeError or ValueError unless a depthwise convolution of `nd` spatial dimensions can be computed.

    `x` is [N, C, *spatial], `weight` [C*m, 1, *kernel], `bias` [C*m] or None; `stride`, `padding` and `dilation` are
    the operators'.
    """
    if not 1 <= nd <= 3:
        raise ValueError(f"{function}: x: got {nd + 2} dimensions {_shape(x)}, expected 3 to 5")
    _check_tensor(function, "x", x, None, nd + 2)
    if x.dtype not in DTYPES:
        raise TypeError(f"{function}: x: got dtype {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    _check_tensor(function, weight_name, weight, x, nd + 2)
    if any(size < 1 for size in x.shape[1:]):
        raise ValueError(f"{function}: x: got shape {_shape(x)}, expected no zero but for the batch")
    channels, outputs = x.size(1), weight.size(0)
    if weight.size(1) != 1 or outputs < 1 or outputs % channels:
        raise ValueError(
            f"{function}: {weight_name}: got shape {_shape(weight)}, expected [C*m, 1, ...] for the C = {channels} of x"
        )
    _check_bias(function, bias_name, bias, x, outputs)
    kernel = weight.shape[2:]
    if any(k < 1 for k in kernel):
        raise ValueError(
            f"{function}: {weight_name}: got shape {_shape(weight)}, expected a kernel of at least one tap"
        )
    for argument, numbers, count, least in (
        ("stride", stride, nd, 1),
        ("padding", padding, 2 * nd, 0),
        ("dilation", dilation, nd, 1),
    ):
        if len(numbers) != count:
            raise ValueError(f"{function}: {argument}: got {list(numbers)}, expected {count} ints")
        per_dimension(f"{function}: {argument}", numbers, count, least)
    if any(size < 1 for size in output_size(x.shape[2:], kernel, stride, padding, dilation)):
        padded = [s + padding[2 * i] + padding[2 * i + 1] for i, s in enumerate(x.shape[2:])]
        extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        raise ValueError(
            f"{function}: x: got padded spatial size {padded}, expected at least the kernel's extent {extent}: "
            "kernel size can't be greater than actual input size"
        )


def check_separable(
    function: str,
    nd: int,
    x: Any,
    depthwise_weight: Any,
    pointwise_weight: Any,
    depthwise_bias: Any,
    pointwise_bias: Any,
    residual: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *,
    pointwise_name: str = "pointwise",
) -> None:
    """Raise TypeError or ValueError unless a depthwise-separable convolution can be computed.

    As `check_depthwise` and `check_pointwise`; `residual` has the shape of the output or is None.
    """
    check_depthwise(
        function,
        nd,
        x,
        depthwise_weight,
        depthwise_bias,
        stride,
        padding,
        dilation,
        weight_name="depthwise_weight",
        bias_name="depthwise_bias",
    )
    check_pointwise(function, nd, x, depthwise_weight.size(0), pointwise_weight, pointwise_bias, pointwise_name)
    if residual is not None:
        spatial = output_size(x.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation)
        _check_output(function, "residual", residual, x, [x.size(0), pointwise_weight.size(0), *spatial])


def check_pointwise(function: str, nd: int, x: Any, channels: int, weight: Any, bias: Any, name: str) -> None:
    """Raise TypeError or ValueError unless `weight` is [K, channels, 1, ...] and `bias` [K] or None."""
    _check_tensor(function, f"{name}_weight", weight, x, nd + 2)
    if weight.size(0) < 1 or weight.size(1) != channels or any(k != 1 for k in weight.shape[2:]):
        ones = ", 1" * nd
        raise ValueError(f"{function}: {name}_weight: got shape {_shape(weight)}, expected [K, {channels}{ones}]")
    _check_bias(function, f"{name}_bias", bias, x, weight.size(0))


def check_backward(
    function: str,
    x: Tensor,
    shape: Sequence[int],
    grad: Tensor,
    output: Tensor | None,
    activation: str,
    activation_param: float,
) -> None:
    """Raise TypeError or ValueError unless `grad` and `output` are of the `shape` of the forward's output for `x`.

    `output` may be None where the derivative of the activation is not read off it.
    """
    _check_output(function, "grad", grad, x, shape)
    if output is not None:
        _check_output(function, "output", output, x, shape)
    elif activation != "none" and activations.from_output(activation, activation_param):
        raise ValueError(
            f"{function}: output: got None, expected the forward's output, from which the derivative of {activation} "
            "is read"
        )


def check_fuse(argument: str, fuse: Any) -> None:
    """Raise ValueError unless `fuse` is one of `FUSE`."""
    if fuse not in FUSE:
        raise ValueError(f"{argument}: got {fuse!r}, expected one of {', '.join(FUSE)}")


def check_expansion(function: str, x: Any, weight: Any, bias: Any) -> None:
    """Raise TypeError or ValueError unless the images `x` can be expanded by a 1x1 convolution, or need not be."""
    if weight is None:
        if bias is not None:
            raise ValueError(f"{function}: expand_bias: got {type(bias).__name__}, expected None without expand_weight")
        return
    x = x.unsqueeze(0) if isinstance(x, Tensor) and x.dim() == 3 else x
    _check_tensor(function, "x", x, None, 4)
    check_pointwise(function, 2, x, x.size(1), weight, bias, "expand")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_output(function: str, argument: str, tensor: Any, x: Tensor, shape: Sequence[int]) -> None:
    _check_tensor(function, argument, tensor, x, len(shape))
    if _shape(tensor) != list(shape):
        raise ValueError(f"{function}: {argument}: got shape {_shape(tensor)}, expected {list(shape)}")


def _check_bias(function: str, argument: str, bias: Any, x: Tensor, outputs: int) -> None:
    if bias is not None:
        _check_tensor(function, argument, bias, x, 1)
        if bias.size(0) != outputs:
            raise ValueError(f"{function}: {argument}: got shape {_shape(bias)}, expected [{outputs}]")


def _check_tensor(function: str, argument: str, tensor: Any, x: Tensor | None, rank: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {argument}: got {type(tensor).__name__}, expected a Tensor")
    if tensor.dim() != rank:
        raise ValueError(f"{function}: {argument}: got {tensor.dim()} dimensions {_shape(tensor)}, expected {rank}")
    if x is not None and tensor.dtype != x.dtype:
        raise TypeError(f"{function}: {argument}: got dtype {tensor.dtype}, expected {x.dtype} as x has")
    if x is not None and tensor.device != x.device:
        raise ValueError(f"{function}: {argument}: got device {tensor.device}, expected {x.device} as x has")
