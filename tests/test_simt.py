"""The CUDA kernels, run on the CPU thread by thread: numbers, races, accesses, traffic. See ``tests/simt/simt.h``.

``tests/simt/driver.cpp`` is compiled with csrc/cuda by g++ in three ways. A failure prints a line that reruns alone:
``echo "ROW LINE" | build/simt-plain/driver``.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import native
from conftest import ROOT
from dsconv_ext import _build

RULES = """\
ninja_required_version = 1.5
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $in $flags -o $out
"""
# What runs on the device; device.cu asks the hardware and stays out.
KERNELS = [s for s in _build.sources(cuda=True) if s.endswith(".cu") and s != "csrc/cuda/device.cu"]
KERNELS += ["tests/simt/plants.cu"]
HARNESS = ["tests/simt/simt.cpp", "tests/simt/trace.cpp", "tests/simt/driver.cpp", "csrc/choose.cpp"]


@dataclass(frozen=True)
class Variant:
    """One way to compile: flags of everything, flags of the kernels on top."""

    name: str
    flags: tuple[str, ...] = ()
    kernel_flags: tuple[str, ...] = ()


PLAIN = Variant("plain", ("-O2",))
# Whole accesses, in the order of the source, and no instruction for several of them.
WHOLE = ("-fno-tree-sra", "-fno-ipa-sra", "-fno-tree-vectorize", "-fno-tree-slp-vectorize")
TRACED = Variant("traced", ("-O1", "-DSIMT_TRACED=1"), ("-fsanitize=thread", *WHOLE))
SANITIZED = Variant("sanitized", ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"))
SANITIZE = "-fsanitize=address,undefined"
VARIANTS = (PLAIN, TRACED, SANITIZED)


@functools.cache
def cuda_include() -> Path:
    """NVIDIA's headers; without them, or on another processor, nothing here runs."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the fibres of tests/simt know x86-64 only")
    home = _build._cuda_home()
    include = home / "include" if home else None
    if include is None or not (include / "cuda_fp16.h").exists():
        pytest.skip("no CUDA toolkit: its headers are needed")
    return include


def ninja_file(variant: Variant) -> str:
    common = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DDSCONV_CUDA=1"]
    common += [f"-DDSCONV_X86={int(_build.IS_X86)}", "-ffp-contract=off", *variant.flags]
    folders = [ROOT / "tests/simt/stand_in", ROOT / "tests", ROOT / "tests/core", ROOT / "csrc"]
    common += [*(f"-I{folder}" for folder in folders), f"-isystem {cuda_include()}"]
    common += [SANITIZE] * (variant is SANITIZED)
    lines, objects = [RULES, f"cxx = {os.environ.get('CXX', 'g++')}"], []
    for source in [*HARNESS, *KERNELS]:
        kernel = ["-include simt/device.h", "-x c++", *variant.kernel_flags] if source.endswith(".cu") else []
        objects.append(source.replace("/", "_") + ".o")
        lines += [f"build {objects[-1]}: compile {ROOT / source}", f"  flags = {' '.join([*common, *kernel])}"]
    # The reference rows and the other CPU kernels of the table are the library's own objects.
    library = [s for s in _build.sources(cuda=False) if s.startswith("csrc/cpu/") or s == "csrc/machine.cpp"]
    objects += map(native.built_object, library)
    link = SANITIZE if variant is SANITIZED else ""
    lines += [f"build driver: link {' '.join(objects)}", f"  flags = {link}", ""]
    return "\n".join(lines)


@functools.cache
def build(variant: Variant) -> Path:
    return native.program(ROOT / "build" / f"simt-{variant.name}", ninja_file(variant))


def drive(variant: Variant, *options: str, lines: list[str] | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [build(variant), *options],
        input="\n".join(lines or []),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )


# A planted bug and what each build says of it; an empty string where a build is not made to notice.
BUGS = {
    "out_of_bounds": {"plain": "", "traced": "reads outside every buffer", "sanitized": "heap-buffer-overflow"},
    "shared_out_of_bounds": {"plain": "", "traced": "writes outside every buffer", "sanitized": "use-after-poison"},
    "missing_barrier": {"plain": "values are wrong", "traced": "race in shared memory", "sanitized": ""},
    "divergent_barrier": {v.name: r"divergent barrier: .*plants.cu:\d+.*plants.cu:\d+" for v in VARIANTS},
    "early_exit": {v.name: r"divergent barrier: .*plants.cu:\d+.*has ended" for v in VARIANTS},
    "divergent_shuffle": {v.name: r"divergent barrier: .*exchange of plants.cu:\d+, .*has ended" for v in VARIANTS},
    "forgotten_wait": {v.name: "copies that it never waited for" for v in VARIANTS},
    "plain_add": {"plain": "", "traced": "race in global memory", "sanitized": ""},
    "misaligned": {"plain": "", "traced": "misaligned access of 16", "sanitized": "misaligned address"},
}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(bug, variant):
    expected = BUGS[bug][variant.name]
    done = drive(variant, "--plant", bug)
    if expected:
        assert done.returncode != 0 and re.search(expected, done.stdout), done.stdout[-3000:]


def counted(bug: str) -> list[int]:
    """Sectors, bytes, wavefronts and the fewest wavefronts of a planted kernel without a mistake in its numbers."""
    done = drive(TRACED, "--plant", bug)
    assert done.returncode == 0, done.stdout
    return [int(n) for n in re.findall(r"\d+", done.stdout)]


def test_the_kernel_without_a_bug_passes():
    for variant in VARIANTS:
        done = drive(variant, "--plant", "none")
        assert done.returncode == 0 and "noticed" not in done.stdout, done.stdout
    sectors, total, wavefronts, fewest = counted("none")
    assert total == 2 * 512 * 4 and sectors == total // 32
    assert wavefronts == fewest == 2 * 512 // 32


def test_an_uncoalesced_mapping_is_counted():
    assert counted("uncoalesced")[0] > 2 * counted("none")[0]


def test_a_bank_conflict_is_counted():
    """Four lanes to each bank, both ways."""
    _, _, wavefronts, fewest = counted("bank_conflict")
    assert wavefronts == 4 * fewest
