"""The operators in the dispatcher: schemas where there is no library, fake, autocast and vmap; no arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _loader, backends
from .checks import check_depthwise, check_separable
from .geometry import convolution_output, empty_output


def cast_inputs(device_type: str, values: Sequence[Any]) -> list[Any]:
    """Cast what autocast casts, differentiably: floating-point tensors of the device type that are not float64."""
    dtype = torch.get_autocast_dtype(device_type)
    return [
        value.to(dtype)
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dtype is not torch.float64
        and value.device.type == device_type
        else value
        for value in values
    ]


def _autocast_kernel(op: Callable[..., Tensor], device_type: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    def kernel(*args: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*cast_inputs(device_type, args))

    return kernel


def _fake_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: Any,
) -> Tensor:
    check_depthwise("dsconv::depthwise", x.dim() - 2, x, weight, bias, stride, padding, dilation)
    return convolution_output(x, weight.size(0), weight, stride, padding, dilation)


def _fake_separable(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    *_: Any,
) -> Tensor:
    weights = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    check_separable("dsconv::separable", x.dim() - 2, x, *weights, residual, stride, padding, dilation)
    return convolution_output(x, pointwise_weight.size(0), depthwise_weight, stride, padding, dilation)


def _fake_backward(tensors: int, outputs: int) -> Callable[..., tuple[Tensor | None, ...]]:
    """Make the fake of a `*_backward`: (grad, x, the other inputs of the forward, output, ..., what is needed)."""

    def fake(*args: Any) -> tuple[Tensor | None, ...]:
        grad, x, *weights = args[: tensors - 1]
        need_x, *need = args[-outputs:]
        results = [empty_output(x, x.size(1), x.shape[2:]) if need_x else None]
        results += [torch.empty_like(w) if n and w is not None else None for n, w in zip(need, weights, strict=False)]
        if outputs == 6 and need[-1]:  # the residual, which is passed only where its values are read
            results[-1] = empty_output(x, grad.size(1), grad.shape[2:])
        return tuple(results)

    return fake


def _fake_pack(weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


class _Batching(NamedTuple):
    """Where the arguments of an operator are."""

    tensors: int  # the leading arguments that are tensors or None
    weights: range  # those of them without a batch dimension
    need_weights: slice  # the arguments that ask for gradients of those


def _vmap_rule(name: str, op: Callable[..., Any], batching: _Batching) -> Callable[..., Any]:
    """Fold the vmapped dimension into N where the weights are shared, else into the channels, else loop."""
    forward = not name.endswith("_backward")

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        tensors, rest = args[: batching.tensors], args[batching.tensors :]
        size = info.batch_size
        if all(in_dims[i] is None for i in batching.weights) and not any(args[batching.need_weights]):
            folded = [
                t if i in batching.weights or t is None else _to_front(t, in_dims[i], size).flatten(0, 1)
                for i, t in enumerate(tensors)
            ]
            return _unfold(op(*folded, *rest), lambda _: 0, size)
        stacked = [None if t is None else _to_front(t, in_dims[i], size) for i, t in enumerate(tensors)]
        if name.startswith("depthwise"):
            folded = [
                t if t is None else t.flatten(0, 1) if i in batching.weights else t.movedim(0, 1).flatten(1, 2)
                for i, t in enumerate(stacked)
            ]
            return _unfold(op(*folded, *rest), lambda index: int(index == 0), size)
        results = [op(*[None if t is None else t[i] for t in stacked], *rest) for i in range(size)]
        if forward:
            return torch.stack(results), 0
        columns = tuple(None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True))
        return columns, tuple(None if column is None else 0 for column in columns)

    return rule


def _to_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _unfold(results: Any, dim_of: Callable[[int], int], size: int) -> tuple[Any, Any]:
    """Take the vmapped dimension out of dimension `dim_of(index)` of each result."""
    single = isinstance(results, Tensor)
    results = (results,) if single else results
    dims = tuple(None if r is None else dim_of(i) for i, r in enumerate(results))
    parts = tuple(
        r if d is None else r.unflatten(d, (size, r.size(d) // size)) for r, d in zip(results, dims, strict=True)
    )
    return (parts[0], dims[0]) if single else (parts, dims)


def _define(library: torch.library.Library) -> None:
    text = Path(__file__).with_name("schemas.inc").read_text(encoding="utf-8")
    for schema in re.findall(r'^DSCONV_OP\("(.*)"\)', text, re.MULTILINE):
        library.define(schema)


def _register() -> torch.library.Library:
    library = torch.library.Library("dsconv", "IMPL" if _loader.error is None else "DEF")
    if _loader.error is not None:
        _define(library)
    backends.register(library)
    fakes: dict[str, Callable[..., Any]] = {
        "depthwise": _fake_depthwise,
        "depthwise_backward": _fake_backward(5, 3),
        "separable": _fake_separable,
        "separable_backward": _fake_backward(8, 6),
        "pack": _fake_pack,
        "pack_pointwise": _fake_pack,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"dsconv::{name}", fake, lib=library)
    nothing = slice(0, 0)
    batchings = {
        "depthwise": _Batching(3, range(1, 3), nothing),
        "depthwise_backward": _Batching(5, range(2, 4), slice(-2, None)),
        "separable": _Batching(6, range(1, 5), nothing),
        "separable_backward": _Batching(8, range(2, 6), slice(-5, -1)),
    }
    for name, batching in batchings.items():
        op = getattr(torch.ops.dsconv, name).default
        torch.library.register_vmap(f"dsconv::{name}", _vmap_rule(name, op, batching), lib=library)
        if not name.endswith("_backward"):
            for device_type in ("cpu", "cuda"):
                key = f"Autocast{device_type.upper()}"
                kernel = _autocast_kernel(op, device_type, getattr(torch._C.DispatchKey, key))
                library.impl(name, kernel, key)
    return library


library = _register()  # registrations live as long as this object
