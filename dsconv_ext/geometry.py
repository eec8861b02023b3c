"""Stride, padding and dilation as the operators take them, the sizes that follow, and the layout rule of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, (low, high) per dimension, dilation


def normalise(nd: int, stride: Any, padding: Any, dilation: Any, weight_shape: Any = None) -> Geometry:
    """Bring what torch.nn.functional.conv accepts, and asymmetric padding, into the form of the operators.

    Parameters
    ----------
    nd : int
        Number of spatial dimensions.
    stride, dilation : int or sequence of int
        One positive number, or one per spatial dimension.
    padding : int, sequence of int, sequence of (low, high), "valid" or "same"
        "same" puts the odd element at the end, as PyTorch does, and is an error when strided.
    weight_shape : sequence of int, optional
        Shape of the weight; read for "same" only.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is expected.

    Examples
    --------
    >>> normalise(2, 2, ((1, 0), (2, 1)), (1, 3))
    ((2, 2), (1, 0, 2, 1), (1, 3))
    >>> normalise(1, 1, "same", 1, (8, 1, 4))
    ((1,), (1, 2), (1,))
    """
    stride = per_dimension("stride", stride, nd, 1)
    dilation = per_dimension("dilation", dilation, nd, 1)
    return stride, _padding(padding, nd, stride, dilation, weight_shape), dilation


def _padding(padding: Any, nd: int, stride: Sequence[int], dilation: Sequence[int], shape: Any) -> tuple[int, ...]:
    if isinstance(padding, str):
        if padding == "valid":
            return (0,) * (2 * nd)
        if padding != "same":
            raise ValueError(f"padding: got {padding!r}, expected 'valid', 'same' or numbers")
        if any(s != 1 for s in stride):
            raise ValueError(f"padding: got 'same' with stride {tuple(stride)}, expected stride 1 for 'same'")
        total = [d * (k - 1) for d, k in zip(dilation, (shape or ())[2:], strict=False)]
        return tuple(side for t in total for side in (t // 2, t - t // 2))
    if isinstance(padding, (tuple, list)) and len(padding) == nd and any(isinstance(p, (tuple, list)) for p in padding):
        return tuple(side for pair in padding for side in per_dimension("padding", pair, 2, 0))
    return tuple(side for p in per_dimension("padding", padding, nd, 0) for side in (p, p))


def per_dimension(argument: str, value: Any, count: int, least: int) -> tuple[int, ...]:
    """Make `count` ints of one int or `count` of them; raise TypeError or ValueError unless they are >= `least`."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(_is_int(v) for v in values):
        raise TypeError(f"{argument}: got {value!r}, expected an int or {count} ints")
    if len(values) == 1:
        values *= count
    if len(values) != count:
        raise ValueError(f"{argument}: got {value!r}, expected an int or {count} ints")
    if any(v < least for v in values):
        raise ValueError(f"{argument}: got {value!r}, expected numbers >= {least}")
    return values


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Spatial size of the output of a convolution."""
    return [
        (size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(len(size))
    ]


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` gives channels_last outputs: the rule reads the strides of `x` alone."""
    return bool(x.size(1) > 1 and x.stride(1) == 1)


def _output_strides(x: Tensor, size: Sequence[int]) -> list[int]:
    """Strides of an output of the operator whose input is `x`: a size of 0 counts as 1, as everywhere in torch."""
    order = [1, *range(len(size) - 1, 1, -1), 0] if is_channels_last(x) else range(len(size) - 1, -1, -1)
    strides: list[Any] = [0] * len(size)
    step: Any = 1
    for dim in order:
        strides[dim] = step
        step = step * torch.sym_max(size[dim], 1)
    return strides


def empty_output(x: Tensor, channels: int, spatial: Sequence[int]) -> Tensor:
    """Make an uninitialised output of the operator whose input is `x`, in the layout of the rule."""
    size = [x.size(0), channels, *spatial]
    return x.new_empty_strided(size, _output_strides(x, size))


def convolution_output(
    x: Tensor,
    channels: int,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Make an uninitialised output of a convolution of `x` with the taps of `weight`."""
    return empty_output(x, channels, output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation))


def like_output(value: Tensor, x: Tensor) -> Tensor:
    """Bring `value` into the layout of an output of the operator whose input is `x`; a copy only if need be."""
    dense = value.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(x) else value.contiguous()
    return dense.as_strided(dense.shape, _output_strides(x, dense.shape))  # which differ where a size is 1 at most
