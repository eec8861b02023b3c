"""Chains: a convolution and what follows it in somebody's model, computed by one operator with the norms folded in.

The modules of a chain stay the owners of their parameters and settings. All of these are read anew in every call; only
the folded weights are kept between calls without gradients, for as long as what they were made from is untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import activations, functional, layers
from .functional import Activation
from .geometry import normalise, output_size
from .layers import Step
from .nn import _folded, _has_hooks
from .packing import Kept, PackedLayer, can_be_marked, is_plain, packs_pointwise

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_jit_trace = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.peek_interpreter_stack


@dataclass(frozen=True)
class Stage:
    """A convolution, the BatchNorm after it and the activation after that, which may be a part of the BatchNorm."""

    conv: Any
    norm: Any = None
    activation: Step | None = None

    def sources(self) -> list[Tensor | None]:
        """The tensors its folded weights are made from."""
        tensors = [self.conv._parameters["weight"], self.conv._parameters["bias"]]
        if self.norm is not None:
            parameters, buffers = self.norm._parameters, self.norm._buffers  # a frozen norm has buffers alone
            tensors += [parameters[name] if name in parameters else buffers.get(name) for name in ("weight", "bias")]
            tensors += [buffers.get("running_mean"), buffers.get("running_var")]
        return tensors

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the convolution with the norm folded in, differentiably."""
        return (self.conv.weight, self.conv.bias) if self.norm is None else _folded(self.conv, self.norm)

    def spelled_activation(self) -> Activation | None:
        """The activation after the norm; None if there is one that the operators do not have, or more than one."""
        inner = None if self.norm is None else self.norm._modules.get("act")
        found = [layers.activation(act) for act in (inner, self.activation) if act is not None]
        acts = [act for act in found if act != "none"] or ["none"]
        return acts[0] if len(acts) == 1 else None

    def obstacle(self) -> str | None:
        """Why its modules cannot be computed as one at this moment."""
        if not self.has_plain_weights():
            return "its weights are parametrized"
        if self.norm is not None:
            if layers.uses_batch_statistics(self.norm):
                return "its BatchNorm uses the statistics of the batch (training mode)"
            inner = self.norm._modules.get("act")
            if inner is not None and _has_hooks(inner):
                return "the activation inside its BatchNorm has hooks"
        return None

    def has_plain_weights(self) -> bool:
        return "weight" in self.conv._parameters and "bias" in self.conv._parameters


class Weights:
    """The folded weights of some stages, and their packed form, kept between calls without gradients.

    They are made anew once a parameter or buffer was replaced, moved or written to, after a step of any optimizer and
    after `forget`. A write through ``.data`` leaves none of these traces, nor one to a tensor made in inference mode.
    """

    def __init__(self, stages: Sequence[Stage], fuse: str = "auto") -> None:
        self.stages = stages
        self.fuse = fuse
        self.forget()

    def forget(self) -> None:
        self._kept: Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def __call__(self, geometry: Any, acts: Sequence[Any]) -> tuple[list[Any], PackedLayer | None]:
        """Weight and bias of each stage in turn, and the layer in packed form, if the kernels want one.

        The weights must be plain. `geometry` is the stride, padding and dilation of a depthwise convolution, else
        empty; `acts` holds the activation of each stage, and none where nobody wants a packed form.
        """
        if _is_compiling() or _jit_trace() is not None:
            return self._fold(), None
        if _is_grad_enabled() or _functorch_level() is not None:
            self.forget()
            return self._fold(), None
        sources = [tensor for stage in self.stages for tensor in stage.sources()]
        settings = (geometry, acts, [stage.norm.eps for stage in self.stages if stage.norm is not None])
        kept = self._kept
        if kept is None or not kept.is_current(sources, settings):
            folded = self._fold()
            if not can_be_marked(sources):
                self.forget()
                return folded, None
            kept = self._kept = Kept(sources, settings, (folded, self._pack(folded, geometry, acts)))
        return kept.value

    def _fold(self) -> list[Any]:
        return [tensor for stage in self.stages for tensor in stage.folded()]

    def _pack(self, folded: list[Any], geometry: Any, acts: Sequence[Any]) -> PackedLayer | None:
        weight, bias, *pointwise = folded
        if not geometry:
            return PackedLayer.of_pointwise(weight, bias, activations.parse(acts[0])) if acts else None
        stride, padding, dilation = geometry
        where = normalise(weight.dim() - 2, stride, padding, dilation, weight.shape)
        mid, last = (activations.parse(act) for act in ("none", *acts)[-2:])
        depthwise, second = (weight, bias), (tuple(pointwise) or (None, None))
        return PackedLayer.of(depthwise, second, self.stages[0].conv.groups, where, mid, last, self.fuse)


class Chain:
    """A depthwise convolution with what follows it, up to the end of the 1x1 convolution after it; or a shorter one.

    Parameters
    ----------
    stages : sequence of Stage
        A depthwise and a pointwise one, or one of any convolution.
    steps : sequence of Step or None
        Everything the chain replaces, in order; None stands for the addition of the residual.
    paths : dict of nn.Module to str
        How messages name the modules.
    fuse : str
        As in `dsconv_ext.functional.separable_conv2d`.
    """

    def __init__(
        self, stages: Sequence[Stage], steps: Sequence[Step | None], paths: dict[nn.Module, str], fuse: str
    ) -> None:
        self.stages = tuple(stages)
        self.steps = tuple(steps)
        self.fuse = fuse
        self.weights = Weights(self.stages, fuse)
        self.modules = tuple((m, paths[m]) for m in self._modules())
        self.paths = tuple(paths[stage.conv] for stage in self.stages)

    def _modules(self) -> list[nn.Module]:
        return [step.target for step in self.steps if step is not None and isinstance(step.target, nn.Module)]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for chains that compute the same."""
        return tuple(None if s is None else (s.target, s.args, tuple(s.kwargs.items())) for s in self.steps)

    def obstacle(self) -> str | None:
        """Why the modules must be called one by one at this moment; None if they need not."""
        return self._blocked() or ("an activation was changed" if None in self._activations() else None)

    def _activations(self) -> list[Any]:
        return [stage.spelled_activation() for stage in self.stages]

    def _blocked(self) -> str | None:
        if _has_any_global_hook():
            return "hooks on all modules"
        for module, path in self.modules:
            if _has_hooks(module):
                return f"{path} has hooks"
            if "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], ConvForward):
                return f"{path} has a forward of its own"
            if module.training and layers.is_dropout(module):
                return f"{path} drops values in training mode"
        for stage, path in zip(self.stages, self.paths, strict=True):
            if (reason := stage.obstacle()) is not None:
                return f"{path}: {reason}"
        return None

    def __call__(self, x: Tensor, residual: Any = None) -> Tensor:
        acts = self._activations()
        if not isinstance(x, Tensor) or None in acts or self._blocked() is not None:
            self.weights.forget()
            for step in self.steps:
                x = x + residual if step is None else step(x)
            return x
        return self._compute(x, residual, acts)

    def _compute(self, x: Tensor, residual: Any, acts: list[Any]) -> Tensor:
        first = self.stages[0].conv
        if not layers.is_depthwise(first):
            weights, packed = self.weights((), acts if packs_pointwise(first, x) else ())
            if packed is not None and is_plain(x, residual):
                computed = packed(x, residual)
                if computed is not None:
                    return computed
            return self._finish(layers.convolve(first, x, *weights), residual)
        nd = first.weight.dim() - 2
        x, padding = layers.padded(first, x)
        geometry = first.stride, padding, first.dilation
        weights, packed = self.weights(geometry, acts)
        if packed is not None and is_plain(x, residual):
            computed = packed(x, residual)
            if computed is not None:
                return computed
        if len(self.stages) == 1:
            return functional._depthwise(nd, x, weights[0], weights[1], *geometry, acts[0], first.in_channels)
        outside = residual is not None and not self._has_output_form(residual, x, nd, geometry)
        last = "none" if outside else acts[1]
        tensors = (x, weights[0], weights[2], weights[1], weights[3], None if outside else residual)
        y = functional._separable(nd, tensors, *geometry, acts[0], last, self.fuse, first.in_channels)
        return activations.forward(y + residual, *activations.parse(acts[1])) if outside else y

    def _finish(self, y: Tensor, residual: Any) -> Tensor:
        """Compute what follows the convolution of the only stage and its norm."""
        norm = self.stages[0].norm
        inner = None if norm is None else norm._modules.get("act")
        y = y if inner is None else inner(y)  # perhaps in place, which saves a map
        for step in self.steps[1:]:
            if step is None:
                y = y + residual
            elif step.target is not norm:
                y = step(y)
        return y

    def _has_output_form(self, residual: Any, x: Tensor, nd: int, settings: tuple[Any, ...]) -> bool:
        """Whether the operator can add `residual`: it neither broadcasts nor promotes."""
        if not isinstance(residual, Tensor) or residual.dtype != x.dtype or residual.dim() != x.dim():
            return False
        if torch._C._is_any_autocast_enabled() or residual.device != x.device:
            return False
        sizes_are_ints = not _is_compiling() and _jit_trace() is None
        find_size = _cached_output_size if sizes_are_ints else _output_size
        size = find_size(nd, x.shape[-nd:], self.stages[0].conv.weight.shape, *settings)
        batch = x.shape[: x.dim() - nd - 1]
        return residual.shape == (*batch, self.stages[1].conv.out_channels, *size)


def _output_size(nd: int, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    stride, padding, dilation = normalise(nd, stride, padding, dilation, kernel)
    return output_size(size, kernel[2:], stride, padding, dilation)


_cached_output_size = functools.lru_cache(maxsize=1024)(_output_size)


class Forward:
    """What stands in the place of the forward of a module, as an attribute of the instance."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def __code__(self) -> Any:  # torch.export reads where a forward was written
        return type(self.module).forward.__code__

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward of the module's class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def forget(self) -> None:
        """Forget the folded weights."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class ConvForward(Forward):
    """The forward of a depthwise or pointwise convolution that stays what it is: only the arithmetic changes."""

    def __init__(self, conv: Any) -> None:
        super().__init__(conv)
        self.weights = Weights((Stage(conv),))

    def forget(self) -> None:
        self.weights.forget()

    def __call__(self, x: Tensor) -> Tensor:
        conv = self.module
        if not isinstance(x, Tensor):  # a proxy of torch.fx
            return self.own(x)
        is_depthwise = layers.is_depthwise(conv)
        if not is_depthwise and not packs_pointwise(conv, x):
            return self.own(x)
        x, padding = layers.padded(conv, x) if is_depthwise else (x, None)
        geometry = conv.stride, padding, conv.dilation
        if self.weights.stages[0].has_plain_weights():
            packed = self.weights(geometry if is_depthwise else (), ("none",))[1]
            if packed is not None and is_plain(x):
                y = packed(x)
                if y is not None:
                    return y
        if not is_depthwise:
            return self.own(x)
        weight = conv.weight
        return functional._depthwise(weight.dim() - 2, x, weight, conv.bias, *geometry, "none", conv.in_channels)
