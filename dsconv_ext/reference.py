"""The definitions in float64, written with loops over the taps: what every kernel is judged against.

Nothing here calls a convolution of PyTorch, and everything is plain torch, so autograd differentiates it; the
activations are PyTorch's, which fixes their derivatives at kinks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from . import activations


def activation(z: Tensor, name: str = "none", parameter: float = 0.0) -> Tensor:
    """Apply an activation, in float64.

    Parameters
    ----------
    z : Tensor
        Any shape.
    name : str
        A name of the operators.
    parameter : float
        The slope of leaky_relu, the alpha of elu.

    Examples
    --------
    >>> import torch
    >>> activation(torch.tensor([-1.0, 2.0]), "leaky_relu", 0.5)
    tensor([-0.5000,  2.0000], dtype=torch.float64)
    """
    return activations.forward(z.double(), name, parameter)


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    act: str = "none",
    act_param: float = 0.0,
) -> Tensor:
    """Depthwise convolution by its definition, in float64.

    Parameters
    ----------
    x : Tensor
        [N, C, *spatial].
    weight : Tensor
        [C*m, 1, *kernel].
    bias : Tensor, optional
        [C*m].
    stride, dilation : sequence of int
        One number per spatial dimension.
    padding : sequence of int
        (low, high) of each spatial dimension in turn.
    act, act_param
        As in `activation`.

    Returns
    -------
    Tensor
        [N, C*m, *output], float64.

    Examples
    --------
    >>> import torch
    >>> x, weight = torch.randn(1, 2, 5, 6), torch.randn(4, 1, 3, 3)
    >>> expected = torch.nn.functional.conv2d(x.double(), weight.double(), groups=2)
    >>> torch.allclose(depthwise(x, weight), expected)
    True
    """
    x, weight = x.double(), weight.double()
    kernel = weight.shape[2:]
    nd = len(kernel)
    # F.pad counts from the last dimension.
    padded = F.pad(x, [p for i in reversed(range(nd)) for p in padding[2 * i : 2 * i + 2]])
    padded = padded.repeat_interleave(weight.size(0) // x.size(1), dim=1)
    out = [(padded.size(i + 2) - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(nd)]
    y = padded.new_zeros([x.size(0), weight.size(0), *out])
    for index, tap in enumerate(itertools.product(*map(range, kernel))):
        window = tuple(
            slice(u * dilation[i], u * dilation[i] + stride[i] * (out[i] - 1) + 1, stride[i]) for i, u in enumerate(tap)
        )
        y = y + padded[(slice(None), slice(None)) + window] * _per_channel(weight.flatten(1)[:, index], nd)
    if bias is not None:
        y = y + _per_channel(bias.double(), nd)
    return activation(y, act, act_param)


def separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    mid_act: str = "none",
    mid_param: float = 0.0,
    act: str = "none",
    act_param: float = 0.0,
) -> Tensor:
    """Depthwise-separable convolution by its definition, in float64.

    Parameters
    ----------
    x, depthwise_weight, depthwise_bias, stride, padding, dilation, mid_act, mid_param
        The first stage, as in `depthwise`.
    pointwise_weight : Tensor
        [K, C*m, 1, ...].
    pointwise_bias : Tensor, optional
        [K].
    residual : Tensor, optional
        [N, K, *output], added before the last activation.
    act, act_param
        The last activation, as in `activation`.

    Returns
    -------
    Tensor
        [N, K, *output], float64.

    Examples
    --------
    >>> import torch
    >>> separable(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3), torch.ones(1, 2, 1, 1)).item()
    18.0
    """
    middle = depthwise(x, depthwise_weight, depthwise_bias, stride, padding, dilation, mid_act, mid_param)
    weight = pointwise_weight.double().flatten(1)
    y = (weight @ middle.flatten(2)).unflatten(2, middle.shape[2:])
    if pointwise_bias is not None:
        y = y + _per_channel(pointwise_bias.double(), middle.dim() - 2)
    if residual is not None:
        y = y + residual.double()
    return activation(y, act, act_param)


def _per_channel(values: Tensor, nd: int) -> Tensor:
    return values.reshape(-1, *[1] * nd)
