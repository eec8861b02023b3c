"""The truth: both operations composed of PyTorch's own convolutions, in whatever dtype the tensors have.

In float64 this is the judge, in the tensors' own dtype it is the yardstick. Nothing here knows dsconv_ext.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
ACTIVATIONS = {
    "none": lambda x, _: x,
    "relu": lambda x, _: F.relu(x),
    "relu6": lambda x, _: F.relu6(x),
    "hardswish": lambda x, _: F.hardswish(x),
    # ATen's backward multiplies by a sixth in single precision, also in float64
    "hardsigmoid": lambda x, _: F.relu6(x + 3) / 6 if x.dtype == torch.float64 else F.hardsigmoid(x),
    "silu": lambda x, _: F.silu(x),
    "gelu": lambda x, _: F.gelu(x),
    "gelu_tanh": lambda x, _: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x, slope: F.leaky_relu(x, slope),
    "sigmoid": lambda x, _: torch.sigmoid(x),
    "tanh": lambda x, _: torch.tanh(x),
    "elu": lambda x, alpha: F.elu(x, alpha),
}
DEFAULT_PARAM = {"leaky_relu": 0.01, "elu": 1.0}
KINKS = {"relu": (0,), "leaky_relu": (0,), "elu": (0,), "relu6": (0, 6), "hardswish": (-3, 3), "hardsigmoid": (-3, 3)}
SPATIAL = {1: "w", 2: "hw", 3: "thw"}


def activate(x: Tensor, activation: tuple[str, float]) -> Tensor:
    """``activation`` is a name and its parameter (0 where it has none)."""
    return ACTIVATIONS[activation[0]](x, activation[1])


def pad(x: Tensor, padding) -> Tensor:
    """Zeros around ``x``; ``padding`` has (low, high) per spatial dimension, the first dimension first."""
    return F.pad(x, [side for pair in reversed(padding) for side in pair])


def depthwise_sum(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
    """The depthwise convolution without its activation.

    In float64, where PyTorch loops over the groups, as products of windows; the two are compared in test_cases.py.
    """
    if x.dtype == torch.float64:
        return windows_sum(pad(x, padding), weight, bias, stride, dilation)
    return CONV[x.dim() - 2](pad(x, padding), weight, bias, stride=stride, dilation=dilation, groups=x.shape[1])


def windows_sum(x: Tensor, weight: Tensor, bias: Tensor | None, stride, dilation) -> Tensor:
    """The unpadded depthwise convolution from its definition."""
    spatial = x.dim() - 2
    for i, (k, s, d) in enumerate(zip(weight.shape[2:], stride, dilation, strict=True)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]  # appends a dimension: the taps
    filters = weight.unflatten(0, (x.shape[1], -1)).flatten(2)
    y = torch.einsum("nc...t,cmt->ncm...", x.flatten(2 + spatial), filters).flatten(1, 2)
    return y if bias is None else y + bias.view(-1, *[1] * spatial)


def depthwise(x, weight, bias, stride, padding, dilation, activation=("none", 0.0)) -> Tensor:
    return activate(depthwise_sum(x, weight, bias, stride, padding, dilation), activation)


def separable_sum(
    x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual, stride, padding, dilation, mid
) -> Tensor:
    """The separable convolution with its residual, without the output activation."""
    middle = depthwise(x, depthwise_weight, depthwise_bias, stride, padding, dilation, mid)
    y = CONV[x.dim() - 2](middle, pointwise_weight, pointwise_bias)
    return y if residual is None else y + residual


def away_from_kinks(pre_activation: Tensor, activation: tuple[str, float], distance: float) -> Tensor:
    """False where rounding could carry ``pre_activation`` across a kink, so that two right answers differ there."""
    scale = distance * max(1.0, pre_activation.square().mean().sqrt().item() if pre_activation.numel() else 1.0)
    keep = torch.ones_like(pre_activation, dtype=torch.bool)
    for kink in KINKS.get(activation[0], ()):
        keep &= (pre_activation - kink).abs() > scale
    return keep


def output_size(size, kernel, stride, padding, dilation) -> tuple[int, ...]:
    rows = zip(size, kernel, stride, padding, dilation, strict=True)
    return tuple((n + lo + hi - d * (k - 1) - 1) // s + 1 for n, k, s, (lo, hi), d in rows)


def output_strides(x: Tensor, shape) -> tuple[int, ...]:
    """The strides an output of ``shape`` has: channels last if ``x`` has unit channel stride, else contiguous."""
    if x.size(1) > 1 and x.stride(1) == 1:
        order = [0, *range(2, len(shape)), 1]
        return torch.empty([shape[i] for i in order], device="meta").movedim(-1, 1).stride()
    return torch.empty(shape, device="meta").stride()
