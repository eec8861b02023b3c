"""The modules: drop-in depthwise convolutions, and depthwise-separable convolutions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import activations, functional
from .functional import Activation
from .geometry import normalise
from .packing import PackedLayer, PackedModule, packs_pointwise


def _pad(conv: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Pad as the padding mode says, which is not "zeros"; return also the padding that is left to the operator."""
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


class _DepthwiseConv(PackedModule):
    """What the three depthwise convolutions share; stands before nn.ConvNd among the bases."""

    _nd: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int | None = None,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if groups is not None and groups != in_channels:
            raise ValueError(
                f"{type(self).__name__}: groups: got {groups}, expected None or in_channels = {in_channels}: "
                "this is a depthwise convolution"
            )
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=in_channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_conv(cls, conv: nn.Module) -> Any:
        """Make the depthwise module of a convolution; both share the Parameter objects.

        Parameters
        ----------
        conv : nn.Conv1d, nn.Conv2d or nn.Conv3d, as the class
            Its ``groups`` must equal ``in_channels``, its parameters must be plain (no parametrization).

        Returns
        -------
        module
            With the dtype, device and training flag of `conv`. Hooks of `conv` stay with `conv`.

        Raises
        ------
        TypeError, ValueError
            If `conv` is something else.
        """
        expected = _CONV[cls._nd]
        if not isinstance(conv, expected):
            raise TypeError(f"{cls.__name__}: conv: got {type(conv).__name__}, expected {expected.__name__}")
        _check_plain(cls.__name__, "conv", conv)
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        return _adopt(module, conv)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x`: [N, C, *spatial] or [C, *spatial]."""
        parameters: dict[str, Any] = self._parameters
        if "weight" not in parameters or "bias" not in parameters:  # parametrized
            return self._conv_forward(x, cast(Tensor, self.weight), cast(Tensor, self.bias))
        weight, bias = parameters["weight"], parameters["bias"]
        settings = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        y = self._run_packed(x, None, (weight, bias), settings)
        return self._conv_forward(x, weight, bias) if y is None else y

    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        return normalise(self._nd, self.stride, self.padding, self.dilation, self.weight.shape)

    def _pack(self) -> PackedLayer | None:
        if self.padding_mode != "zeros":
            return None
        conv = cast(Any, self)
        nothing = ("none", 0.0)
        return PackedLayer.of((conv.weight, conv.bias), (None, None), conv.groups, self._geometry(), nothing, nothing)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = _pad(self, x)
        settings: Any = (self.stride, padding, self.dilation, "none", self.in_channels)
        return functional._depthwise(self._nd, x, weight, bias, *settings)


_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _check_plain(function: str, argument: str, conv: nn.Module) -> None:
    for name in ("weight", "bias"):
        if name not in conv._parameters:
            raise ValueError(f"{function}: {argument}: got a parametrized {name}, expected a plain parameter")


def _adopt(module: Any, conv: Any) -> Any:
    """Share the parameters of `conv`."""
    module.weight, module.bias = conv.weight, conv.bias
    module.training = conv.training
    return module


class DepthwiseConv1d(_DepthwiseConv, nn.Conv1d):
    """nn.Conv1d whose groups are its input channels; see `DepthwiseConv2d`.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.nn import DepthwiseConv1d
    >>> DepthwiseConv1d(4, 8, 3, padding="same")(torch.randn(2, 4, 10)).shape
    torch.Size([2, 8, 10])
    """

    _nd = 1


class DepthwiseConv2d(_DepthwiseConv, nn.Conv2d):
    """nn.Conv2d whose groups are its input channels: same constructor, attributes and state_dict.

    Parameters
    ----------
    in_channels, out_channels : int
        C and C*m.
    kernel_size, stride, padding, dilation, bias, padding_mode, device, dtype
        As in nn.Conv2d.
    groups : int, optional
        None or `in_channels`.

    Raises
    ------
    ValueError
        For any other `groups`, and as nn.Conv2d.

    Notes
    -----
    Input [N, C, H, W] or [C, H, W], output [N, C*m, Ho, Wo] or [C*m, Ho, Wo], in the layout
    `dsconv_ext.functional.depthwise_conv2d` describes.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.nn import DepthwiseConv2d
    >>> conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    >>> layer = DepthwiseConv2d.from_conv(conv)
    >>> x = torch.randn(1, 8, 6, 6)
    >>> layer.weight is conv.weight, torch.allclose(layer(x), conv(x), atol=1e-5)
    (True, True)
    """

    _nd = 2


class DepthwiseConv3d(_DepthwiseConv, nn.Conv3d):
    """nn.Conv3d whose groups are its input channels; see `DepthwiseConv2d`.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.nn import DepthwiseConv3d
    >>> DepthwiseConv3d(4, 4, 3, stride=2, padding=1)(torch.randn(1, 4, 6, 6, 6)).shape
    torch.Size([1, 4, 3, 3, 3])
    """

    _nd = 3


_DEPTHWISE: dict[int, Any] = {1: DepthwiseConv1d, 2: DepthwiseConv2d, 3: DepthwiseConv3d}


class _DepthwiseSeparableConv(PackedModule):
    """What the two depthwise-separable convolutions share."""

    _nd: ClassVar[int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        mid_activation: Activation = "none",
        activation: Activation = "none",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        middle = in_channels * depth_multiplier
        factory = {"bias": bias, "device": device, "dtype": dtype}
        depthwise = _DEPTHWISE[self._nd](
            in_channels, middle, kernel_size, stride, padding, dilation, padding_mode=padding_mode, **factory
        )
        self._assemble(depthwise, _CONV[self._nd](middle, out_channels, 1, **factory), mid_activation, activation)

    def _assemble(
        self, depthwise: nn.Module, pointwise: nn.Module, mid_activation: Activation, activation: Activation
    ) -> None:
        for name, value in (("mid_activation", mid_activation), ("activation", activation)):
            activations.parse(value, f"{type(self).__name__}: {name}")
        self.depthwise = depthwise
        self.pointwise = pointwise
        self.mid_activation = mid_activation
        self.activation = activation
        self.fuse = "auto"

    @classmethod
    def from_convs(
        cls,
        depthwise: nn.Module,
        pointwise: nn.Module,
        *,
        depthwise_bn: nn.Module | None = None,
        pointwise_bn: nn.Module | None = None,
        mid_activation: Activation = "none",
        activation: Activation = "none",
    ) -> Any:
        """Make one module of a depthwise and a 1x1 convolution, with the BatchNorm after either folded into it.

        Parameters
        ----------
        depthwise, pointwise : nn.Conv1d or nn.Conv2d, as the class
            A convolution with ``groups == in_channels``, and a 1x1 convolution with stride 1 and no padding.
        depthwise_bn, pointwise_bn : BatchNorm, optional
            In eval mode, with running statistics.
        mid_activation, activation : str or (str, float)
            After each of the two (after its BatchNorm).

        Returns
        -------
        module
            A convolution without BatchNorm shares its Parameter objects; a folded one has new ones. Hooks stay behind.

        Raises
        ------
        TypeError, ValueError
            If the convolutions are something else or do not fit, or if a BatchNorm is in training mode.
        """
        name, conv = cls.__name__, _CONV[cls._nd]
        first = _DEPTHWISE[cls._nd].from_conv(depthwise)
        if not isinstance(pointwise, conv):
            raise TypeError(f"{name}: pointwise: got {type(pointwise).__name__}, expected {conv.__name__}")
        _check_plain(name, "pointwise", pointwise)
        plain = {"kernel_size": 1, "stride": 1, "dilation": 1}
        if (
            any(set(getattr(pointwise, attribute)) != {one} for attribute, one in plain.items())
            or pointwise.padding not in ("valid", "same", (0,) * cls._nd)
            or pointwise.groups != 1
            or pointwise.in_channels != first.out_channels
        ):
            raise ValueError(
                f"{name}: pointwise: got {pointwise}, expected a 1x1 convolution of {first.out_channels} channels "
                "with stride 1, no padding and one group"
            )
        second = _adopt(
            conv(pointwise.in_channels, pointwise.out_channels, 1, bias=pointwise.bias is not None, device="meta"),
            pointwise,
        )
        _fold(name, "depthwise_bn", first, depthwise_bn)
        _fold(name, "pointwise_bn", second, pointwise_bn)
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._assemble(first, second, mid_activation, activation)
        module.training = depthwise.training
        return module

    def reset_parameters(self) -> None:
        """Initialise both convolutions as nn.Conv2d does."""
        for convolution in self.children():
            convolution.reset_parameters()  # type: ignore[operator]

    def extra_repr(self) -> str:
        names = ("mid_activation", "activation")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != "none")

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve `x`, [N, C, *spatial] or [C, *spatial]; `residual` is added before the last activation."""
        children = self._modules
        depthwise: Any = children["depthwise"]
        pointwise: Any = children["pointwise"]
        if not self._is_fusible(depthwise, pointwise):
            middle = activations.forward(depthwise(x), *activations.parse(self.mid_activation))
            y = pointwise(middle) if residual is None else pointwise(middle) + residual
            return activations.forward(y, *activations.parse(self.activation))
        first, second = depthwise._parameters, pointwise._parameters
        sources = (first["weight"], first["bias"], second["weight"], second["bias"])
        geometry = (depthwise.stride, depthwise.padding, depthwise.dilation)
        acts = (self.mid_activation, self.activation)
        settings = (*geometry, depthwise.groups, depthwise.padding_mode, *acts, self.fuse)
        y = self._run_packed(x, residual, sources, settings)
        if y is not None:
            return y
        padding = depthwise.padding
        if depthwise.padding_mode != "zeros":
            x, padding = _pad(depthwise, x)
        tensors = (x, first["weight"], second["weight"], first["bias"], second["bias"], residual)
        where = (depthwise.stride, padding, depthwise.dilation)
        return functional._separable(self._nd, tensors, *where, *acts, self.fuse, depthwise.in_channels)

    def _pack(self) -> PackedLayer | None:
        depthwise: Any = self.depthwise
        pointwise: Any = self.pointwise
        if depthwise.padding_mode != "zeros":
            return None
        return PackedLayer.of(
            (depthwise.weight, depthwise.bias),
            (pointwise.weight, pointwise.bias),
            depthwise.groups,
            depthwise._geometry(),
            activations.parse(self.mid_activation),
            activations.parse(self.activation),
            self.fuse,
        )

    def _is_fusible(self, depthwise: nn.Module, pointwise: nn.Module) -> bool:
        """Whether nothing needs to see the calls of the children: no hook, no parametrization, no other class."""
        return (
            type(depthwise) is _DEPTHWISE[self._nd]
            and type(pointwise) is _CONV[self._nd]
            and not (_has_hooks(depthwise) or _has_hooks(pointwise) or _has_any_global_hook())
        )


def _has_hooks(module: nn.Module) -> bool:
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks)


class DepthwiseSeparableConv1d(_DepthwiseSeparableConv):
    """Depthwise-separable convolution of signals; see `DepthwiseSeparableConv2d`.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.nn import DepthwiseSeparableConv1d
    >>> DepthwiseSeparableConv1d(4, 6, 5, padding="same", activation="gelu")(torch.randn(2, 4, 10)).shape
    torch.Size([2, 6, 10])
    """

    _nd = 1


class DepthwiseSeparableConv2d(_DepthwiseSeparableConv):
    """Depthwise convolution, activation, 1x1 convolution, activation, in one pass where that pays.

    Parameters
    ----------
    in_channels, out_channels : int
        C and K.
    kernel_size, stride, padding, dilation, padding_mode
        Of the depthwise convolution, as in nn.Conv2d.
    depth_multiplier : int
        m: the depthwise convolution has C*m output channels.
    bias : bool
        Of both convolutions.
    mid_activation, activation : str or (str, float)
        After the depthwise and after the 1x1 convolution, as in `dsconv_ext.functional.depthwise_conv2d`.
    device, dtype
        As in nn.Conv2d.

    Attributes
    ----------
    depthwise : DepthwiseConv2d
    pointwise : nn.Conv2d
        The owners of the parameters: the state_dict is that of two nn.Conv2d's. If one of them has a hook, a
        parametrization or another class, both are called one after the other, unfused.
    fuse : str
        "auto", "always" or "never", as in `dsconv_ext.functional.separable_conv2d`.

    Notes
    -----
    Input [N, C, H, W] or [C, H, W], output [N, K, Ho, Wo] or [K, Ho, Wo].

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.nn import DepthwiseSeparableConv2d
    >>> layer = DepthwiseSeparableConv2d(8, 16, 3, padding=1, mid_activation="relu6", activation=("leaky_relu", 0.1))
    >>> sorted(layer.state_dict())
    ['depthwise.bias', 'depthwise.weight', 'pointwise.bias', 'pointwise.weight']
    >>> layer(torch.randn(2, 8, 10, 10)).shape
    torch.Size([2, 16, 10, 10])
    """

    _nd = 2


def _fold(function: str, argument: str, conv: Any, bn: Any) -> None:
    """Fold a BatchNorm in eval mode into the convolution before it."""
    if bn is None:
        return
    if bn.training:
        raise ValueError(f"{function}: {argument}: got a module in training mode, expected eval mode")
    if bn.running_mean is None:
        raise ValueError(f"{function}: {argument}: got no running statistics, expected a BatchNorm that tracks them")
    if bn.num_features != conv.out_channels:
        raise ValueError(f"{function}: {argument}: got {bn.num_features} features, expected {conv.out_channels}")
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )


class DepthwiseSeparableBlock2d(PackedModule):
    """Block of MobileNetV1: depthwise, BatchNorm, activation, 1x1 convolution, BatchNorm, activation.

    Parameters
    ----------
    in_channels, out_channels : int
        C and K.
    kernel_size, stride, padding, dilation, depth_multiplier
        As in `DepthwiseSeparableConv2d`; neither convolution has a bias.
    mid_activation, activation : str or (str, float)
        After the first and the second BatchNorm.
    device, dtype
        As in nn.Conv2d.

    Attributes
    ----------
    depthwise, depthwise_bn, pointwise, pointwise_bn : DepthwiseConv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d

    Notes
    -----
    Input [N, C, H, W], output [N, K, Ho, Wo]. With both BatchNorms in eval mode they are folded into the convolutions,
    differentiably in grad mode, and one operator computes the block; batch statistics need the whole depthwise
    map, so in training mode (or if a child has hooks or was replaced) the children run one after the other.

    References
    ----------
    A. Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.nn import DepthwiseSeparableBlock2d
    >>> block = DepthwiseSeparableBlock2d(8, 16, 3, stride=2, padding=1)
    >>> block(torch.randn(2, 8, 10, 10)).shape
    torch.Size([2, 16, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        depth_multiplier: int = 1,
        mid_activation: Activation = "relu6",
        activation: Activation = "relu6",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("mid_activation", mid_activation), ("activation", activation)):
            activations.parse(value, f"{type(self).__name__}: {name}")
        middle = in_channels * depth_multiplier
        factory = {"device": device, "dtype": dtype}
        self.depthwise = DepthwiseConv2d(
            in_channels, middle, kernel_size, stride, padding, dilation, bias=False, **factory
        )
        self.depthwise_bn = nn.BatchNorm2d(middle, **factory)
        self.pointwise = nn.Conv2d(middle, out_channels, 1, bias=False, **factory)
        self.pointwise_bn = nn.BatchNorm2d(out_channels, **factory)
        self.mid_activation = mid_activation
        self.activation = activation

    def extra_repr(self) -> str:
        return f"mid_activation={self.mid_activation!r}, activation={self.activation!r}"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the block; `residual`, [N, K, Ho, Wo], is added before the last activation."""
        if not self._is_foldable():
            self.repack()  # a BatchNorm in training mode changes its statistics without a trace
            middle = self.depthwise_bn(self.depthwise(x))
            y = self.pointwise_bn(self.pointwise(activations.forward(middle, *activations.parse(self.mid_activation))))
            y = y if residual is None else y + residual
            return activations.forward(y, *activations.parse(self.activation))
        conv = self.depthwise
        sources = [t for module in self.children() for t in (*module._parameters.values(), *module._buffers.values())]
        acts, eps = (self.mid_activation, self.activation), (self.depthwise_bn.eps, self.pointwise_bn.eps)
        settings = (conv.stride, conv.padding, conv.dilation, conv.groups, acts, eps)
        y = self._run_packed(x, residual, sources, settings)
        if y is not None:
            return y
        depthwise, pointwise = self._fold()
        tensors = (x, depthwise[0], pointwise[0], depthwise[1], pointwise[1], residual)
        where = (conv.stride, conv.padding, conv.dilation)
        return functional._separable(2, tensors, *where, *acts, "auto", conv.in_channels)

    def _fold(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return _folded(self.depthwise, self.depthwise_bn), _folded(self.pointwise, self.pointwise_bn)

    def _pack(self) -> PackedLayer | None:
        mid, last = (activations.parse(act) for act in (self.mid_activation, self.activation))
        return PackedLayer.of(*self._fold(), self.depthwise.groups, self.depthwise._geometry(), mid, last)

    def _is_foldable(self) -> bool:
        return _are_foldable(self.children(), [DepthwiseConv2d, nn.BatchNorm2d, nn.Conv2d, nn.BatchNorm2d])


def _are_foldable(modules: Iterable[Any], types: list[Any]) -> bool:
    """Whether these are convolutions and BatchNorms in turn, in eval mode, as they were made and without hooks."""
    children = list(modules)
    return (
        not _has_any_global_hook()
        and [type(child) for child in children] == types
        and not any(bn.training or bn.running_mean is None or bn.weight is None for bn in children[1::2])
        and not any(conv.bias is not None for conv in children[::2])
        and not any(_has_hooks(child) for child in children)
    )


class InvertedResidual(PackedModule):
    """Block of MobileNetV2: 1x1 expansion, depthwise, 1x1 projection, each with BatchNorm, and the sum with the input.

    Parameters
    ----------
    in_channels, out_channels : int
        C and K.
    kernel_size, stride, dilation
        Of the depthwise convolution, which is padded by half of the kernel's extent. The input is added to the output
        if the stride is 1 and C = K.
    expand_ratio : int
        The depthwise convolution has C * expand_ratio channels; there is no expansion if it is 1.
    activation : str or (str, float)
        After the expansion and the depthwise convolution; the projection is linear.
    device, dtype
        As in nn.Conv2d.

    Notes
    -----
    Input [N, C, H, W], output [N, K, Ho, Wo]. The last two convolutions are a `DepthwiseSeparableBlock2d`; in eval mode
    without gradients a CPU computes the expansion, too, with one operator.

    References
    ----------
    M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.

    Examples
    --------
    >>> import torch
    >>> from dsconv_ext.nn import InvertedResidual
    >>> InvertedResidual(8, 8)(torch.randn(2, 8, 10, 10)).shape
    torch.Size([2, 8, 10, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        expand_ratio: int = 6,
        activation: Activation = "relu6",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        activations.parse(activation, f"{type(self).__name__}: activation")
        factory = {"device": device, "dtype": dtype}
        middle = in_channels * expand_ratio
        self.activation = activation
        self.has_residual = stride == 1 and in_channels == out_channels
        self.expand: nn.Module | None = None
        if expand_ratio != 1:
            convolution = nn.Conv2d(in_channels, middle, 1, bias=False, **factory)
            self.expand = nn.Sequential(convolution, nn.BatchNorm2d(middle, **factory))
        padding = dilation * (kernel_size - 1) // 2
        self.block = DepthwiseSeparableBlock2d(
            middle, out_channels, kernel_size, stride, padding, dilation, 1, activation, "none", **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block."""
        return self.block(x if self.expand is None else self._expanded(x), x if self.has_residual else None)

    def _expanded(self, x: Tensor) -> Tensor:
        expand: Any = self.expand
        is_foldable = _are_foldable(expand.children(), [nn.Conv2d, nn.BatchNorm2d]) and not _has_hooks(expand)
        if is_foldable and packs_pointwise(expand[0], x):
            sources = [t for module in expand for t in (*module._parameters.values(), *module._buffers.values())]
            conv, norm = expand
            y = self._run_packed(x, None, sources, (conv.stride, conv.padding, conv.groups, self.activation, norm.eps))
            if y is not None:
                return y
        else:
            self.repack()
        return activations.forward(expand(x), *activations.parse(self.activation))

    def _pack(self) -> PackedLayer | None:
        expand: Any = self.expand
        return PackedLayer.of_pointwise(*_folded(*expand), activations.parse(self.activation))


def _folded(conv: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of `conv` with `bn`, by its running statistics, folded in, differentiably."""
    weight, bias = conv.weight, conv.bias
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight
    shift = (-bn.running_mean if bias is None else bias - bn.running_mean) * scale
    shift = shift if bn.bias is None else shift + bn.bias
    folded = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)
