"""What computes a call: the compiled library, Triton, or the composition of PyTorch's own operators, and why.

What is here is registered below every compiled kernel (CompositeExplicitAutograd), so that the dispatcher itself falls
back for a device without kernels. Triton comes first; the composition warns once per operator and device type.
"""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _loader, activations, matmul
from ._version import __version__
from .checks import check_backward, check_depthwise, check_fuse, check_separable
from .geometry import like_output, output_size

_warned: set[tuple[str, str]] = set()
_record_of_calls: list[Call] | None = None


@dataclass(frozen=True)
class Candidate:
    """A kernel that was considered: the model's estimate of its time, or the reason why it cannot run."""

    name: str
    estimate_us: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Call:
    """One choice: the operator, its pass, the problem, the kernel taken and those considered."""

    op: str
    direction: str
    problem: str
    chosen: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        lines = [f"{self.op} {self.direction}  {self.problem}", f"  -> {self.chosen}"]
        for candidate in self.candidates:
            estimate = "" if candidate.estimate_us is None else f"{candidate.estimate_us:10.1f} us (estimate)"
            lines.append(f"     {candidate.name:40s} {candidate.reason or estimate}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What a function ran on.

    Attributes
    ----------
    chosen : tuple of str
        The name of the kernel of each call, in the order of the calls.
    candidates : tuple of tuple of Candidate
        For each call, the kernels considered: the estimate of each, and the reason of each that cannot run.
    calls : tuple of Call
        The same with operator, pass and problem.
    """

    chosen: tuple[str, ...]
    candidates: tuple[tuple[Candidate, ...], ...]
    calls: tuple[Call, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "no dsconv operator was called"


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run a function and say which kernels its dsconv operators ran on, and why not on others.

    Parameters
    ----------
    fn : callable
        Called once as ``fn(*args, **kwargs)``; a module, a function of `dsconv_ext.functional`, a training step.

    Returns
    -------
    Explanation

    Notes
    -----
    The recording is process wide: calls of other threads meanwhile are recorded too.

    Examples
    --------
    >>> import torch, dsconv_ext
    >>> x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3)
    >>> explanation = dsconv_ext.explain(dsconv_ext.functional.depthwise_conv2d, x, weight)
    >>> len(explanation.chosen)
    1
    """
    global _record_of_calls
    recorded: list[Call] = []
    _record_of_calls = recorded
    torch.ops.dsconv.explain_begin()
    try:
        fn(*args, **kwargs)
    finally:
        _record_of_calls = None
        rows = json.loads(torch.ops.dsconv.explain_end())
    compiled = [
        Call(row["op"], row["pass"], row["problem"], row["chosen"], tuple(Candidate(**c) for c in row["candidates"]))
        for row in rows
    ]
    calls = tuple(compiled + recorded)
    return Explanation(tuple(c.chosen for c in calls), tuple(c.candidates for c in calls), calls)


def empty_cache() -> None:
    """Give the memory that waits for outputs back to the system, as `torch.cuda.empty_cache` does for a GPU.

    On a CPU under Linux, outputs and gradients of 64 KiB or more lie in memory of the library, which keeps it when a
    tensor is freed and gives it to a later one of about the same size. What 256 later tensors have not wanted, the
    system may take back (``MADV_FREE``); what 1,024 have not wanted is given back, and so is what exceeds four times
    the memory that was in use at one time. ``DSCONV_CPU_CACHE=0`` in the environment leaves all memory to PyTorch.
    PyTorch cannot resize the storage of such a tensor.

    Examples
    --------
    >>> import dsconv_ext
    >>> dsconv_ext.empty_cache()
    """
    torch.ops.dsconv.empty_cache()


@functools.cache
def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on a device; the package is imported when it is first needed."""
    if _loader.forced not in (None, "triton"):
        return f"DSCONV_BACKEND={_loader.forced} leaves it out"
    if device.type not in ("cuda", "xpu") and _loader.forced is None:
        return f"Triton has no target for {device.type}"
    try:
        from . import triton_ops
    except ImportError as error:
        return f"the triton package cannot be imported: {error}"
    return triton_ops.obstacle(device)


def _triton_serves(op: str, device: torch.device) -> bool:
    """Whether Triton computes a call; if nothing that is allowed to does, an error."""
    reason = _triton_obstacle(device)
    allowed = _loader.forced
    if allowed == "triton" and reason is not None:
        raise RuntimeError(f"dsconv::{op}: DSCONV_BACKEND=triton, but {reason}")
    if allowed in ("cuda", "cpu"):
        raise RuntimeError(f"dsconv::{op}: DSCONV_BACKEND={allowed}, but {_compiled_obstacle(device)}")
    return reason is None


def _compiled_obstacle(device: torch.device) -> str:
    return _loader.error or f"the library has no {device.type} kernel for it"


def _record(op: str, device: torch.device, chosen: str, **reasons: str | None) -> None:
    """Keep what is about to run, and why not what comes before it, if an explanation is being recorded."""
    if _record_of_calls is None:
        return
    passed_over = {"compiled_kernels": _compiled_obstacle(device), **reasons}
    candidates = [Candidate(name, reason=reason) for name, reason in passed_over.items() if reason]
    direction = "bwd" if op.endswith("_backward") else "fwd"
    _record_of_calls.append(Call(op, direction, f"on {device}", chosen, (Candidate(chosen), *candidates)))


def _fall_back(op: str, device: torch.device) -> None:
    """Record that the composition runs, and warn the first time."""
    _record(op, device, "composition", triton=_triton_obstacle(device))
    if (op, device.type) not in _warned:
        _warned.add((op, device.type))
        reasons = dict.fromkeys((_compiled_obstacle(device), _triton_obstacle(device)))
        warnings.warn(
            f"dsconv::{op} on {device.type} runs as a composition of PyTorch operators: {'; '.join(map(str, reasons))}",
            stacklevel=3,
        )


def _stage(op: str, device: torch.device) -> Any:
    """What computes the depthwise convolutions of a call, with `depthwise` and `gradients`: Triton or PyTorch."""
    if not _triton_serves(op, device):
        _fall_back(op, device)
        return _TORCH
    from . import triton_ops

    _record(op, device, f"triton_{op}")
    return triton_ops


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Apply a 1x1 convolution, and add the residual."""
    nd = x.dim() - 2
    y = torch.convolution(x, weight, bias, [1] * nd, [0] * nd, [1] * nd, False, [0] * nd, 1)
    return y if residual is None else y + residual


def _pad(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Pad explicitly by what is not symmetric; return the symmetric rest for the convolution."""
    common = [min(lo, hi) for lo, hi in zip(padding[::2], padding[1::2], strict=True)]
    extra = [p - common[i // 2] for i, p in enumerate(padding)]
    # F.pad counts from the last dimension.
    order = [extra[2 * i + side] for i in reversed(range(len(common))) for side in (0, 1)]
    return (F.pad(x, order) if any(extra) else x), common


def _like_weight(grad: Tensor, weight: Tensor) -> Tensor:
    like = torch.empty_like(weight)
    return grad if grad.stride() == like.stride() else like.copy_(grad)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any) -> Tensor:
    padded, common = _pad(x, padding)
    return torch.convolution(padded, weight, bias, stride, common, dilation, False, [0] * len(common), x.size(1))


def _convolve_and_activate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    activation: str,
    activation_param: float,
) -> Tensor:
    y = _convolve(x, weight, bias, stride, padding, dilation)
    return like_output(activations.forward(y, activation, activation_param), x)


def _convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, need: list[bool]
) -> list[Tensor | None]:
    """Gradients for x, weight and bias as `need` asks for them."""
    if not any(need):
        return [None] * 3
    padded, common = _pad(x, padding)
    grads = torch.ops.aten.convolution_backward(
        grad, padded, weight, [weight.size(0)], stride, common, dilation, False, [0] * len(common), x.size(1), need
    )
    grad_x, grad_weight, grad_bias = (g if n else None for g, n in zip(grads, need, strict=True))
    if grad_x is not None:
        for i, size in enumerate(x.shape[2:]):
            grad_x = grad_x.narrow(i + 2, padding[2 * i] - common[i], size)
        grad_x = like_output(grad_x, x)
    return [grad_x, None if grad_weight is None else _like_weight(grad_weight, weight), grad_bias]


_TORCH = SimpleNamespace(depthwise=_convolve_and_activate, gradients=_convolve_backward)


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    activation: str,
    activation_param: float,
) -> Tensor:
    check_depthwise("dsconv::depthwise", x.dim() - 2, x, weight, bias, stride, padding, dilation)
    activations.parse(activation, "dsconv::depthwise: activation")
    stage = _stage("depthwise", x.device)
    return stage.depthwise(x, weight, bias, stride, padding, dilation, activation, activation_param)


def _depthwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    activation: str,
    activation_param: float,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, ...]:
    name = "dsconv::depthwise_backward"
    check_depthwise(name, x.dim() - 2, x, weight, bias, stride, padding, dilation)
    activations.parse(activation, f"{name}: activation")
    shape = [x.size(0), weight.size(0), *output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)]
    check_backward(name, x, shape, grad, output, activation, activation_param)
    stage = _stage("depthwise_backward", x.device)
    grad = activations.backward(
        grad,
        output,
        lambda: stage.depthwise(x, weight, bias, stride, padding, dilation, "none", 0.0),
        activation,
        activation_param,
    )
    need = [need_x, need_weight, need_bias and bias is not None]
    return tuple(stage.gradients(grad, x, weight, stride, padding, dilation, need))


def _separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    mid_activation: str,
    mid_param: float,
    activation: str,
    activation_param: float,
    fuse: str,
    allow_tf32: bool = False,  # PyTorch and Triton read the setting themselves
) -> Tensor:
    weights = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    check_separable("dsconv::separable", x.dim() - 2, x, *weights, residual, stride, padding, dilation)
    activations.parse(mid_activation, "dsconv::separable: mid_activation")
    activations.parse(activation, "dsconv::separable: activation")
    check_fuse("dsconv::separable: fuse", fuse)
    if _triton_serves("separable", x.device):
        from . import triton_ops

        geometry: Any = (stride, padding, dilation)
        positions = x.size(0) * math.prod(output_size(x.shape[2:], depthwise_weight.shape[2:], *geometry))
        target = triton_ops.target_of(x.device)
        tile = triton_ops.fused_tile(target, x.dtype, positions, pointwise_weight.size(0), fuse)
        activate: Any = (mid_activation, mid_param, activation, activation_param)
        if isinstance(tile, str):
            _record("separable", x.device, "triton_depthwise + torch.matmul", triton_separable_fused=tile)
            return triton_ops.unfused(x, *weights, residual, *geometry, *activate)
        _record("separable", x.device, "triton_separable_fused")
        return triton_ops.fused(x, *weights, residual, *geometry, *activate, tile)
    _fall_back("separable", x.device)
    middle = _convolve_and_activate(
        x, depthwise_weight, depthwise_bias, stride, padding, dilation, mid_activation, mid_param
    )
    y = pointwise(middle, pointwise_weight, pointwise_bias, residual)
    return like_output(activations.forward(y, activation, activation_param), x)


def _separable_backward(
    grad: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    output: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    mid_activation: str,
    mid_param: float,
    activation: str,
    activation_param: float,
    need_x: bool,
    need_depthwise_weight: bool,
    need_pointwise_weight: bool,
    need_depthwise_bias: bool,
    need_pointwise_bias: bool,
    need_residual: bool,
) -> tuple[Tensor | None, ...]:
    weights = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    name = "dsconv::separable_backward"
    check_separable(name, x.dim() - 2, x, *weights, residual, stride, padding, dilation)
    activations.parse(mid_activation, f"{name}: mid_activation")
    activations.parse(activation, f"{name}: activation")
    spatial = output_size(x.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation)
    shape = [x.size(0), pointwise_weight.size(0), *spatial]
    check_backward(name, x, shape, grad, output, activation, activation_param)
    stage = _stage("separable_backward", x.device)
    middle_pre = stage.depthwise(x, depthwise_weight, depthwise_bias, stride, padding, dilation, "none", 0.0)
    middle = activations.forward(middle_pre, mid_activation, mid_param)
    grad = activations.backward(
        grad,
        output,
        lambda: pointwise(middle, pointwise_weight, pointwise_bias, residual),
        activation,
        activation_param,
    )
    # The pointwise is no depthwise convolution: one group.
    nd = x.dim() - 2
    need_middle = need_x or need_depthwise_weight or need_depthwise_bias
    need = [need_middle, need_pointwise_weight, need_pointwise_bias and pointwise_bias is not None]
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if any(need):
        ones, zeros = [1] * nd, [0] * nd
        grads = torch.ops.aten.convolution_backward(
            grad, middle, pointwise_weight, [grad.size(1)], ones, zeros, ones, False, zeros, 1, need
        )
    grad_middle, grad_pointwise, grad_pointwise_bias = (g if n else None for g, n in zip(grads, need, strict=True))
    grad_depthwise: list[Tensor | None] = [None] * 3
    if grad_middle is not None:
        grad_middle = activations.backward_between(grad_middle, middle, middle_pre, mid_activation, mid_param)
        need = [need_x, need_depthwise_weight, need_depthwise_bias and depthwise_bias is not None]
        grad_depthwise = stage.gradients(grad_middle, x, depthwise_weight, stride, padding, dilation, need)
    grad_x, grad_depthwise_weight, grad_depthwise_bias = grad_depthwise
    return (
        grad_x,
        grad_depthwise_weight,
        None if grad_pointwise is None else _like_weight(grad_pointwise, pointwise_weight),
        grad_depthwise_bias,
        grad_pointwise_bias,
        like_output(grad.clone(), x) if need_residual else None,
    )


def _pack(weight: Tensor, *_: Any) -> Tensor:
    """Say that there is no packed form."""
    return weight.new_empty(0, dtype=torch.uint8)


def _refusal(op: str) -> Callable[..., Any]:
    def refuse(x: Tensor, *_: Any) -> Any:
        raise RuntimeError(
            f"dsconv::{op}: x: got a tensor on {x.device}, expected {_loader.forced} as DSCONV_BACKEND asks for"
        )

    return refuse


def register(library: torch.library.Library) -> None:
    """Register what is below every compiled kernel; without the library, also what it would say of itself."""
    computing = {
        "depthwise": _depthwise,
        "depthwise_backward": _depthwise_backward,
        "separable": _separable,
        "separable_backward": _separable_backward,
    }
    fallbacks = {
        "depthwise_torch": _depthwise,
        "separable_torch": _separable,
        "pointwise_torch": matmul.pointwise,
        "pack": _pack,
        "pack_pointwise": _pack,
    }
    for name, kernel in {**computing, **fallbacks}.items():
        library.impl(name, kernel, "CompositeExplicitAutograd")
    if _loader.forced in ("cuda", "cpu"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that a kernel is overridden
            for name in computing:
                library.impl(name, _refusal(name), {"cuda": "CPU", "cpu": "CUDA"}[_loader.forced])
            if _loader.forced == "cuda":
                for name in ("pack", "pack_pointwise"):
                    library.impl(name, _pack, "CPU")
    if _loader.error is not None:
        information = {"version": __version__, "cuda_compiled": False, "cuda_archs": [], "error": _loader.error}
        for name, answer in {
            "kernels": "[]",
            "build_info": json.dumps(information),
            "explain_begin": None,
            "explain_end": "[]",
            "empty_cache": None,
        }.items():
            library.impl(name, lambda answer=answer: answer, "CompositeExplicitAutograd")
        library.impl("set_choices", lambda rows: None, "CompositeExplicitAutograd")
