"""Whole launches of csrc/cuda: what nvcc makes of a kernel, run by ``ptx.py``, writes what its host build wrote.

The harness of tests/simt runs a row, its launch code included, and records the launch: kernel, grid, parameters and
all buffers. The data are integers, so the results are the same to the bit however sums are rounded.
"""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import native
import ptx
import ptx_isa
import test_simt_fused
from dsconv_ext import _build
from test_simt import HALVES, PLAIN, ROWS, build, drive, problems


@dataclass
class Launch:
    """A launch as simt.cpp records it; buffers by their addresses."""

    function: int
    blocks: int
    threads: int
    shared_bytes: int
    parameters: bytes
    before: dict[int, np.ndarray] = field(default_factory=dict)
    after: dict[int, np.ndarray] = field(default_factory=dict)


def recorded(row: str, problem: str, file: Path, gpu: str) -> list[Launch]:
    """On a GPU of so many multiprocessors."""
    done = drive(PLAIN, "--record", str(file), gpu, lines=[f"{row} {problem}"])
    assert done.returncode == 0 and done.stdout.startswith("ok"), done.stdout
    launches = []
    for line in file.read_text().splitlines():
        kind, *numbers, data = line.split(" ")
        if kind == "launch":
            launches.append(Launch(*map(int, numbers), bytes.fromhex(data)))
        elif data:
            getattr(launches[-1], kind)[int(numbers[0])] = np.frombuffer(bytes.fromhex(data), np.uint8)
    return launches


def symbols() -> dict[int, str]:
    """The functions of the harness by their distance from its start: nvcc gives kernels the same names."""
    text = subprocess.run(["nm", build(PLAIN)], capture_output=True, text=True, check=True).stdout
    entries = [line.split() for line in text.splitlines()]
    return {int(entry[0], 16): entry[2] for entry in entries if len(entry) == 3}


def run(machine: ptx.Machine, name: str, launch: Launch) -> None:
    """The launch writes what it wrote."""
    machine.clear()
    for address, data in launch.before.items():
        machine.place(data, address)
    grid = {"blocks": launch.blocks, "threads": launch.threads, "shared_bytes": launch.shared_bytes}
    machine.launch(name, launch.parameters, **grid)
    for address, data in launch.after.items():
        assert (machine.fetch(address, data) == data).all()


def read(source: str, architecture: str = "80") -> ptx.Machine:
    return ptx.Machine(native.ptx_of(_build.CSRC / "cuda" / source, architecture))


def effort(problem: str) -> tuple[bool, int]:
    """Orders problems: first those of more than one tile and more than one chunk of channels, small ones first."""
    numbers = {name: math.prod(map(int, value.split("x"))) for name, value in re.findall(r"(\w+)=([\dx]+)\b", problem)}
    pixels, channels = numbers["n"] * numbers["out"], numbers["c"] * numbers["m"]
    return pixels <= 128 or channels <= 32, pixels * channels


def check(machine: ptx.Machine, row: str, lines: list[str], wanted: set[str], folder: Path) -> None:
    """Problems cut as large layers are and, every third, as on a large GPU, until there was one of everything wanted:
    dtypes, or kernels. Of integers: their activations are not called as functions, which the reader does not know."""
    missing, names = set(wanted), symbols()
    for i, problem in enumerate(sorted((one for one in lines if "data=integers" in one), key=effort)):
        launches = recorded(row, problem, folder / "launches", ("132", "1", "1")[i % 3])
        reached = {re.search(r"dtype=(\S+)", problem)[1], *(names[launch.function] for launch in launches)}
        if reached & missing:
            for launch in launches:
                run(machine, names[launch.function], launch)
        missing -= reached
        if not missing:
            return
    raise AssertionError(f"no problem of {missing}")


DTYPES = {"float32", *HALVES}


def test_direct(tmp_path):
    row = "depthwise_fwd_direct_cuda"
    check(read("depthwise_direct.cu"), row, problems(row, 60), DTYPES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if "direct" not in row])
def test_every_row(row, tmp_path):
    name = re.fullmatch(r"depthwise_fwd_(\w+)_cuda", row)[1]  # both strides may be in one source
    source = next(f"{s}.cu" for s in (name, name[:-2]) if (_build.CSRC / "cuda" / f"{s}.cu").exists())
    check(read(source), row, problems(row, 60), DTYPES, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["75", "80"])
@pytest.mark.parametrize("row", test_simt_fused.ROWS)
def test_every_fused_row(row, architecture, tmp_path):
    """On sm_75 with other tensor-core instructions, plain copies, and neither bfloat16 nor tf32. Both dataflows have
    the same kernels, of which resident rows may never take those of 128 outputs."""
    name = re.fullmatch(r"separable_fwd_(?:fused|resident)_(n\w+_k(?:\d|any))(?:s\d)?_cuda", row)[1]
    machine = read(f"fused_{name}.cu", architecture)
    channels_last, taps, stride = test_simt_fused.parts_of(row)
    factors = "f|6__half" if architecture == "75" else r"\w+?"
    outputs = "64" if test_simt_fused.is_resident(row) else r"\d+"
    kernel = rf"fused_forwardI(?:{factors})Li{outputs}ELi{taps or 0}ELi{stride or 0}ELb{int(not channels_last)}E"
    wanted = {one for one in machine.kernels if re.search(kernel, one)}
    lines = test_simt_fused.problems(row, 150)
    if architecture == "75":
        lines = [one for one in lines if not re.search("bfloat16|tf32", one)]
    assert len(wanted) in ((2, 4) if architecture == "75" else (4, 8))
    check(machine, row, lines, wanted, tmp_path)


def kernel_of(*body: str) -> str:
    """PTX whose one kernel takes no parameter."""
    lines = [".version 9.0", ".target sm_80", ".address_size 64", ".visible .entry kernel()", "{"]
    declared = [".reg .pred %p<2>;", ".reg .b32 %r<8>;", ".reg .f32 %f<8>;", "mov.u32 %r0, %tid.x;"]
    return "\n".join([*lines, *declared, *body, "ret;", "}"])


MMA = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f0, %f1, %f2, %f3}, {%r1, %r2}, {%r3}, {%f0, %f1, %f2, %f3};"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (["add.cc.u32 %r1, %r0, 1;"], "unknown instruction: add.cc.u32"),
        (["add.u64 %r1, %r0, 1;"], "%r0 has no u64"),
        (["setp.eq.s32 %p0, %r0, 40;", f"@!%p0 {MMA}"], "not all lanes of a warp come to: @!%p0 mma"),
        (["setp.gt.s32 %p0, %r0, 31;", f"@!%p0 {MMA}"], None),
        (["setp.eq.s32 %p0, %r0, 40;", "@%p0 ret;", "bar.sync 0;"], "a barrier that some threads do not reach"),
        (["shl.b32 %r1, %r0, 3;", "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2, %r3}, [%r1];"], "misaligned"),
        (["shl.b32 %r1, %r0, 4;", "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2, %r3}, [%r1];"], "outside every"),
        (["st.shared.u32 [%r0+-4], %r0;"], "misaligned access of 4"),
    ],
)
def test_what_the_reader_refuses(body, message):
    machine = ptx.Machine(kernel_of(*body))
    if message is None:
        return machine.launch("kernel", b"", threads=64, shared_bytes=512)
    with pytest.raises(ptx.PtxError, match=message.replace("(", r"\(")):
        machine.launch("kernel", b"", threads=64, shared_bytes=512)


def test_a_fused_multiply_add_rounds_once():
    """1 + 3 2^-24 - 2^-70 is nearest to 1 + 2^-23; in double it is half-way between that and an even neighbour."""
    a, b, c = (np.float32(value) for value in (2**-12 * (1 + 2**-23), 2**-12 * (1 - 2**-23), 1 + 2**-23))
    assert ptx_isa.fused(a, b, c) == c and ptx_isa.fused(-a, b, -c) == -c
    assert np.float32(float(a) * float(b) + float(c)) == np.float32(1 + 2**-22)
