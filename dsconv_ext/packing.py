"""Packed layers: a layer as one tensor of the kernels, kept as long as nothing can have changed what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops  # noqa: F401  (registers the operators)

_pack = torch.ops.dsconv.pack.default
_pack_pointwise = torch.ops.dsconv.pack_pointwise.default
_run_packed = torch.ops.dsconv.run_packed.default._op
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_functorch_level = torch._C._functorch.peek_interpreter_stack
_jit_trace = torch._C._get_tracing_state
_modes = torch._C._len_torch_dispatch_stack


class _OptimizerSteps:
    """Counts the steps of all optimizers: fused ones leave no trace on the parameters they change."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


_optimizer_steps = _OptimizerSteps()

Sources = Sequence[Tensor | None]


class Kept:
    """A value, and marks of the tensors and settings it was made from; no pytree, so that export does not look inside.

    Marks show that a tensor was replaced, moved, resized or written to in place, and that an optimizer took a step. A
    write through ``.data`` leaves none, nor does one to a tensor that was made in inference mode: it has no version.
    """

    __slots__ = (
        "_addresses",
        "_aliases",
        "_objects",
        "_settings",
        "_steps",
        "_tensors",
        "_versioned",
        "_versions",
        "value",
    )

    def __init__(self, sources: Sources, settings: Any, value: Any) -> None:
        self.value = value
        self._settings = settings
        self._steps = _optimizer_steps.count
        self._tensors = [t for t in sources if t is not None]
        self._objects = [*map(id, sources)]
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._aliases = [t.detach() for t in self._tensors]  # keep the memory, so that its address stays unique
        self._versioned = [t for t in self._tensors if not t.is_inference()]
        self._versions = [t._version for t in self._versioned]

    def is_current(self, sources: Sources, settings: Any) -> bool:
        """Whether the same would be made from these."""
        return (
            self._steps == _optimizer_steps.count
            and [*map(id, sources)] == self._objects
            and [t.data_ptr() for t in self._tensors] == self._addresses
            and [t._version for t in self._versioned] == self._versions
            and self._settings == settings
        )


def can_be_marked(sources: Sources) -> bool:
    """Whether these are tensors whose changes can be seen: no subclasses."""
    return all(t is None or type(t) in (nn.Parameter, Tensor) for t in sources)


def is_plain(x: Any, residual: Any = None) -> bool:
    """Whether this is inference on ordinary tensors: nothing differentiates, transforms, casts or traces it."""
    return (
        not _is_compiling()
        and type(x) is Tensor
        and (residual is None or type(residual) is Tensor)
        and not _is_grad_enabled()
        and _functorch_level() is None
        and forward_ad._current_level < 0
        and not _is_any_autocast_enabled()
        and _jit_trace() is None
        and not _modes()
    )


class PackedLayer:
    """A depthwise, separable or pointwise convolution with all its settings, as the kernels of this machine read it."""

    __slots__ = ("_bytes", "_needs_channels_last", "_rank")

    def __init__(self, packed: Tensor, rank: int, needs_channels_last: bool = False) -> None:
        self._bytes = packed
        self._rank = rank
        self._needs_channels_last = needs_channels_last

    @classmethod
    def of(
        cls,
        depthwise: tuple[Tensor, Tensor | None],
        pointwise: tuple[Tensor | None, Tensor | None],
        groups: int,
        geometry: Sequence[Sequence[int]],
        mid_activation: tuple[str, float],
        activation: tuple[str, float],
        fuse: str = "auto",
    ) -> PackedLayer | None:
        """Pack weight and bias of a depthwise and, unless they are None, of a pointwise convolution.

        None where the kernels want no packed form, and where they refuse the layer: the operators that take weights as
        they are say why.
        """
        if depthwise[0].device.type != "cpu":
            return None
        tensors = [None if t is None else t.detach() for t in (*depthwise, *pointwise)]
        try:
            packed = _pack(*tensors, groups, *geometry, *mid_activation, *activation, fuse)
        except RuntimeError:
            return None
        return cls(packed, depthwise[0].dim()) if packed.numel() else None

    @classmethod
    def of_pointwise(cls, weight: Tensor, bias: Tensor | None, activation: tuple[str, float]) -> PackedLayer | None:
        """Pack weight and bias of a pointwise convolution alone; None as `of`.

        The layer refuses maps whose channels are no neighbours: they would be transposed, and PyTorch is faster there.
        """
        if weight.device.type != "cpu":
            return None
        try:
            packed = _pack_pointwise(weight.detach(), None if bias is None else bias.detach(), *activation)
        except RuntimeError:
            return None
        return cls(packed, weight.dim(), needs_channels_last=True) if packed.numel() else None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
        """Compute the layer; None for an input that needs the other operators: unbatched, or one they refuse, too."""
        if x.dim() != self._rank or (self._needs_channels_last and x.stride(1) != 1):
            return None
        try:
            return _run_packed(x, self._bytes, residual)
        except RuntimeError:
            return None
