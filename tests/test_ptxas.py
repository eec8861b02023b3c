"""What nvcc makes of the CUDA kernels: the committed table of registers and spills, and the mix of instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import ptxas


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
    """256 threads of any kernel, 512 of those that go through shared memory."""
    _, table = ptxas.read_table()
    assert max(k.registers for k in table) <= 255
    assert all(k.registers <= 128 for k in table if "nchw" in k.kernel or "fused" in k.kernel)


def nvdisasm() -> str:
    beside_triton = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/bin/nvdisasm"
    found = shutil.which("nvdisasm") or (str(beside_triton) if beside_triton.exists() else None)
    if found is None:
        pytest.skip("nvdisasm was not found (it comes with a CUDA toolkit, and with triton)")
    return found


def instructions_of(cubin: Path) -> dict[str, tuple[list[str], dict[str, int]]]:
    """Of each kernel: its instructions, and where its labels are among them."""
    done = subprocess.run([nvdisasm(), "-c", cubin], capture_output=True, text=True, check=True)
    kernels = {}
    for text in re.split(r"^\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        instructions: list[str] = []
        labels = {}
        for text_line in text.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", text_line):
                labels[label[1]] = len(instructions)
            if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text_line):
                instructions.append(instruction[1])
        kernels[text.partition(":")[0]] = instructions, labels
    return kernels


def hot_loop(instructions: list[str], labels: dict[str, int]) -> list[str]:
    """The loop with the most multiply-adds, and of several such the shortest."""
    loops = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], i + 1) <= i:
            loops.append(instructions[labels[target[1]] : i + 1])
    return max(loops, key=lambda loop: (multiply_adds(loop), -len(loop)))


def straight_line(instructions: list[str], labels: dict[str, int]) -> list[str]:
    """Between two branches or labels: where the most multiply-adds are."""
    borders = {0, len(instructions), *labels.values()}
    borders |= {i + 1 for i, text in enumerate(instructions) if re.search(r"\b(BRA|EXIT|RET|CALL)\b", text)}
    ordered = sorted(borders)
    return max((instructions[a:b] for a, b in zip(ordered, ordered[1:], strict=False)), key=multiply_adds)


def multiply_adds(loop: list[str]) -> int:
    return sum("FFMA" in instruction for instruction in loop)

    """256 threads of any kernel, 512 of those that go through shared memory."""
