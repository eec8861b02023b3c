"""C++ test modules: compiled on demand without torch, incrementally, into ``build/``."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

from conftest import ROOT
from dsconv_ext import _build

RULES = """
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared $in -o $out
"""
# The kernels are linked, not run.
FLAGS = ["-O0", "-std=c++20", "-fPIC", "-fvisibility=hidden", f"-DDSCONV_X86={int(_build.IS_X86)}", "-DDSCONV_CUDA=1"]


def load(name: str) -> ModuleType:
    """Build ``tests/<name>.cpp`` with the CPU kernels and the description of the machine, and import it."""
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    includes = [*_build.INCLUDE_DIRS, pybind11.get_include(), sysconfig.get_path("include")]
    sources = [s for s in _build.sources(cuda=False) if s.startswith("csrc/cpu/") or s == "csrc/machine.cpp"]
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects, lines = [], [f"cxx = {os.environ.get('CXX', 'c++')}", RULES]
    for source in [f"tests/{name}.cpp", *sources]:
        objects.append(f"{Path(source).stem}.o")
        flags = [*FLAGS, *_build.ISA_FLAGS[_build.isa_of(source)], *(f"-I{path}" for path in includes)]
        lines.append(f"build {objects[-1]}: cxx {ROOT / source}\n  flags = {' '.join(flags)}")
    lines.append(f"build {library.name}: link {' '.join(objects)}\n")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the other workers wait
        (folder / "build.ninja").write_text("\n".join(lines))
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
