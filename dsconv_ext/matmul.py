"""The 1x1 convolution as a matrix product of PyTorch: the second stage where no kernel fuses the two."""

from __future__ import annotations

import torch
from torch import Tensor

from . import activations
from .geometry import is_channels_last, like_output


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_param: float,
) -> Tensor:
    """Compute activation(1x1 convolution + bias + residual) by torch.matmul, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32) if bias is not None or residual is not None else x.dtype
    matrix = weight.flatten(1)
    if is_channels_last(x):
        y = _matmul(x.movedim(1, -1).flatten(0, -2), matrix.t(), wide)
        y = y.unflatten(0, (x.size(0), *x.shape[2:])).movedim(-1, 1)
    else:
        y = _matmul(matrix.expand(x.size(0), -1, -1), x.flatten(2), wide).unflatten(2, x.shape[2:])
    if bias is not None:
        y += bias.view(-1, *[1] * (x.dim() - 2))
    if residual is not None:
        y += residual
    return like_output(activations.forward(y, activation, activation_param).to(x.dtype), x)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply matrices, or batches of them, and keep the sums in `dtype`."""
    if a.dtype is dtype:
        return a @ b
    if a.device.type == "cuda" and not torch.version.hip:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
