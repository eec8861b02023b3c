"""What nvcc makes of the CUDA kernels: the committed table of registers and spills, and the mix of instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import ptxas
from dsconv_ext import _build


def test_the_table_is_of_these_sources():
    """After a change of csrc/cuda: ``python tests/ptxas.py``."""
    recorded, _ = ptxas.read_table()
    assert recorded == ptxas.source_hash(), "tests/ptxas.csv is stale: run `python tests/ptxas.py` where nvcc is"


def test_every_kernel_is_in_the_table_for_every_architecture():
    _, table = ptxas.read_table()
    per_architecture = {a: {(k.source, k.kernel) for k in table if k.architecture == a} for a in ptxas.ARCHITECTURES}
    assert len({frozenset(kernels) for kernels in per_architecture.values()}) == 1
    sources = {source for source, _ in per_architecture["80"]}
    assert sources == {p.stem for p in ptxas.kernels()} - {"depthwise_rows", "fused"}  # host code alone


def test_nothing_spills():
    _, table = ptxas.read_table()
    assert [k for k in table if k.spill_bytes > 0] == []


def test_blocks_fit_a_multiprocessor():
    """512 threads of the kernels that go through shared memory, 256 of the others."""
    _, table = ptxas.read_table()
    assert max(k.registers for k in table) <= 255
    assert all(k.registers <= 128 for k in table if "nchw" in k.kernel or "fused" in k.kernel)


def nvdisasm() -> str:
    beside_triton = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/bin/nvdisasm"
    found = shutil.which("nvdisasm") or (str(beside_triton) if beside_triton.exists() else None)
    if found is None:
        pytest.skip("nvdisasm was not found (it comes with a CUDA toolkit, and with triton)")
    return found


def hot_loop(text: str) -> list[str]:
    """The instructions of the loop with the most multiply-adds, and of several such the shortest."""
    instructions, labels, loops = [], {}, []
    for text_line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", text_line):
            labels[label[1]] = len(instructions)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text_line):
            instructions.append(instruction[1])
    for i, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], i + 1) <= i:
            loops.append(instructions[labels[target[1]] : i + 1])
    return max(loops, key=lambda loop: (multiply_adds(loop), -len(loop)))


def multiply_adds(loop: list[str]) -> int:
    return sum("FFMA" in instruction for instruction in loop)


def disassembled(source: str, architecture: str, folder: Path) -> list[str]:
    """The SASS of each kernel of a source, which begins with the kernel's mangled name."""
    cuda, disassembler = _build.find_cuda(), nvdisasm()
    if cuda is None:
        pytest.skip("nvcc was not found")
    ptxas.compile_one(cuda, _build.CSRC / "cuda" / f"{source}.cu", architecture, folder / "kernel.cubin")
    done = subprocess.run([disassembler, "-c", folder / "kernel.cubin"], capture_output=True, text=True, check=True)
    return re.split(r"^\.text\.", done.stdout, flags=re.MULTILINE)[1:]


@pytest.mark.slow
@pytest.mark.parametrize("source", [p.stem for p in ptxas.kernels() if p.stem.startswith("fused_")])
def test_fused_kernels_use_tensor_cores(source, tmp_path):
    """On sm_80: products of half types on tensor cores, operands by ldmatrix, inputs by asynchronous copies."""
    kernels = [kernel for kernel in disassembled(source, "80", tmp_path) if "fused_forward" in kernel.partition(":")[0]]
    assert len(kernels) >= 6
    for kernel in kernels:
        is_float = "fused_forwardIf" in kernel.partition(":")[0]
        assert "LDGSTS" in kernel
        assert ("HMMA.16816" in kernel) == ("LDSM" in kernel) == (not is_float)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "share"), [("nhwc_k3", 0.45), ("nhwc_k5", 0.60), ("nhwc_k7", 0.60)])
def test_hot_loops_multiply(source, share, tmp_path):
    """On sm_80, in float32: the share of multiply-adds, and inputs and weights in vectors of 16 bytes."""
    checked = 0
    for kernel in disassembled(source, "80", tmp_path):
        if not re.match(r"\S*depthwise_nhwcIfLi4E", kernel):
            continue
        loop = hot_loop(kernel)
        assert multiply_adds(loop) >= share * len(loop), kernel.partition(":")[0]
        loads = [i for i in loop if "LDG" in i or "LDS" in i]
        assert loads and all(".128" in i for i in loads)
        checked += 1
    assert checked == 2
