"""What the instructions that nvcc emits do, by NVIDIA's PTX ISA, for the blocks of threads of ``ptx.py``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ptx import Block

WARP = 32
ROW = 16  # bytes of a row that ldmatrix loads
TF32 = np.uint32(0xFFFFE000)  # the bits of a float that a tf32 has
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
DTYPES = {f"{kind}{8 * size}": dtype for kind in "bu" for size, dtype in UNSIGNED.items()}
DTYPES |= {f"s{8 * size}": np.dtype(f"i{size}") for size in UNSIGNED}
DTYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)} | {"pred": np.dtype("?")}


class PtxError(Exception):
    """The PTX does what it must not, or what the reader does not know."""


# The fragments of matrices, as the sections "Matrix Fragments for mma.m16n8k8" and "for mma.m16n8k16" of the PTX ISA
# say: row and column of element i of a lane, where g is groupID = laneid >> 2 and t threadID_in_group = laneid % 4.
Place = Callable[[int, int, int], int]


@dataclass(frozen=True)
class Fragment:
    """Where the elements of a matrix are in the registers of a warp, the low half of a register first."""

    shape: tuple[int, int]
    row: Place
    column: Place

    @functools.cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the columns of every lane's elements: two arrays (lane, element)."""
        rows, columns = self.shape
        lanes, elements = range(WARP), range(rows * columns // WARP)
        return tuple(
            np.array([[place(i, lane >> 2, lane % 4) for i in elements] for lane in lanes])
            for place in (self.row, self.column)
        )


ACCUMULATOR = Fragment((16, 8), lambda i, g, t: g if i < 2 else g + 8, lambda i, g, t: t * 2 + (i & 1))
# Of a shape and the bits of an element: a, b.
OPERANDS = {
    ("m16n8k16", 16): (
        Fragment(
            (16, 16),
            lambda i, g, t: g if 0 <= i < 2 or 4 <= i < 6 else g + 8,
            lambda i, g, t: t * 2 + (i & 1) if i < 4 else t * 2 + (i & 1) + 8,
        ),
        Fragment((16, 8), lambda i, g, t: t * 2 + (i & 1) if i < 2 else t * 2 + (i & 1) + 8, lambda i, g, t: g),
    ),
    ("m16n8k8", 16): (
        Fragment((16, 8), lambda i, g, t: g if i < 2 else g + 8, lambda i, g, t: t * 2 + (i & 1)),
        Fragment((8, 8), lambda i, g, t: t * 2 + i, lambda i, g, t: g),
    ),
    ("m16n8k8", 32): (
        Fragment((16, 8), lambda i, g, t: g if i in (0, 2) else g + 8, lambda i, g, t: t if i < 2 else t + 4),
        Fragment((8, 8), lambda i, g, t: t if i == 0 else t + 4, lambda i, g, t: g),
    ),
}


# The instructions: name of one with all its modifiers -> what it does with (block, mask of threads, operands).
PATTERNS: list[tuple[re.Pattern, Callable, bool]] = []


def instruction(pattern: str, collective: bool = False) -> Callable:
    """The function runs instructions whose whole name matches. A collective one waits for all lanes of its warp."""

    def register(run: Callable) -> Callable:
        PATTERNS.append((re.compile(pattern), run, collective))
        return run

    return register


@functools.cache
def meaning(name: str) -> tuple[Callable, bool]:
    for pattern, run, collective in PATTERNS:
        if match := pattern.fullmatch(name):
            return functools.partial(run, **match.groupdict()), collective
    raise PtxError(f"unknown instruction: {name}")


INTEGER = r"\.(?P<kind>[su](?:16|32|64))"
BITS = r"\.(?P<kind>b(?:16|32|64)|pred)"


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero."""
    if a.dtype.kind == "u":
        return a // b
    return a // b + ((a % b != 0) & ((a < 0) != (b < 0)))


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float, rounded once: in double the product is exact, and the sum is rounded to odd."""
    product, addend = a.astype(float) * b, c.astype(float)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = np.asarray(total).view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits % 2 == 0)
    odd = bits + np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, odd, bits).view(float).astype(np.float32)


ELEMENTWISE: dict[str, Callable[..., np.ndarray]] = {
    rf"add{INTEGER}|add(?:\.rn)?\.(?P<kind2>f32)": lambda a, b: a + b,
    rf"sub{INTEGER}|sub(?:\.rn)?\.(?P<kind2>f32)": lambda a, b: a - b,
    rf"mul\.lo{INTEGER}|mul(?:\.rn)?\.(?P<kind2>f32)": lambda a, b: a * b,
    rf"mad\.lo{INTEGER}": lambda a, b, c: a * b + c,
    r"fma\.rn\.(?P<kind>f32)": fused,
    rf"div{INTEGER}": quotient,
    rf"rem{INTEGER}": lambda a, b: a - quotient(a, b) * b,
    rf"min{INTEGER}": np.minimum,
    rf"max{INTEGER}": np.maximum,
    rf"neg{INTEGER}|neg\.(?P<kind2>f32)": lambda a: -a,
    rf"and{BITS}": lambda a, b: a & b,
    rf"or{BITS}": lambda a, b: a | b,
    rf"xor{BITS}": lambda a, b: a ^ b,
    rf"not{BITS}": lambda a: ~a,
}


def add_elementwise(pattern: str, function: Callable[..., np.ndarray]) -> None:
    @instruction(pattern)
    def run(block, mask, to, *operands, kind, kind2=None):
        values = [block.read(operand, kind or kind2) for operand in operands]
        block.write(to, mask, np.asarray(function(*values)).astype(DTYPES[kind or kind2]))


for _pattern, _function in ELEMENTWISE.items():
    add_elementwise(_pattern, _function)


@instruction(r"(?P<operation>mul|mad)\.wide\.(?P<sign>[su])(?P<bits>16|32)")
def multiply_wide(block, mask, to, a, b, c=None, *, operation, sign, bits):
    narrow, wide = f"{sign}{bits}", f"{sign}{2 * int(bits)}"
    product = block.read(a, narrow).astype(DTYPES[wide]) * block.read(b, narrow).astype(DTYPES[wide])
    block.write(to, mask, np.asarray(product if operation == "mul" else product + block.read(c, wide)))


@instruction(r"(?P<direction>shl|shr)\.(?P<kind>[bsu](?:16|32|64))")
def shift(block, mask, to, value, by, *, direction, kind):
    value, by = block.read(value, kind), block.read(by, "u32")
    last = np.uint32(8 * value.dtype.itemsize - 1)  # a shift by more leaves what one more bit does
    once = np.minimum(by, last).astype(value.dtype)
    more = (by > last).astype(value.dtype)
    shifted = value << once << more if direction == "shl" else value >> once >> more
    block.write(to, mask, np.asarray(shifted).astype(value.dtype))


def shifted_left(value: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Of uint64, by up to 64."""
    half = by >> np.uint64(1)
    return value << half << (by - half)


@instruction(r"bfi\.(?P<kind>b32|b64)")
def insert_bits(block, mask, to, value, around, position, length, *, kind):
    value, around = block.read(value, kind), block.read(around, kind)
    dtype, one = value.dtype, np.uint64(1)
    position, length = (
        np.minimum(block.read(n, "u32").astype(np.uint64) & np.uint64(0xFF), np.uint64(8 * dtype.itemsize))
        for n in (position, length)
    )
    field = shifted_left(shifted_left(np.ones_like(length), length) - one, position)
    inserted = (shifted_left(value.astype(np.uint64), position) & field) | (around.astype(np.uint64) & ~field)
    block.write(to, mask, np.asarray(inserted).astype(dtype))


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal}


@instruction(r"setp\.(?P<how>eq|ne|lt|le|gt|ge)(?P<unordered>u?)\.(?P<kind>[bsu](?:16|32|64)|f32)")
def compare(block, mask, to, a, b, *, how, unordered, kind):
    a, b = block.read(a, kind), block.read(b, kind)
    nan = (a != a) | (b != b)
    result = COMPARISONS[how](a, b)
    block.write(to, mask, np.asarray(result | nan if unordered else result & ~nan))


@instruction(r"mov\.(?P<kind>[busf](?:16|32|64)|pred)")
def move(block, mask, to, value, *, kind):
    """Registers in braces are parts of a whole, the lowest first."""
    if isinstance(value, list):
        whole, bits = UNSIGNED[DTYPES[kind].itemsize], 8 * DTYPES[kind].itemsize // len(value)
        parts = [block.read(part, f"b{bits}").astype(whole) << whole.type(i * bits) for i, part in enumerate(value)]
        value = functools.reduce(np.bitwise_or, parts)
    else:
        value = block.read(value, kind)
    if isinstance(to, list):
        part = UNSIGNED[value.dtype.itemsize // len(to)]
        for i, register in enumerate(to):
            block.write(register, mask, (value >> value.dtype.type(8 * part.itemsize * i)).astype(part))
    else:
        block.write(to, mask, value)


@instruction(r"selp\.(?P<kind>[busf](?:16|32|64))")
def select(block, mask, to, a, b, condition, *, kind):
    block.write(to, mask, np.where(block.read(condition, "pred"), block.read(a, kind), block.read(b, kind)))


@instruction(r"cvt\.(?P<to_kind>[su](?:8|16|32|64))\.(?P<kind>[su](?:8|16|32|64))")
def convert_integer(block, mask, to, value, *, to_kind, kind):
    block.write(to, mask, block.read(value, kind).astype(DTYPES[to_kind]))


@instruction(r"cvt\.f32\.f16")
def widen(block, mask, to, value):
    block.write(to, mask, block.read(value, "f16").astype(np.float32))


def narrowed(value: np.ndarray, kind: str) -> np.ndarray:
    """The bits of the nearest f16 or bf16, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


@instruction(r"cvt\.rn\.(?P<kind>f16|bf16)\.f32")
def narrow(block, mask, to, value, *, kind):
    block.write(to, mask, narrowed(block.read(value, "f32"), kind))


@instruction(r"cvt\.rn\.(?P<kind>f16|bf16)x2\.f32")
def narrow_pair(block, mask, to, high, low, *, kind):
    low, high = (narrowed(block.read(value, "f32"), kind).astype(np.uint32) for value in (low, high))
    block.write(to, mask, np.asarray(high << np.uint32(16) | low))


@instruction(r"cvt\.rna\.tf32\.f32")
def convert_tf32(block, mask, to, value):
    """To the nearest, ties away from zero; the magnitude's bits are those of an integer."""
    value = block.read(value, "f32")
    rounded = (value.view(np.uint32) + np.uint32(1 << 12)) & TF32
    finite = np.where(np.isfinite(value), rounded, value.view(np.uint32))
    block.write(to, mask, np.where(np.isnan(value), np.uint32(0x7FFFFFFF), finite))


@instruction(r"cvta(?P<direction>\.to)?\.(?P<space>global|shared|local)\.u64")
def convert_address(block, mask, to, address, *, direction, space):
    window, address = block.window[space], block.read(address, "u64")
    block.write(to, mask, np.asarray(address - window if direction else address + window))


@instruction(r"ld\.param(?:\.v(?P<count>[24]))?\.(?P<kind>[busf]\d+)")
def load_parameter(block, mask, to, address, *, count, kind):
    dtype, n = DTYPES[kind], int(count or 1)
    at = block.addresses(address, "param", mask).astype(np.int64)[:, None] + np.arange(n * dtype.itemsize)
    if (at >= len(block.parameters)).any():
        raise PtxError("access outside the parameters")
    block.write_some(to if count else [to], mask, block.parameters[at].view(dtype))


ACCESS = r"(?:\.(?P<space>global|shared|local))?{}(?:\.v(?P<count>[24]))?\.(?P<kind>[busf]\d+)"


@instruction("ld" + ACCESS.format(r"(?:\.nc)?"))
def load(block, mask, to, address, *, space, count, kind):
    size, n = DTYPES[kind].itemsize, int(count or 1)
    at = block.machine.bytes_at(block.addresses(address, space, mask), n * size, n * size)
    values = block.machine.memory[at].view(DTYPES[kind])
    block.write_some(to if count else [to], mask, values)


@instruction("st" + ACCESS.format(""))
def store(block, mask, address, value, *, space, count, kind):
    size, n = DTYPES[kind].itemsize, int(count or 1)
    at = block.machine.bytes_at(block.addresses(address, space, mask), n * size, n * size)
    values = [block.read(one, kind) for one in (value if count else [value])]
    data = np.stack([np.broadcast_to(one, block.threads)[mask] for one in values], axis=1)
    block.machine.memory[at] = data.view(np.uint8)


@instruction(r"bra(?:\.uni)?")
def branch(block, mask, label):
    block.at[mask] = block.kernel.labels[label]


@instruction(r"ret|exit")
def leave(block, mask):
    block.at[mask] = len(block.kernel.instructions)


@instruction(r"trap")
def trap(block, mask):
    raise PtxError("trap")


@instruction(r"bar\.sync")
def barrier(block, mask, which):
    if which != 0:
        raise PtxError(f"barrier {which}")
    block.at_barrier |= mask


def check_whole_warp(block: Block, mask: np.ndarray, members: str | int) -> None:
    if (np.broadcast_to(block.read(members, "u32"), block.threads)[mask] != 0xFFFFFFFF).any():
        raise PtxError("only a part of a warp")


@instruction(r"bar\.warp\.sync", collective=True)
def warp_barrier(block, mask, members):
    check_whole_warp(block, mask, members)


@instruction(r"vote\.sync\.(?P<how>all|any)\.pred", collective=True)
def vote(block, mask, to, value, members, *, how):
    check_whole_warp(block, mask, members)
    votes = np.broadcast_to(block.read(value, "pred"), block.threads).reshape(-1, WARP)
    block.write(to, mask, np.repeat(votes.all(axis=1) if how == "all" else votes.any(axis=1), WARP))


@instruction(r"cp\.async\.(?P<cache>ca|cg)\.shared(?:::cta)?\.global")
def copy_async(block, mask, to, source, size, count=None, *, cache):
    """The data comes at the wait and not before; until then nothing there can be relied on."""
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise PtxError(f"copies {size} bytes")
    to, source = block.addresses(to, "shared", mask), block.addresses(source, "global", mask)
    count = np.broadcast_to(block.read(size if count is None else count, "u32"), block.threads)[mask]
    if (count > size).any():
        raise PtxError(f"copies {count.max()} of {size} bytes")
    block.machine.memory[block.machine.bytes_at(to, size, size)] = 0xFF
    block.copies.append((np.flatnonzero(mask), to, source, size, count, block.groups[mask]))


@instruction(r"cp\.async\.commit_group")
def commit(block, mask):
    block.groups[mask] += 1


@instruction(r"cp\.async\.wait_group")
def wait_for_groups(block, mask, pending):
    block.arrive(mask, block.groups - pending)


@instruction(r"cp\.async\.wait_all")
def wait_for_all(block, mask):
    block.arrive(mask, block.groups + 1)


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<transposed>\.trans)?\.shared\.b16", collective=True)
def load_matrices(block, mask, to, address, *, count, transposed):
    """Row r of matrix m is at the address of lane 8 m + r. Before sm_80 the other lanes' must be valid too."""
    at = block.machine.bytes_at(block.addresses(address, "shared", mask), ROW, ROW)
    matrices = block.machine.memory[at].view(np.uint16).reshape(-1, 4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    # Lane T of a warp gets elements 2 (T % 4) and the next one of row T / 4: in the order of memory.
    values = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4, WARP).swapaxes(1, 2)
    block.write_some(to, mask, values[:, :, : int(count)].reshape(-1, int(count)))


def elements(block: Block, mask: np.ndarray, registers: Iterable[str], kind: str) -> np.ndarray:
    """What registers of whole warps hold: (warp, lane, element)."""
    bits = np.stack([block.read(register, "b32")[mask] for register in registers], axis=1)
    if kind == "tf32":
        values = (bits & TF32).view(np.float32)
    else:
        halves = bits.view(np.uint16)
        values = halves.view(np.float16) if kind == "f16" else (halves.astype(np.uint32) << 16).view(np.float32)
    return values.astype(float).reshape(-1, WARP, values.shape[1])


@instruction(
    r"mma\.sync\.aligned\.(?P<shape>m16n8k16|m16n8k8)\.row\.col\.f32\.(?P<kind>f16|bf16|tf32)\.(?P=kind)\.f32",
    collective=True,
)
def multiply_matrices(block, mask, d, a, b, c, *, shape, kind):
    """d = a b + c. The ISA leaves the order and the rounding of the sums open: here they are rounded once."""
    fragments = OPERANDS.get((shape, 32 if kind == "tf32" else 16))
    if fragments is None:
        raise PtxError(f"no {shape} of {kind}")
    product: np.ndarray | None = None
    for fragment, registers in zip(fragments, (a, b), strict=True):
        values = elements(block, mask, registers, kind)
        matrix = np.full((len(values), *fragment.shape), np.nan)
        matrix[(slice(None), *fragment.places)] = values
        product = matrix if product is None else product @ matrix
    sums = np.stack([block.read(register, "f32")[mask] for register in c], axis=1).reshape(-1, WARP, len(c))
    result = (product[(slice(None), *ACCUMULATOR.places)] + sums).astype(np.float32)
    block.write_some(d, mask, result.reshape(-1, len(d)))
