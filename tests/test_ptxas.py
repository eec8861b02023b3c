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
    """256 threads of any kernel, 512 of those that go through shared memory but for a few with tiles of 128 outputs."""
    _, table = ptxas.read_table()
    assert max(k.registers for k in table) <= 255
    through_shared = [k for k in table if "nchw" in k.kernel or "fused" in k.kernel]
    assert all(k.registers <= 128 or re.search("fused_forward<.*, 128, ", k.kernel) for k in through_shared)
    assert sum(k.registers > 128 for k in through_shared) <= len(through_shared) / 8


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


def loops_of(instructions: list[str], labels: dict[str, int]) -> list[range]:
    """From a label to a branch back to it."""
    loops = []
    for i, instruction in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], i + 1) <= i:
            loops.append(range(labels[target[1]], i + 1))
    return loops


def hot_loop(instructions: list[str], labels: dict[str, int]) -> list[str]:
    """The loop with the most multiply-adds, and of several such the shortest."""
    loops = [instructions[loop.start : loop.stop] for loop in loops_of(instructions, labels)]
    return max(loops, key=lambda loop: (multiply_adds(loop), -len(loop)))


def innermost(instructions: list[str], labels: dict[str, int], operation: str) -> list[str]:
    """Of the loops without a loop inside, the one with the most of an operation, and of several such the shortest."""
    loops = loops_of(instructions, labels)
    inner = [one for one in loops if not any(one != other and set(other) < set(one) for other in loops)]
    texts = [instructions[loop.start : loop.stop] for loop in inner]
    return max(texts, key=lambda loop: (count_of(loop, operation), -len(loop)))


def count_of(loop: list[str], operation: str) -> int:
    return sum(operation in instruction for instruction in loop)


def straight_line(instructions: list[str], labels: dict[str, int]) -> list[str]:
    """Between two branches or labels: where the most multiply-adds are."""
    borders = {0, len(instructions), *labels.values()}
    borders |= {i + 1 for i, text in enumerate(instructions) if re.search(r"\b(BRA|EXIT|RET|CALL)\b", text)}
    ordered = sorted(borders)
    return max((instructions[a:b] for a, b in zip(ordered, ordered[1:], strict=False)), key=multiply_adds)


def multiply_adds(loop: list[str]) -> int:
    return count_of(loop, "FFMA")


def compiled(source: str, folder: Path) -> dict[str, tuple[list[str], dict[str, int]]]:
    """The kernels of a source on sm_80."""
    cuda = _build.find_cuda()
    if cuda is None:
        pytest.skip("nvcc was not found")
    ptxas.compile_one(cuda, _build.CSRC / "cuda" / f"{source}.cu", "80", folder / "kernel.cubin")
    return instructions_of(folder / "kernel.cubin")


@pytest.mark.slow
@pytest.mark.parametrize(("taps", "share"), [(3, 0.45), (5, 0.60), (7, 0.60)])
@pytest.mark.parametrize("stride", [1, 2])
def test_hot_loops_multiply(taps, stride, share, tmp_path):
    """In float32: the share of multiply-adds, and inputs and weights in vectors of 16 bytes."""
    kernels = compiled(f"nhwc_wide_k{taps}s{stride}", tmp_path)
    (kernel,) = [k for name, k in kernels.items() if re.match(r"\S*depthwise_nhwcIfLi4E", name)]
    loop = hot_loop(*kernel)
    assert multiply_adds(loop) >= share * len(loop)
    loads = [i for i in loop if "LDG" in i or "LDS" in i]
    assert loads and all(".128" in i for i in loads)


@pytest.mark.slow
@pytest.mark.parametrize(("taps", "share"), [(3, 0.45), (5, 0.60), (7, 0.60)])
def test_contiguous_rows_multiply(taps, share, tmp_path):
    """Of a lane's rows of outputs, which are no loop, with all that it does once: the share of multiply-adds, and taps
    in vectors of 16 bytes. The streams move 4 values at once, of float32 at stride 1 by asynchronous copies."""
    kernels = compiled(f"nchw_k{taps}", tmp_path)
    assert len(kernels) == 2
    for name, (instructions, labels) in kernels.items():
        text = "\n".join(instructions)
        block = straight_line(instructions, labels)
        assert multiply_adds(block) >= share * len(block), name
        assert not re.search(r"STL|LDL", "\n".join(block)), name
        assert re.search(r"LDS\.128", "\n".join(block)), name
        assert bool(re.search(r"LDGSTS\S*\.128", text)) == (f"ILi{taps}ELi1E" in name), name
        assert re.search(r"LDG\S*\.64", text), name
        assert all(re.search(rf"\bSTG?\.E\S*\.{bits}", text) for bits in (64, 128)), name


@pytest.mark.slow
@pytest.mark.parametrize("source", [p.stem for p in ptxas.kernels() if p.stem.startswith("fused_")])
def test_fused_kernels_use_tensor_cores(source, tmp_path):
    """Products on tensor cores but for strict float32, operands by ldmatrix, inputs by asynchronous copies of 16 bytes.
    The hot loops: at least two HMMA for each ldmatrix, and of a row of taps three tenths multiply-adds; of a strict
    product seven tenths."""
    kernels = {name: code for name, code in compiled(source, tmp_path).items() if "fused_forward" in name}
    assert len(kernels) >= 4
    for name, code in kernels.items():
        strict, tf32 = "fused_forwardIf" in name, "4Tf32" in name
        text = "\n".join(code[0])
        assert re.search(r"LDGSTS\S*\.128", text), name
        assert ("HMMA.1688.F32.TF32" in text) == tf32 and ("HMMA.16816" in text) == (not strict and not tf32), name
        assert ("LDSM" in text) == (not strict), name
        if strict:
            product = innermost(*code, "FFMA")
            assert multiply_adds(product) >= 0.7 * len(product), name
        else:
            product = innermost(*code, "HMMA")
            assert count_of(product, "HMMA") >= 2 * count_of(product, "LDSM") > 0, name
            assert count_of(product, "HMMA") >= (0.15 if tf32 else 0.25) * len(product), name
            if "kany" not in source:
                taps = innermost(*code, "FFMA")
                assert multiply_adds(taps) >= 0.3 * len(taps) and not re.search("STL|LDL", "\n".join(taps)), name
