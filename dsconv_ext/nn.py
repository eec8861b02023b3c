"""The modules: drop-in depthwise convolutions, and depthwise-separable convolutions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights

from . import activations, functional
from .functional import Activation

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_functorch_level = torch._C._functorch.peek_interpreter_stack


class _Packed:
    """Packed weights and what they were made from; no pytree, so that export does not look inside."""

    __slots__ = ("key", "tensor", "weights")

    def __init__(self, key: tuple[Any, ...], weights: tuple[Tensor, ...], tensor: Tensor | None) -> None:
        self.key = key
        self.weights = weights  # kept alive, so that their ids stay theirs
        self.tensor = tensor


class _PackedWeights(nn.Module):
    """A module that keeps its weights in the packed form of the kernels as long as nothing can have changed them.

    The packed form is used only while grad mode is off and nothing compiles, exports or transforms; it is dropped by a
    forward in grad mode, train(), eval(), load_state_dict(), to() and the like, copy and pickle. Writes that leave no
    trace on the parameter (``param.data``, a fused optimizer, both without any of these in between) need `repack`.
    """

    _packed: _Packed | None = None

    def repack(self) -> None:
        """Forget the packed weights: the next forward makes them anew.

        Needed only after a write to a parameter that PyTorch does not track, such as ``weight.data.mul_(2)``, between two
        forwards without grad mode.
        """
        self._packed = None

    def _packed_weights(self, depthwise: Tensor, pointwise: Tensor | None = None) -> Tensor | None:
        if _is_grad_enabled():
            if self._packed is not None and not torch.compiler.is_exporting():
                self._packed = None
            return None
        if _is_compiling() or _functorch_level() is not None:
            return None
        key = _identity(depthwise) if pointwise is None else _identity(depthwise) + _identity(pointwise)
        packed = self._packed
        if packed is None or packed.key != key:
            packed = self._packed = _pack(key, depthwise, pointwise)
        return packed.tensor

    def train(self, mode: bool = True) -> Any:
        self._packed = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _identity(weight: Tensor) -> tuple[Any, ...]:
    version = None if weight.is_inference() else weight._version
    return id(weight), weight.data_ptr(), version, weight.dtype, weight.device


def _pack(key: tuple[Any, ...], depthwise: Tensor, pointwise: Tensor | None) -> _Packed:
    weights = (depthwise,) if pointwise is None else (depthwise, pointwise)
    tensor = None
    if depthwise.device.type == "cpu" and all(type(w) is nn.Parameter for w in weights):
        tensor = torch.ops.dsconv.pack(depthwise.detach(), None if pointwise is None else pointwise.detach())
    # An empty answer means that the kernels read these weights as they are.
    return _Packed(key, weights, tensor if tensor is not None and tensor.numel() else None)


def _parameter(module: nn.Module, name: str) -> Any:
    """Like getattr, without the cost of nn.Module.__getattr__ where the parameter is a plain one."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _pad(conv: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Pad as the padding mode says; return also the padding that is left to the operator."""
    if conv.padding_mode == "zeros":
        return x, conv.padding
    return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0


class _DepthwiseConv(_PackedWeights):
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
        return self._conv_forward(x, _parameter(self, "weight"), _parameter(self, "bias"))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packed = self._packed_weights(weight)
        x, padding = _pad(self, x)
        return functional._depthwise(self._nd, x, weight, bias, self.stride, padding, self.dilation, "none", packed)


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


class _DepthwiseSeparableConv(_PackedWeights):
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
        self.depthwise.reset_parameters()
        self.pointwise.reset_parameters()

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
        packed = self._packed_weights(first["weight"], second["weight"])
        x, padding = _pad(depthwise, x)
        return functional._separable(
            self._nd,
            (x, first["weight"], second["weight"], first["bias"], second["bias"], residual),
            depthwise.stride,
            padding,
            depthwise.dilation,
            self.mid_activation,
            self.activation,
            self.fuse,
            packed,
        )

    def _is_fusible(self, depthwise: nn.Module, pointwise: nn.Module) -> bool:
        """Whether nothing needs to see the calls of the children: no hook, no parametrization, no other class."""
        return (
            type(depthwise) is _DEPTHWISE[self._nd]
            and type(pointwise) is _CONV[self._nd]
            and not (
                depthwise._forward_hooks
                or depthwise._forward_pre_hooks
                or depthwise._backward_hooks
                or depthwise._backward_pre_hooks
                or pointwise._forward_hooks
                or pointwise._forward_pre_hooks
                or pointwise._backward_hooks
                or pointwise._backward_pre_hooks
                or _has_any_global_hook()
            )
        )


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
