"""The primitives of csrc/cuda/mma.cuh and copy_async.cuh, each in a kernel of tests/simt/primitives.cu.

Their host bodies, with which tests/simt runs every kernel, are held against the formulas of the PTX ISA. Their device
bodies, as nvcc compiles them, are run by ``ptx.py`` and held against the host bodies.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

import native
import ptx
import ptx_isa
from conftest import ROOT
from dsconv_ext import _build
from test_simt import PLAIN, drive

KERNELS = ROOT / "tests/simt/primitives.cu"
LANES, SHARED_WORDS, COPIED = 32, 512, 12  # as primitives.h has them


def bits_of(values: np.ndarray, kind: str) -> np.ndarray:
    """The registers (lane, register) that hold the elements (lane, element)."""
    if kind == "f16":
        return np.ascontiguousarray(values.astype(np.float16)).view(np.uint32)
    words = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    if kind == "tf32":
        return words & 0xFFFFE000
    return np.ascontiguousarray((words >> 16).astype(np.uint16)).view(np.uint32) if kind == "bf16" else words


def values_of(registers: np.ndarray, kind: str) -> np.ndarray:
    """The inverse of ``bits_of``."""
    if kind == "bf16":
        return (registers.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return registers.view(np.float16 if kind == "f16" else np.float32)


class Product:
    """mma: of integers, exactly; of reals, with sums that may be rounded in any order."""

    def __init__(self, shape: str, kind: str):
        a, b = ptx_isa.OPERANDS[shape, 32 if kind == "tf32" else 16]
        self.operands = [(ptx_isa.ACCUMULATOR, "f32"), (a, kind), (b, kind)]  # as the kernels read them

    def words(self, rng: np.random.Generator, real: bool) -> np.ndarray:
        registers = []
        for fragment, kind in self.operands:
            matrix = rng.standard_normal(fragment.shape) if real else rng.integers(-15, 16, fragment.shape)
            registers.append(bits_of(matrix[fragment.places], kind))
        return np.hstack(registers).ravel()

    def check(self, words: np.ndarray, out: np.ndarray) -> None:
        matrices, rest = [], words.reshape(LANES, -1)
        for fragment, kind in self.operands:
            matrix = np.full(fragment.shape, np.nan)
            elements = fragment.places[0].shape[1]
            count = elements // 2 if kind in ("f16", "bf16") else elements
            matrix[fragment.places] = values_of(np.ascontiguousarray(rest[:, :count]), kind)
            rest = rest[:, count:]
            matrices.append(matrix)
        c, a, b = matrices
        found = np.full(c.shape, np.nan)
        found[ptx_isa.ACCUMULATOR.places] = out.view(np.float32).reshape(LANES, -1)
        exact = all((matrix % 1 == 0).all() for matrix in matrices)
        bound = 0 if exact else 2.0**-24 * (a.shape[1] + 1) * (abs(a) @ abs(b) + abs(c))
        assert (abs(found - (a @ b + c)) <= bound).all()


class Load:
    """ldmatrix: register i of lane T has two elements of matrix i, whose row r is where lane 8 i + r points."""

    def __init__(self, count: int, transposed: bool):
        self.count, self.transposed = count, transposed

    def words(self, rng: np.random.Generator, real: bool) -> np.ndarray:
        rows = 16 * rng.permutation(SHARED_WORDS // 4)[:LANES]
        return np.concatenate([rows, rng.integers(0, 1 << 32, SHARED_WORDS)]).astype(np.uint32)

    def check(self, words: np.ndarray, out: np.ndarray) -> None:
        rows, shared = words[:LANES], words[LANES:].view(np.uint16)
        found = out.view(np.uint16).reshape(LANES, self.count, 2)
        for lane, i, j in np.ndindex(found.shape):
            row, column = lane // 4, lane % 4 * 2 + j
            if self.transposed:
                row, column = column, row
            assert found[lane, i, j] == shared[rows[8 * i + row] // 2 + column], (lane, i, j)


class Rounding:
    """to_tf32: to the nearest multiple of the last place of 10 bits, ties away from zero."""

    def words(self, rng: np.random.Generator, real: bool) -> np.ndarray:
        special = [0x7F800000, 0xFF800000, 0x7FC00001, 0x7F7FFFFF, 0x3F801000, 0xBF801000, 0x3F800FFF, 0x80000001]
        return np.concatenate([special, rng.integers(0, 1 << 32, LANES - len(special))]).astype(np.uint32)

    def check(self, words: np.ndarray, out: np.ndarray) -> None:
        value = words.view(np.float32).astype(float)
        finite = np.where(np.isfinite(value), value, 0)
        place = np.exp2(np.maximum(np.frexp(finite)[1] - 11, -136))
        rounded = np.copysign(np.floor(abs(finite) / place + 0.5) * place, finite)
        with np.errstate(over="ignore"):
            expected = np.where(np.isfinite(value), rounded, value).astype(np.float32).view(np.uint32)
        assert (out == np.where(np.isnan(value), 0x7FFFFFFF, expected)).all()


class Copies:
    """Copies of 16 bytes, of which a number come and the rest are zeros, and of 4."""

    def words(self, rng: np.random.Generator, real: bool) -> np.ndarray:
        any_size, usual = rng.integers(0, 17, 2 * LANES), 8 * rng.integers(0, 3, 2 * LANES)
        sizes = np.where(rng.integers(0, 2, 2 * LANES), usual, any_size)
        return np.concatenate([sizes, rng.integers(0, 1 << 32, COPIED * LANES)]).astype(np.uint32)

    def check(self, words: np.ndarray, out: np.ndarray) -> None:
        sizes, source = words[: 2 * LANES].reshape(LANES, 2), words[2 * LANES :].view(np.uint8).reshape(LANES, -1)
        expected = np.zeros_like(source)
        for lane in range(LANES):
            for begin, size in ((0, sizes[lane, 0]), (16, sizes[lane, 1]), (32, 4)):
                expected[lane, begin : begin + size] = source[lane, begin : begin + size]
        assert (out.view(np.uint8).reshape(LANES, -1) == expected).all()


PRIMITIVES = {
    "mma_m16n8k16_f16": Product("m16n8k16", "f16"),
    "mma_m16n8k16_bf16": Product("m16n8k16", "bf16"),
    "mma_m16n8k8_tf32": Product("m16n8k8", "tf32"),
    "mma_m16n8k8_f16": Product("m16n8k8", "f16"),
    "ldmatrix_x4": Load(4, False),
    "ldmatrix_x4_trans": Load(4, True),
    "ldmatrix_x2": Load(2, False),
    "ldmatrix_x2_trans": Load(2, True),
    "to_tf32": Rounding(),
    "copies": Copies(),
}
OUT_WORDS = dict.fromkeys(PRIMITIVES, 4) | {"ldmatrix_x2": 2, "ldmatrix_x2_trans": 2, "to_tf32": 1, "copies": COPIED}
SM_80_ONLY = ("mma_m16n8k16_f16", "mma_m16n8k16_bf16", "mma_m16n8k8_tf32", "to_tf32")


def words_of(name: str, real: bool = False) -> np.ndarray:
    return PRIMITIVES[name].words(np.random.default_rng(zlib.crc32(name.encode()) + real), real)


def on_host(name: str, words: np.ndarray) -> np.ndarray:
    done = drive(PLAIN, "--primitive", name, lines=[" ".join(f"{word:x}" for word in words)])
    assert done.returncode == 0, done.stdout
    return np.array([int(word, 16) for word in done.stdout.split()], np.uint32)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_host_bodies(name):
    for real in (False, True):
        words = words_of(name, real)
        PRIMITIVES[name].check(words, on_host(name, words))


@pytest.mark.parametrize(
    ("name", "at", "word", "expected"),
    [
        ("mma_m16n8k8_tf32", 5, 0x3F800001, "multiplies a float that to_tf32 has not seen"),
        ("ldmatrix_x4", 5, 8, "thread 5 loads a matrix row from a misaligned address"),
        ("ldmatrix_x2", 20, 4 * SHARED_WORDS, "thread 20 loads a matrix row from outside shared memory"),
        ("copies", 7, 17, "thread 3 copies 17 of 16 bytes"),
    ],
)
def test_host_bodies_notice(name, at, word, expected):
    words = words_of(name)
    words[at] = word
    done = drive(PLAIN, "--primitive", name, lines=[" ".join(f"{one:x}" for one in words)])
    assert done.returncode != 0 and expected in done.stdout


def on_device(text: str, name: str, words: np.ndarray) -> np.ndarray:
    machine = ptx.Machine(text)
    out = np.full(OUT_WORDS[name] * LANES, 0xFFFFFFFF, np.uint32)
    source, to = machine.place(words), machine.place(out)
    machine.launch(name, struct.pack("QQ", source, to), threads=LANES, shared_bytes=4 * SHARED_WORDS)
    return machine.fetch(to, out)


@pytest.mark.parametrize("architecture", ["75", "80"])
def test_device_bodies(architecture):
    """The integers of mma, and all that the others do, to the bit."""
    text = native.ptx_of(KERNELS, architecture)
    for name, primitive in PRIMITIVES.items():
        if architecture == "75" and name in SM_80_ONLY:
            with pytest.raises(ptx.PtxError, match="trap"):
                on_device(text, name, words_of(name))
            continue
        for real in (False, True):
            words = words_of(name, real)
            out = on_device(text, name, words)
            primitive.check(words, out)
            assert (real and isinstance(primitive, Product)) or (out == on_host(name, words)).all()


# Of each primitive a wrong device body: the header, what stands there and what is put in its place.
MISTAKES = {
    "mma_m16n8k16_f16": ("mma", "f16.f16.f32 {%0, %1, %2, %3}, {%4, %5,", "f16.f16.f32 {%0, %1, %2, %3}, {%5, %4,"),
    "mma_m16n8k16_bf16": ("mma", "f32.bf16.bf16.f32", "f32.f16.f16.f32"),
    "mma_m16n8k8_tf32": ("mma", "tf32.f32 {%0, %1, %2, %3}, {%4, %5,", "tf32.f32 {%0, %1, %2, %3}, {%4, %4,"),
    "mma_m16n8k8_f16": ("mma", "{%4, %5}, {%6}, {%0, %1, %2, %3}", "{%4, %5}, {%6}, {%0, %1, %3, %2}"),
    "ldmatrix_x4": ("mma", "x4.shared.b16 {%0, %1,", "x4.shared.b16 {%1, %0,"),
    "ldmatrix_x4_trans": ("mma", "x4.trans.", "x4."),
    "ldmatrix_x2": ("mma", "x2.shared.b16 {%0, %1}", "x2.shared.b16 {%1, %0}"),
    "ldmatrix_x2_trans": ("mma", "x2.trans.", "x2."),
    "to_tf32": ("mma", "cvt.rna.tf32.f32", "mov.b32"),
    "copies": ("copy_async", "wait_group %0", "wait_group 1"),
}


def test_a_wrong_device_body_is_found(tmp_path):
    """Every primitive with a mistake of its own: the results differ from those of the host body."""
    (tmp_path / "cuda").mkdir()
    for header in ("mma", "copy_async"):
        text = (_build.CSRC / f"cuda/{header}.cuh").read_text()
        for name, (where, right, wrong) in MISTAKES.items():
            if where == header:
                assert text.count(right) == 1, name
                text = text.replace(right, wrong)
        (tmp_path / f"cuda/{header}.cuh").write_text(text)
    text = native.ptx_of(KERNELS, "80", tmp_path, tmp_path)
    for name in PRIMITIVES:
        words = words_of(name)
        assert (on_device(text, name, words) != on_host(name, words)).any(), name
