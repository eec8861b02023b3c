"""Operators of the Triton kernels, and the tiles they run with.

Nothing is autotuned and nothing is added atomically: tiles follow from the problem, so results are the same bit for bit
from run to run. The callers have checked the tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .geometry import convolution_output, empty_output, is_channels_last
from .matmul import pointwise
from .triton_kernels import INTERPRETED, depthwise_kernel, separable_kernel, weight_gradient_kernel

INT32_LIMIT = 2**31


class Tile(NamedTuple):
    """The block of a program."""

    positions: int
    channels: int
    warps: int
    outputs: int = 0  # of the pointwise convolution, where it is part of the kernel
    registers: int = 0  # a thread may take, where that is limited


# The tiles, preferred ones first; keys are the AXIS of the positions: 1 where channels are contiguous, else 0.
DEPTHWISE_TILES = {
    1: (Tile(16, 64, 4), Tile(32, 32, 4), Tile(64, 16, 4), Tile(128, 8, 4)),
    0: (Tile(256, 4, 4), Tile(128, 8, 4), Tile(512, 2, 4), Tile(1024, 1, 4)),
}
WEIGHT_GRADIENT_TILES = {
    1: (Tile(8, 64, 4), Tile(16, 32, 4), Tile(32, 16, 4), Tile(64, 8, 4)),
    0: (Tile(128, 4, 4), Tile(256, 2, 4), Tile(512, 1, 4)),
}
COLUMN_BLOCKS = (4, 8, 2, 1)
# One program has all outputs of its positions, so no depthwise value is computed twice, and the sums of the taps are
# carried by a loop, so no warp repeats them either: the tests count the multiplications of every tile in the PTX.
# Left alone, ptxas spills what is used outside the loop, to fit one more program: the limits are those of the hardware.
FUSED_TILES = (
    Tile(64, 32, 8, 16, 255),
    Tile(64, 32, 8, 64, 255),
    Tile(64, 32, 8, 128, 255),
    Tile(64, 32, 16, 256, 128),
)
WASTE = 4 / 3  # work on padding that a preferred tile may cost
PROGRAMS = 1024  # that a weight gradient is split into: a few waves on any GPU
SLAB = 256  # positions at least that share partial sums, which cost little then


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded(tile: Tile, positions: int, channels: int) -> int:
    return _cdiv(positions, tile.positions) * tile.positions * _cdiv(channels, tile.channels) * tile.channels


def _tile(tiles: Sequence[Tile], positions: int, channels: int) -> Tile:
    """Take the first tile of those that waste little on padding."""
    least = min(_padded(tile, positions, channels) for tile in tiles)
    return next(tile for tile in tiles if _padded(tile, positions, channels) <= WASTE * least)


class Target(NamedTuple):
    """What a device is to the choice of a fused tile."""

    name: str
    tensor_cores: bool  # that tl.dot uses
    nvidia: bool  # whose tensor cores take float32 as TF32, and whose compiler takes a limit of registers
    shared_bytes: int
    multiprocessors: int


@functools.cache
def target_of(device: torch.device) -> Target:
    """Describe a device, or the interpreter, which has room for everything."""
    if INTERPRETED:
        return Target("interpreter", True, True, 2**30, 1)
    if device.type != "cuda":
        return Target(device.type, False, False, 0, 1)
    properties = torch.cuda.get_device_properties(device)
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    count = properties.multi_processor_count
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return Target(name, name.startswith(("gfx9", "gfx11", "gfx12")), False, shared, count)
    modern = properties.major >= 8
    return Target(f"sm_{properties.major}{properties.minor}", modern, True, shared, count)


def obstacle(device: torch.device) -> str | None:
    """Say why no Triton kernel can run on a device."""
    if INTERPRETED:
        return None
    if device.type == "cpu":
        return "Triton has no target for cpu; under TRITON_INTERPRET=1 its kernels are interpreted"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # whatever a driver raises
        return f"Triton has no driver here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 5):
        return f"Triton needs compute capability 7.5, {device} has {torch.cuda.get_device_capability(device)}"
    return None


def shared_bytes(tile: Tile, itemsize: int) -> int:
    """Estimate what a fused tile needs: the operands of the product, or its result on the way to another layout."""
    operands = (tile.positions + tile.outputs) * tile.channels
    return max(operands, tile.positions * tile.outputs) * itemsize


def registers(tile: Tile) -> int:
    """Estimate what a thread of a fused tile needs: its sums, four values per depthwise value, and 64 for the rest."""
    return tile.positions * (tile.outputs + 4 * tile.channels) // (32 * tile.warps) + 64


def fused_tile(target: Target, dtype: torch.dtype, positions: int, outputs: int, fuse: str) -> Tile | str:
    """Choose the tile that computes a separable convolution in one pass, or say why none does."""
    if fuse == "never":
        return "fuse='never'"
    if dtype is torch.float64:
        return "float64 has no fused kernel"
    if not target.tensor_cores:
        return f"tl.dot uses no tensor cores on {target.name}"
    if dtype is torch.float32 and (not target.nvidia or torch.get_float32_matmul_precision() == "highest"):
        return "float32 is fused in TF32 only, where the device has it and torch.set_float32_matmul_precision allows it"
    enough = [tile for tile in FUSED_TILES if tile.outputs >= outputs]
    if not enough:
        return f"{outputs} outputs do not fit one program: {FUSED_TILES[-1].outputs} at most"
    tile = enough[0]
    if shared_bytes(tile, dtype.itemsize) > target.shared_bytes or registers(tile) > tile.registers:
        return f"the tile of {tile.outputs} outputs needs more than {target.name} has"
    if fuse == "auto" and _cdiv(positions, tile.positions) < target.multiprocessors:
        return (
            f"{_cdiv(positions, tile.positions)} programs would leave some of {target.multiprocessors} processors idle"
        )
    return tile if target.nvidia else tile._replace(registers=0)


def _triple(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (fill,) * (3 - len(values)) + tuple(values)


def _size(t: Tensor) -> tuple[int, ...]:
    return _triple(t.shape[2:], 1)


def _stride(t: Tensor) -> tuple[int, ...]:
    return (*t.stride()[:2], *_triple(t.stride()[2:], 0))


def _weight_stride(weight: Tensor) -> tuple[int, ...]:
    return (weight.stride(0), *_stride(weight)[2:])


def _window(
    channels: int, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[str, object]:
    return {
        "TAPS": _size(weight),
        "STRIDE": _triple(stride, 1),
        "PADDING": _triple(padding[::2], 0),
        "DILATION": _triple(dilation, 1),
        "MULTIPLIER": weight.size(0) // channels,
    }


def _is_large(*tensors: Tensor | None) -> bool:
    """Whether offsets, or positions with the padding of a block, exceed 32 bits."""
    spans = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors if t is not None]
    return max(spans) >= INT32_LIMIT - 2**16


def _sums(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _launch_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    window: dict[str, object],
    steps: Sequence[int],
    activation: str,
    activation_param: float,
    transposed: bool,
) -> None:
    """Run the kernel over the positions of y, whose phases lie `steps` apart."""
    axis = int(is_channels_last(y))
    phase = [_cdiv(n, step) for n, step in zip(_size(y), steps, strict=True)]
    positions = y.size(0) * math.prod(phase)
    tile = _tile(DEPTHWISE_TILES[axis], positions, y.size(1))
    programs = _cdiv(y.size(1), tile.channels) * math.prod(steps) * _cdiv(positions, tile.positions)
    wrap_triton(depthwise_kernel)[(programs,)](
        x,
        weight,
        bias,
        y,
        *y.shape[:2],
        *_size(y),
        *_size(x),
        *_stride(y),
        *_stride(x),
        *_weight_stride(weight),
        0 if bias is None else bias.stride(0),
        **window,
        TRANSPOSED=transposed,
        ACTIVATION=activation,
        PARAMETER=activation_param,
        AXIS=axis,
        LARGE=_is_large(x, weight, y),
        POSITIONS=tile.positions,
        CHANNELS=tile.channels,
        num_warps=tile.warps,
    )


@triton_op("dsconv::depthwise_triton", mutates_args=())
def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    activation_param: float,
) -> Tensor:
    """Compute activation(depthwise convolution + bias); tensors of one device and dtype, checked by the caller."""
    y = convolution_output(x, weight.size(0), weight, stride, padding, dilation)
    if y.numel():
        window = _window(x.size(1), weight, stride, padding, dilation)
        _launch_depthwise(x, weight, bias, y, window, (1, 1, 1), activation, activation_param, False)
    return y


@triton_op("dsconv::depthwise_dgrad_triton", mutates_args=())
def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Compute the gradient of a depthwise convolution for x, of which only size and layout are read."""
    grad_x = empty_output(x, x.size(1), x.shape[2:])
    if grad_x.numel():
        window = _window(x.size(1), weight, stride, padding, dilation)
        _launch_depthwise(grad, weight, None, grad_x, window, _triple(stride, 1), "none", 0.0, True)
    return grad_x


@triton_op("dsconv::depthwise_wgrad_triton", mutates_args=())
def weight_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    need_weight: bool,
    need_bias: bool,
) -> Tensor:
    """Compute the gradients for the taps and, after them, for the bias: [columns, C*m], not yet rounded.

    Partial sums of slabs of positions are added in their order.
    """
    taps = math.prod(weight.shape[2:])
    first = 0 if need_weight else taps
    columns = taps + int(need_bias) - first
    filters, positions = weight.size(0), grad.size(0) * math.prod(grad.shape[2:])
    if positions == 0:
        return grad.new_zeros(columns, filters, dtype=_sums(grad.dtype))
    axis = int(is_channels_last(grad))
    tile = _tile(WEIGHT_GRADIENT_TILES[axis], positions, filters)
    # A block reads the gradient once and the input once per column.
    column_block = min(COLUMN_BLOCKS, key=lambda block: _cdiv(columns, block) * (block + 1))
    programs = _cdiv(filters, tile.channels) * _cdiv(columns, column_block)
    slab = max(SLAB, _cdiv(positions, max(1, PROGRAMS // programs)))
    slab = _cdiv(slab, tile.positions) * tile.positions
    slabs = _cdiv(positions, slab)
    partial = grad.new_empty(slabs, columns, filters, dtype=_sums(grad.dtype))
    wrap_triton(weight_gradient_kernel)[(slabs * programs,)](
        grad,
        x,
        partial,
        grad.size(0),
        filters,
        *_size(grad),
        *_size(x),
        *_stride(grad),
        *_stride(x),
        slab,
        FIRST=first,
        COLUMNS=columns,
        **_window(x.size(1), weight, stride, padding, dilation),
        AXIS=axis,
        LARGE=_is_large(grad, x, partial) or positions >= INT32_LIMIT - 2**16,
        COLUMN_BLOCK=column_block,
        POSITIONS=tile.positions,
        CHANNELS=tile.channels,
        num_warps=tile.warps,
    )
    return partial.sum(0)


@triton_op("dsconv::separable_triton", mutates_args=())
def fused(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mid_activation: str,
    mid_param: float,
    activation: str,
    activation_param: float,
    tile: Sequence[int],
) -> Tensor:
    """Compute a separable convolution in one pass, with the numbers of a `Tile`."""
    y = convolution_output(x, pointwise_weight.size(0), depthwise_weight, stride, padding, dilation)
    if not y.numel():
        return y
    positions, channels, warps, outputs, registers_of_thread = tile
    optional = [t.stride(0) if t is not None else 0 for t in (depthwise_bias, pointwise_bias)]
    wrap_triton(separable_kernel)[(_cdiv(y.size(0) * math.prod(y.shape[2:]), positions),)](
        x,
        depthwise_weight,
        depthwise_bias,
        pointwise_weight,
        pointwise_bias,
        residual,
        y,
        y.size(0),
        depthwise_weight.size(0),
        y.size(1),
        *_size(y),
        *_size(x),
        *_stride(y),
        *_stride(x),
        *((0,) * 5 if residual is None else _stride(residual)),
        *_weight_stride(depthwise_weight),
        *pointwise_weight.stride()[:2],
        *optional,
        **_window(x.size(1), depthwise_weight, stride, padding, dilation),
        MID=mid_activation,
        MID_PARAMETER=mid_param,
        ACTIVATION=activation,
        PARAMETER=activation_param,
        PRECISION="tf32" if x.dtype is torch.float32 else "ieee",
        AXIS=int(is_channels_last(y)),
        LARGE=_is_large(x, depthwise_weight, pointwise_weight, residual, y),
        POSITIONS=positions,
        CHANNELS=channels,
        OUTPUTS=outputs,
        num_warps=warps,
        num_stages=1,  # more would stage each tap of the window by itself
        **({"maxnreg": registers_of_thread} if registers_of_thread else {}),
    )
    return y


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    need: Sequence[bool],
) -> list[Tensor | None]:
    """Compute the gradients of a depthwise convolution for x, weight and bias as `need` asks for them."""
    need_x, need_weight, need_bias = need
    results: list[Tensor | None] = [None] * 3
    if need_x:
        results[0] = input_gradient(grad, x, weight, stride, padding, dilation)
    if need_weight or need_bias:
        columns = weight_gradient(grad, x, weight, stride, padding, dilation, need_weight, need_bias)
        if need_bias:
            results[2] = columns[-1].to(weight.dtype)
            columns = columns[:-1]
        if need_weight:
            results[1] = torch.empty_like(weight).copy_(columns.t().reshape(weight.shape))
    return results


def unfused(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    residual: Tensor | None,
    *settings: Any,
) -> Tensor:
    """Compute what `fused` does by the depthwise kernel and torch.matmul."""
    *of_depthwise, activation, activation_param = settings
    middle = depthwise(x, depthwise_weight, depthwise_bias, *of_depthwise)
    return pointwise(middle, pointwise_weight, pointwise_bias, residual, activation, activation_param)
