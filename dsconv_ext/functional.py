"""The functions: depthwise and depthwise-separable convolution, as torch.nn.functional has its convolutions."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, autograd
from .checks import check_depthwise, check_expansion, check_fuse, check_separable
from .geometry import normalise
from .ops import cast_inputs

Activation = str | tuple[str, float]

_depthwise_op: Any = autograd.depthwise
_separable_op: Any = autograd.separable
_is_compiling = torch.compiler.is_compiling
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def depthwise_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    activation: Activation = "none",
) -> Tensor:
    """Depthwise convolution of a signal; see `depthwise_conv2d`.

    Parameters
    ----------
    x : Tensor
        [N, C, L] or [C, L].
    weight : Tensor
        [C*m, 1, k].
    bias, stride, padding, dilation, activation
        As in `depthwise_conv2d`, for one dimension.

    Returns
    -------
    Tensor
        [N, C*m, Lo] or [C*m, Lo].

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.functional import depthwise_conv1d
    >>> depthwise_conv1d(torch.ones(1, 2, 5), torch.ones(2, 1, 3), padding=((2, 0),))[0, 0]
    tensor([1., 2., 3., 3., 3.])
    """
    return _depthwise(1, x, weight, bias, stride, padding, dilation, activation)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    activation: Activation = "none",
) -> Tensor:
    r"""Depthwise convolution of images: every channel is filtered by its own m kernels.

    .. math:: Y[n,c,i,j] = act\big(b[c] + \sum_{u,v} X[n, \lfloor c/m \rfloor, i s_h + u d_h - p_t,
              j s_w + v d_w - p_l] \, W[c,0,u,v]\big)

    Parameters
    ----------
    x : Tensor
        [N, C, H, W] or unbatched [C, H, W]; float64, float32, bfloat16 or float16; any strides.
    weight : Tensor
        [C*m, 1, kh, kw], as ``nn.Conv2d(C, C * m, k, groups=C)`` has it; dtype and device of `x`.
    bias : Tensor, optional
        [C*m].
    stride, dilation : int or (int, int)
        Positive.
    padding : int, (int, int), ((top, bottom), (left, right)), "valid" or "same"
        Zeros around the input; "same" needs stride 1.
    activation : str or (str, float)
        none, relu, relu6, hardswish, hardsigmoid, silu, gelu, gelu_tanh, leaky_relu, sigmoid, tanh, elu; or a pair with
        the slope of leaky_relu (0.01 by default) or the alpha of elu (1.0).

    Returns
    -------
    Tensor
        [N, C*m, Ho, Wo] (or without N), Ho = floor((H + top + bottom - dh * (kh - 1) - 1) / sh) + 1. channels_last if
        ``C > 1 and x.stride(1) == 1``, else contiguous.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is expected.

    Notes
    -----
    Sums are kept in float32 (float64 for float64). Under autocast, floating inputs are cast as F.conv2d casts them.
    Differentiable to any order, in forward and reverse mode, under torch.func and torch.compile.

    References
    ----------
    F. Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", CVPR 2017.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.functional import depthwise_conv2d
    >>> x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 3, 3)
    >>> y = depthwise_conv2d(x, weight, stride=2, padding=1, activation="relu")
    >>> y.shape
    torch.Size([2, 8, 5, 5])
    >>> expected = torch.relu(torch.nn.functional.conv2d(x, weight, None, 2, 1, groups=8))
    >>> torch.allclose(y, expected, atol=1e-5)
    True
    """
    return _depthwise(2, x, weight, bias, stride, padding, dilation, activation)


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    activation: Activation = "none",
) -> Tensor:
    """Depthwise convolution of volumes; see `depthwise_conv2d`.

    Parameters
    ----------
    x : Tensor
        [N, C, D, H, W] or [C, D, H, W].
    weight : Tensor
        [C*m, 1, kd, kh, kw].
    bias, stride, padding, dilation, activation
        As in `depthwise_conv2d`, for three dimensions.

    Returns
    -------
    Tensor
        [N, C*m, Do, Ho, Wo] or [C*m, Do, Ho, Wo].

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.functional import depthwise_conv3d
    >>> depthwise_conv3d(torch.randn(1, 4, 6, 6, 6), torch.randn(4, 1, 3, 3, 3), padding="same").shape
    torch.Size([1, 4, 6, 6, 6])
    """
    return _depthwise(3, x, weight, bias, stride, padding, dilation, activation)


def separable_conv1d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    mid_activation: Activation = "none",
    activation: Activation = "none",
    residual: Tensor | None = None,
    fuse: str = "auto",
) -> Tensor:
    """Depthwise-separable convolution of a signal; see `separable_conv2d`.

    Parameters
    ----------
    x : Tensor
        [N, C, L] or [C, L].
    depthwise_weight : Tensor
        [C*m, 1, k].
    pointwise_weight : Tensor
        [K, C*m, 1].
    depthwise_bias, pointwise_bias, stride, padding, dilation, mid_activation, activation, residual, fuse
        As in `separable_conv2d`, for one dimension.

    Returns
    -------
    Tensor
        [N, K, Lo] or [K, Lo].

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.functional import separable_conv1d
    >>> separable_conv1d(torch.randn(2, 4, 9), torch.randn(4, 1, 3), torch.randn(6, 4, 1), dilation=2).shape
    torch.Size([2, 6, 5])
    """
    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    return _separable(1, tensors, stride, padding, dilation, mid_activation, activation, fuse)


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    mid_activation: Activation = "none",
    activation: Activation = "none",
    residual: Tensor | None = None,
    fuse: str = "auto",
) -> Tensor:
    r"""Depthwise-separable convolution of images: a depthwise convolution followed by a 1x1 convolution.

    .. math:: A = act_{mid}(depthwise(X) + b_d), \quad
              Y[n,o,i,j] = act\big(b_p[o] + \sum_c A[n,c,i,j] W_p[o,c] + R[n,o,i,j]\big)

    Parameters
    ----------
    x : Tensor
        [N, C, H, W] or unbatched [C, H, W]; float64, float32, bfloat16 or float16; any strides.
    depthwise_weight : Tensor
        [C*m, 1, kh, kw].
    pointwise_weight : Tensor
        [K, C*m, 1, 1].
    depthwise_bias, pointwise_bias : Tensor, optional
        [C*m] and [K].
    stride, padding, dilation
        Of the depthwise convolution, as in `depthwise_conv2d`; the 1x1 convolution has stride 1 and no padding.
    mid_activation, activation : str or (str, float)
        After the depthwise and after the 1x1 convolution, as in `depthwise_conv2d`.
    residual : Tensor, optional
        Added before the last activation; has the shape of the output.
    fuse : {"auto", "always", "never"}
        Whether one pass computes both, so that the depthwise map does not travel through memory: as the planner
        estimates, wherever a kernel exists for it, or not at all.

    Returns
    -------
    Tensor
        [N, K, Ho, Wo] (or without N), in the layout `depthwise_conv2d` describes.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is expected.

    Notes
    -----
    In half precision the depthwise value is rounded to the dtype of `x` once, after the mid activation. The backward
    pass computes the depthwise map anew: what is saved are the inputs, and the output where an activation needs it.
    On CUDA, PyTorch's precision of float32 matrix products (``torch.backends.cuda.matmul.fp32_precision``,
    ``torch.set_float32_matmul_precision``) holds for the 1x1 convolution: only "tf32" lets its factors be rounded.

    References
    ----------
    A. Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.functional import separable_conv2d
    >>> x = torch.randn(2, 8, 9, 9)
    >>> y = separable_conv2d(x, torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1), padding=1, mid_activation="relu6")
    >>> y.shape
    torch.Size([2, 16, 9, 9])
    """
    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, residual)
    return _separable(2, tensors, stride, padding, dilation, mid_activation, activation, fuse)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor | None,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    expand_bias: Tensor | None = None,
    depthwise_bias: Tensor | None = None,
    project_bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *,
    expand_activation: Activation = "relu6",
    mid_activation: Activation = "relu6",
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Inverted residual of MobileNetV2: expand by a 1x1 convolution, filter depthwise, project by a 1x1 convolution.

    Parameters
    ----------
    x : Tensor
        [N, C, H, W] or unbatched [C, H, W].
    expand_weight : Tensor or None
        [E, C, 1, 1]; None for a block without expansion (E = C).
    depthwise_weight : Tensor
        [E*m, 1, kh, kw].
    project_weight : Tensor
        [K, E*m, 1, 1].
    expand_bias, depthwise_bias, project_bias : Tensor, optional
        [E], [E*m], [K].
    stride, padding, dilation
        Of the depthwise convolution, as in `depthwise_conv2d`.
    expand_activation, mid_activation, activation : str or (str, float)
        After each of the three convolutions, as in `depthwise_conv2d`.
    residual : Tensor, optional
        Added before the last activation; `x` itself in a block whose input and output have one shape.

    Returns
    -------
    Tensor
        [N, K, Ho, Wo] (or without N).

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what is expected.

    References
    ----------
    M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.functional import inverted_residual
    >>> x = torch.randn(1, 4, 8, 8)
    >>> expand, depthwise, project = torch.randn(24, 4, 1, 1), torch.randn(24, 1, 3, 3), torch.randn(4, 24, 1, 1)
    >>> inverted_residual(x, expand, depthwise, project, padding=1, residual=x).shape
    torch.Size([1, 4, 8, 8])
    """
    name = "inverted_residual"
    expand = activations.parse(expand_activation, f"{name}: expand_activation")
    if isinstance(x, Tensor) and _is_any_autocast_enabled():
        x, expand_weight, expand_bias = _autocast(x, expand_weight, expand_bias)
    check_expansion(name, x, expand_weight, expand_bias)
    if expand_weight is not None:
        x = activations.forward(F.conv2d(x, expand_weight, expand_bias), *expand)
    tensors = (x, depthwise_weight, project_weight, depthwise_bias, project_bias, residual)
    where = (stride, padding, dilation)
    return _separable(2, tensors, *where, mid_activation, activation, "auto", names=(name, "project"))


def _depthwise_settings(
    nd: int, stride: Any, padding: Any, dilation: Any, weight_shape: Any, activation: Activation
) -> tuple[Any, ...]:
    """Geometry and activation in the order of the operator."""
    try:
        return (*normalise(nd, stride, padding, dilation, weight_shape), *activations.parse(activation))
    except (TypeError, ValueError) as error:
        raise type(error)(f"depthwise_conv{nd}d: {error}") from None


def _separable_settings(
    function: str,
    nd: int,
    stride: Any,
    padding: Any,
    dilation: Any,
    weight_shape: Any,
    mid_activation: Activation,
    activation: Activation,
    fuse: str,
) -> tuple[Any, ...]:
    """Geometry, activations and fuse in the order of the operator."""
    try:
        check_fuse("fuse", fuse)
        return (
            *normalise(nd, stride, padding, dilation, weight_shape),
            *activations.parse(mid_activation, "mid_activation"),
            *activations.parse(activation),
            fuse,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{function}: {error}") from None


_SEPARABLE_NAMES = {1: ("separable_conv1d", "pointwise"), 2: ("separable_conv2d", "pointwise")}
# Typed, so that 1.0 and True, which equal 1, are not taken for it.
_cached_depthwise_settings = functools.lru_cache(maxsize=1024, typed=True)(_depthwise_settings)
_cached_separable_settings = functools.lru_cache(maxsize=1024, typed=True)(_separable_settings)


def _autocast(*tensors: Any) -> list[Any]:
    device_type = tensors[0].device.type
    return cast_inputs(device_type, tensors) if torch.is_autocast_enabled(device_type) else list(tensors)


def _allows_tf32() -> bool:
    """Whether matrix products of float32 on CUDA may be rounded: the setting that torch.matmul, the second stage of the
    unfused way, obeys. Compiled code is compiled anew when it changes: Dynamo guards it."""
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


# As torch.compiler.assume_constant_result does, which imports all of Dynamo: that takes as long as torch itself.
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_channels(function: str, nd: int, x: Tensor, channels: int | None) -> None:
    """Refuse what the weight alone would take: its filters are a multiple of fewer channels, too."""
    if channels is not None and x.dim() > nd and x.size(-nd - 1) != channels:
        raise ValueError(f"{function}: x: got {x.size(-nd - 1)} channels, expected {channels}")


def _depthwise(
    nd: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    activation: Activation,
    channels: int | None = None,
) -> Tensor:
    """Compute a depthwise convolution; `channels` are those that x must have, else the weight says it alone."""
    weight_shape = getattr(weight, "shape", None) if padding == "same" else None
    key = (nd, stride, padding, dilation, weight_shape, activation)
    try:
        settings = _depthwise_settings(*key) if _is_compiling() else _cached_depthwise_settings(*key)
    except TypeError:  # a list, which has no hash, or an error to raise again
        settings = _depthwise_settings(*key)
    try:
        if _is_any_autocast_enabled():
            x, weight, bias = _autocast(x, weight, bias)
        _check_channels(f"depthwise_conv{nd}d", nd, x, channels)
        if x.dim() == nd + 1:
            return _depthwise_op(x.unsqueeze(0), weight, bias, *settings).squeeze(0)
        return _depthwise_op(x, weight, bias, *settings)
    except Exception as error:
        refusal = error
    # The operator checks its tensors on every call; the message is written out only once it has refused.
    x = x.unsqueeze(0) if isinstance(x, Tensor) and x.dim() == nd + 1 else x
    check_depthwise(f"depthwise_conv{nd}d", nd, x, weight, bias, *settings[:3])
    raise refusal


def _separable(
    nd: int,
    tensors: tuple[Any, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    mid_activation: Activation,
    activation: Activation,
    fuse: str,
    channels: int | None = None,
    names: tuple[str, str] | None = None,
) -> Tensor:
    """Compute a separable convolution; `names` are those of the function and of its pointwise stage in errors.

    `channels` as in `_depthwise`.
    """
    function, pointwise_name = names or _SEPARABLE_NAMES[nd]
    weight_shape = getattr(tensors[1], "shape", None) if padding == "same" else None
    key = (function, nd, stride, padding, dilation, weight_shape, mid_activation, activation, fuse)
    try:
        settings = _separable_settings(*key) if _is_compiling() else _cached_separable_settings(*key)
    except TypeError:  # as in _depthwise
        settings = _separable_settings(*key)
    unbatched = False
    try:
        if _is_any_autocast_enabled():
            tensors = tuple(_autocast(*tensors))
        _check_channels(function, nd, tensors[0], channels)
        unbatched = tensors[0].dim() == nd + 1
        if unbatched:
            x, *weights, residual = tensors
            tensors = (x.unsqueeze(0), *weights, None if residual is None else residual.unsqueeze(0))
        if tensors[0].is_cuda and tensors[0].dtype is torch.float32 and _allows_tf32():
            settings = (*settings, True)
        y = _separable_op(*tensors, *settings)
        return y.squeeze(0) if unbatched else y
    except Exception as error:
        refusal = error
    check_separable(function, nd, *tensors, *settings[:3], pointwise_name=pointwise_name)  # as in _depthwise
    raise refusal
