"""C++ test modules and programs: compiled on demand without torch, incrementally, into ``build/``."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

from conftest import ROOT
from dsconv_ext import _build

RULES = """\
ninja_required_version = 1.5
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule ptx
  command = $nvcc $flags -MD -MF $out.d -ptx $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx $in $flags -o $out
"""
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", f"-DDSCONV_X86={int(_build.IS_X86)}", "-DDSCONV_CUDA=1"]


def build(folder: Path, lines: list[str]) -> None:
    """Build what RULES and ``lines`` of a build.ninja make in ``folder``.

    Only what has changed is compiled; test processes that want the same folder wait for each other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    jobs = os.environ.get("MAX_JOBS") or str(_build.max_jobs())
    text = "\n".join([RULES, *lines, ""])
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        file = folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        done = subprocess.run(
            [shutil.which("ninja", path=path) or "ninja", "-j", jobs], cwd=folder, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


def ptx_of(source: Path, architecture: str, folder: Path = ROOT / "build", *includes: Path) -> str:
    """The PTX that nvcc makes of ``source``; headers of ``includes`` come before those of csrc."""
    cuda = _build.find_cuda()
    if cuda is None:
        pytest.skip("nvcc was not found")
    name = f"{source.stem}.ptx"
    flags = [*_build.NVCC_FLAGS, f"-arch=sm_{architecture}"]
    flags += [f"-I{path}" for path in (*includes, *_build.INCLUDE_DIRS, ROOT / "tests")]
    folder = folder / f"ptx-{architecture}-{source.stem}"
    build(folder, [f"nvcc = {cuda.home}/bin/nvcc", f"build {name}: ptx {source}", f"  flags = {' '.join(flags)}"])
    return (folder / name).read_text()


def load(name: str) -> ModuleType:
    """Build ``tests/<name>.cpp``, link it with the library's objects that know no torch, and import it."""
    folder = ROOT / "build" / name
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [*_build.INCLUDE_DIRS, pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*FLAGS, *(f"-I{path}" for path in includes)]
    sources = [s for s in _build.sources(cuda=False) if s.startswith("csrc/cpu/") or s == "csrc/machine.cpp"]
    lines = [
        f"cxx = {os.environ.get('CXX', 'c++')}",
        f"build {name}.o: compile {ROOT / 'tests' / name}.cpp",
        f"  flags = {' '.join(flags)}",
        f"build {library.name}: link {name}.o {' '.join(map(built_object, sources))}",
        "  flags = -shared",
    ]
    build(folder, lines)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built_object(source: str) -> str:
    """The object the build of the library made of ``source``."""
    relative = Path(_build.isa_of(source), source).with_suffix(".o")
    found = sorted((ROOT / "build").glob(f"temp.*/{relative}"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip(f"no build folder with {relative}: the library was built elsewhere")
    return str(found[-1])
