"""Sources, flags and CUDA detection of the shared library, for setup.py and for the tests that compile parts of it.

Importing this module needs neither torch nor setuptools. Environment variables read here: ``DSCONV_CUDA`` (0 | 1),
``CUDA_HOME``, ``TORCH_CUDA_ARCH_LIST`` and ``MAX_JOBS``.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
INCLUDE_DIRS = [str(CSRC), str(ROOT)]
_VERSIONS = runpy.run_path(str(Path(__file__).with_name("_version.py")))
VERSION: str = _VERSIONS["__version__"]
TORCH_MINIMUM: tuple[int, int] = _VERSIONS["TORCH_MINIMUM"]

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", "-mfma", "-mf16c"]
_AVX512 += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 12's own _mm512_undefined_* trips over them
# The flags of an instruction set; the sources compiled for it end in its name (rows_avx2.cpp). The rest is "baseline".
ISA_FLAGS = {"baseline": [], "portable": [], "avx2": _AVX2, "avx512": _AVX512}
X86_ISAS = ("avx2", "avx512")

COMMON_FLAGS = ["-O3", "-std=c++20"]
CXX_FLAGS = [*COMMON_FLAGS, "-g0", "-Wall", "-Wextra", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
# Only without traps does GCC turn loops over activations, which select, into vectors.
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
NVCC_FLAGS = [*COMMON_FLAGS, "-Xcompiler", "-Wall,-fvisibility=hidden"]
# torch's build defines these for its own headers; the kernels include none and want CUDA's half-precision arithmetic.
NVCC_FLAGS += [f"-U__CUDA_NO_{what}__" for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
NVCC_FLAGS += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]

DEFAULT_CUDA_ARCHS = "7.5;8.0;8.6;8.9;9.0;10.0;12.0"
BYTES_PER_JOB = 2 << 30


class Cuda(NamedTuple):
    """A CUDA toolkit: its root, its release ("13.0") and the architectures to compile for (["80", "90", "90+PTX"])."""

    home: Path
    release: str
    archs: list[str]

    @property
    def library_dir(self) -> Path:
        """The folder that holds cudart_static."""
        candidates = [self.home / "lib64", self.home / "lib", *self.home.glob("targets/*/lib")]
        return next((d for d in candidates if (d / "libcudart_static.a").exists()), candidates[0])

    @property
    def gencode(self) -> list[str]:
        """The nvcc flags of the architectures."""
        flags = []
        for arch in self.archs:
            number, _, ptx = arch.partition("+")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if ptx:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def isa_of(source: str) -> str:
    """The instruction set a source is compiled for: the key of `ISA_FLAGS` its name ends in, else "baseline"."""
    suffix = Path(source).stem.rpartition("_")[2]
    return suffix if suffix in ISA_FLAGS else "baseline"


def sources(cuda: bool) -> list[str]:
    """Every source of the library, relative to the repository root: what compiles longest first, the others sorted."""
    patterns = ["*.cpp", "ops/*.cpp", "cpu/*.cpp"] + (["cuda/*.cu"] if cuda else [])
    found = [str(p.relative_to(ROOT)) for pattern in patterns for p in CSRC.glob(pattern)]
    found.sort(key=lambda source: (not source.startswith("csrc/cpu/planes_"), source))
    return [s for s in found if IS_X86 or isa_of(s) not in X86_ISAS]


def find_cuda() -> Cuda | None:
    """The CUDA toolkit to build with: None if there is none or ``DSCONV_CUDA=0``."""
    wanted = os.environ.get("DSCONV_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"DSCONV_CUDA: got {wanted!r}, expected 0, 1 or nothing (build for CUDA if nvcc is found).")
    home = None if wanted == "0" else _cuda_home()
    if home is None:
        if wanted == "1":
            raise SystemExit("DSCONV_CUDA=1 needs nvcc: set CUDA_HOME to a CUDA toolkit or put its nvcc on PATH.")
        return None
    release = re.search(r"release (\d+\.\d+)", _output(home / "bin" / "nvcc", "--version"))
    if release is None:
        raise SystemExit(f"{home / 'bin' / 'nvcc'} --version does not name a CUDA release.")
    return Cuda(home, release[1], cuda_archs(home / "bin" / "nvcc"))


def _cuda_home() -> Path | None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if (home := os.environ.get(name)) and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    if nvcc := shutil.which("nvcc"):
        # The nvcc on PATH may be a wrapper script: only nvcc itself knows its root.
        top = re.search(r"TOP=(.*)", _output(nvcc, "-v", "--dryrun", "-x", "cu", os.devnull))
        return Path(top[1].strip()).resolve() if top else None
    return None


def cuda_archs(nvcc: Path) -> list[str]:
    """The architectures of ``TORCH_CUDA_ARCH_LIST``, by default all of ``DEFAULT_CUDA_ARCHS`` that nvcc knows."""
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    entries = re.split(r"[;,\s]+", requested or DEFAULT_CUDA_ARCHS)
    for entry in entries:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: got {entry!r}, expected entries like 8.0, 9.0a or 9.0+PTX.")
    archs = [entry.replace(".", "") for entry in entries]
    if requested:
        return archs
    known = _output(nvcc, "--list-gpu-code")
    return [arch for arch in archs if f"sm_{arch}" in known.split()]


def _output(*command: str | Path) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def max_jobs() -> int:
    """Compile jobs that fit the cores and the memory available to this process."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if match := re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo")):
        free = int(match[1]) << 10
    if (limit := _read("/sys/fs/cgroup/memory.max").strip()).isdigit():
        free = min(free, int(limit))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, free // BYTES_PER_JOB))


def _read(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""


def defines(cuda: Cuda | None) -> list[str]:
    """The -D flags of every source but CPU kernels, which know neither torch nor CUDA and serve any build."""
    major, minor = TORCH_MINIMUM
    return [
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f"-DDSCONV_CUDA={int(cuda is not None)}",
        f"-DDSCONV_X86={int(IS_X86)}",
    ]


def _import_torch() -> Any:
    need = ".".join(map(str, TORCH_MINIMUM))
    how = f"install torch >= {need} first, then run `pip install --no-build-isolation .`"
    try:
        import torch
    except ImportError:
        raise SystemExit(f"dsconv_ext is compiled against an installed PyTorch, and here is none: {how}.") from None
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_MINIMUM:
        raise SystemExit(f"dsconv_ext needs PyTorch >= {need} and found {torch.__version__}: {how}.")
    return torch


def extension(cuda: Cuda | None) -> Any:
    """The setuptools Extension of the shared library."""
    from setuptools import Extension
    from torch.utils import cpp_extension

    system_includes = list(cpp_extension.include_paths())
    library_dirs = list(cpp_extension.library_paths())
    libraries = ["torch_cpu"]  # all of the stable ABI; CppExtension would add libtorch and libc10
    archs: list[str] = []
    gencode: list[str] = []
    if cuda:
        system_includes.append(str(cuda.home / "include"))
        library_dirs.append(str(cuda.library_dir))
        libraries += ["cudart_static", "rt", "dl", "pthread"]
        archs, gencode = cuda.archs, cuda.gencode
    # -isystem: our warnings are about our sources, not about torch's headers.
    flags = defines(cuda) + [flag for path in system_includes for flag in ("-isystem", path)]
    strings = [f'-DDSCONV_VERSION="{VERSION}"', f'-DDSCONV_CUDA_ARCHS="{";".join(archs)}"']
    return Extension(
        "dsconv_ext._C",
        sources(cuda is not None),
        include_dirs=INCLUDE_DIRS,
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args={"cxx": CXX_FLAGS + flags + strings, "nvcc": NVCC_FLAGS + flags + gencode},
        extra_link_args=["-Wl,--no-undefined", "-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
        language="c++",
    )


def build_ext_class() -> type:
    """torch's BuildExtension, compiling each instruction set with its own flags in its own folder (and build.ninja)."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:  # pip names a temporary folder, and nothing would be incremental
                self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

        def build_extension(self, ext: Any) -> None:
            compile_group = self.compiler.compile  # torch's: writes one build.ninja with one set of flags and runs it

            def compile_all(sources: list[str], output_dir: str, extra_postargs: Any, **rest: Any) -> list[str]:
                groups: dict[str, list[str]] = {}
                for source in sources:
                    groups.setdefault(isa_of(source), []).append(source)
                objects = []
                for isa, group in groups.items():
                    flags = extra_postargs
                    if isa != "baseline":
                        flags = flags | {"cxx": CXX_FLAGS + ISA_FLAGS[isa]}
                    objects += compile_group(group, os.path.join(output_dir, isa), extra_postargs=flags, **rest)
                return objects

            self.compiler.compile = compile_all
            super().build_extension(ext)

    return BuildExt


def setup_arguments() -> dict[str, Any]:
    """The keyword arguments of setuptools.setup; everything static is in pyproject.toml."""
    torch = _import_torch()
    from torch.utils import cpp_extension

    if cuda := find_cuda():
        # The library links cudart statically and nothing of torch's CUDA, so the toolkit serves a CPU-only torch
        # and a torch of another CUDA release too; torch's build code wants to see one and the same release.
        cpp_extension.CUDA_HOME = str(cuda.home)
        torch.version.cuda = cuda.release
    os.environ.setdefault("MAX_JOBS", str(max_jobs()))
    # ninja as a package of this environment, also when the environment is not activated
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return {
        "ext_modules": [extension(cuda)],
        "cmdclass": {"build_ext": build_ext_class()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }
