"""Packed layers: a layer as one tensor of the kernels, kept as long as nothing can have changed what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import ops  # noqa: F401  (registers the operators)
from .layers import is_pointwise

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

    __slots__ = ("_aliases", "_marks", "_settings", "_steps", "value")

    def __init__(self, sources: Sources, settings: Any, value: Any) -> None:
        self.value = value
        self._settings = settings
        self._steps = _optimizer_steps.count
        # Keep the memory, so that its address stays unique.
        self._aliases = [t.detach() for t in sources if t is not None]
        self._marks = [
            (t, 0, None) if t is None else (t, t.data_ptr(), None if t.is_inference() else t._version) for t in sources
        ]

    def is_current(self, sources: Sources, settings: Any) -> bool:
        """Whether the same would be made from these."""
        if self._steps != _optimizer_steps.count or self._settings != settings or len(sources) != len(self._marks):
            return False
        for i, source in enumerate(sources):
            marked, address, version = self._marks[i]
            if source is not marked:
                return False
            if source is None:
                continue
            if source.data_ptr() != address or (version is not None and source._version != version):
                return False
        return True


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

    __slots__ = ("_bytes", "_rank")

    def __init__(self, packed: Tensor, rank: int) -> None:
        self._bytes = packed
        self._rank = rank

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
        """Pack weight and bias of a pointwise convolution alone; None as `of`."""
        if weight.device.type != "cpu":
            return None
        try:
            packed = _pack_pointwise(weight.detach(), None if bias is None else bias.detach(), *activation)
        except RuntimeError:
            return None
        return cls(packed, weight.dim()) if packed.numel() else None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor | None:
        """Compute the layer; None for an input that needs the other operators: unbatched, or one they refuse, too."""
        if x.dim() != self._rank:
            return None
        try:
            return _run_packed(x, self._bytes, residual)
        except RuntimeError:
            return None


def packs_pointwise(conv: Any, x: Any) -> bool:
    """Whether a convolution by itself is worth packing for `x`: a pointwise one, where channels are neighbours.

    Other maps would have to be transposed, and PyTorch is faster there.
    """
    return (
        type(x) is Tensor
        and not _is_compiling()
        and is_pointwise(conv)
        and x.dim() == len(conv.kernel_size) + 2
        and x.stride(1) == 1
    )


class PackedModule(nn.Module):
    """A module that keeps itself in the packed form of the kernels as long as nothing can have changed it.

    The packed form is used only while grad mode is off and nothing compiles, exports, traces or transforms; it is
    dropped by a forward in grad mode, a step of any optimizer, train(), eval(), load_state_dict(), to() and the like,
    copy and pickle. Writes that leave no trace on a parameter (through ``param.data``, or to one that was made in
    inference mode, without any of these in between) need `repack`.
    """

    _packed: Kept | None = None

    def repack(self) -> None:
        """Forget the packed form: the next forward makes it anew.

        Needed only after a write to a parameter that PyTorch does not track, between two forwards without grad mode:
        ``weight.data.mul_(2)``, or ``weight.mul_(2)`` where the parameter was made in inference mode.
        """
        if self._packed is not None:  # tracers look for writes
            self._packed = None

    def _pack(self) -> PackedLayer | None:
        """Pack the layer as it is now; None where the kernels want no packed form. Every subclass has its own."""
        raise NotImplementedError

    def _run_packed(self, x: Tensor, residual: Tensor | None, sources: Sources, settings: Any) -> Tensor | None:
        """Compute the packed form, which is made from `sources` and `settings`; None where this call cannot use it."""
        if _is_grad_enabled():
            if self._packed is not None and not torch.compiler.is_exporting():
                self._packed = None
            return None
        if not is_plain(x, residual):
            return None
        packed = self._packed
        if packed is None or not packed.is_current(sources, settings):
            if not can_be_marked(sources):
                return None
            packed = self._packed = Kept(sources, settings, self._pack())
        layer = packed.value
        return None if layer is None else layer(x, residual)

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
