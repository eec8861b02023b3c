"""Registers, shared memory, stack and spills of every CUDA kernel on every architecture, as ptxas reports them.

``python tests/ptxas.py`` compiles csrc/cuda (ten minutes on two cores) and writes ``tests/ptxas.csv``, whose first
line is the hash of the sources: ``tests/test_ptxas.py`` fails when they have changed since.
"""

from __future__ import annotations

import csv
import hashlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dsconv_ext import _build  # noqa: E402

TABLE = ROOT / "tests" / "ptxas.csv"
FIELDS = ("architecture", "source", "kernel", "registers", "shared_bytes", "stack_bytes", "spill_bytes")
ARCHITECTURES = [entry.replace(".", "") for entry in _build.DEFAULT_CUDA_ARCHS.split(";")]
# What the kernels include from outside csrc/cuda.
HEADERS = ("activations.h", "geometry.h", "problem.h")


class Kernel(NamedTuple):
    """One line of the table."""

    architecture: str
    source: str
    kernel: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def kernels() -> list[Path]:
    """The sources that hold kernels; device.cu only asks the driver."""
    return [p for p in sorted((_build.CSRC / "cuda").glob("*.cu")) if p.name != "device.cu"]


def source_hash() -> str:
    """Of csrc/cuda, the headers its kernels include, and nvcc's flags."""
    digest = hashlib.sha256(" ".join(_build.NVCC_FLAGS).encode())
    for path in [*sorted((_build.CSRC / "cuda").glob("*.cu*")), *(_build.CSRC / name for name in HEADERS)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_one(cuda: _build.Cuda, source: Path, architecture: str, output: Path) -> list[Kernel]:
    """Compile for one architecture and read what ptxas says."""
    flags = [*_build.NVCC_FLAGS, *(f"-I{path}" for path in _build.INCLUDE_DIRS), "-Xptxas", "-v", "-cubin"]
    command = [cuda.home / "bin" / "nvcc", *flags, f"-arch=sm_{architecture}", "-o", output, source]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return parse(done.stderr, source.stem, architecture)


def parse(report: str, source: str, architecture: str) -> list[Kernel]:
    """The kernels that ``-Xptxas -v`` describes."""
    found = []
    for block in report.split("Compiling entry function '")[1:]:
        name = demangled(block.partition("'")[0])
        stack, stores, loads = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", block).groups()
        registers = re.search(r"Used (\d+) registers", block)[1]
        shared = re.search(r"(\d+) bytes smem", block)
        numbers = (int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads))
        found.append(Kernel(architecture, source, name, *numbers))
    return found


def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(dsconv::cuda::\w+\)$|\(dsconv::\w+\)$|dsconv::cuda::|^void |\(int\)", "", text)


def read_table() -> tuple[str, list[Kernel]]:
    """The hash and the lines of the committed table."""
    first, *lines = TABLE.read_text().splitlines()
    texts, numbers = FIELDS[:3], FIELDS[3:]
    rows = csv.DictReader(lines)
    return first.rpartition(" ")[2], [Kernel(*(r[f] for f in texts), *(int(r[f]) for f in numbers)) for r in rows]


def main() -> None:
    cuda = _build.find_cuda()
    if cuda is None:
        raise SystemExit("nvcc was not found")
    jobs = [(source, architecture) for architecture in ARCHITECTURES for source in kernels()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(_build.max_jobs()) as pool:

        def compile_job(job: tuple[Path, str]) -> list[Kernel]:
            source, architecture = job
            cubin = Path(folder) / f"{source.stem}_{architecture}.cubin"
            kernels_of_job = compile_one(cuda, source, architecture, cubin)
            print(architecture, source.name, flush=True)
            return kernels_of_job

        found = [kernel for result in pool.map(compile_job, jobs) for kernel in result]
    with TABLE.open("w", newline="") as file:
        file.write(f"# nvcc {cuda.release}, sources {source_hash()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows(sorted(found))


if __name__ == "__main__":
    main()
