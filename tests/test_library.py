"""The shared library: its name, what it needs, and that no object compiled for an instruction set lends its code."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import ROOT

FORBIDDEN = r"libtorch_cuda|libc10_cuda|libcudart|libcuda\.so|libtorch_python|libpython"
ISA_OBJECTS = sorted((ROOT / "build").glob("temp.*/**/*_avx*.o"))


def tool(name: str, *arguments) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return subprocess.run([name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def test_name(library):
    assert library.name == "_C.abi3.so" and library.exists()
    others = [p.name for p in library.parent.glob("*.so") if p != library]
    assert others == []


def test_what_it_needs(library):
    """Nothing of CUDA and nothing of Python: it loads beside a CPU-only torch of any Python."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", library))
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if re.search(FORBIDDEN, name)] == []


def test_undefined_symbols(library):
    """Of torch only the stable C interface is used, and nothing of the CUDA runtime or driver."""
    undefined = [line.split()[-1] for line in tool("nm", "-D", "--undefined-only", library).splitlines()]
    assert len(undefined) > 10
    cuda = [s for s in undefined if re.match(r"(cu[A-Z]|cuda[A-Z]|__cuda)", s)]
    assert cuda == []
    cxx_torch = [s for s in undefined if re.match(r"_Z.*(2at|3c10|5torch)", s)]
    assert cxx_torch == []
    assert [s for s in undefined if s.startswith("Py")] == []
    torch_c = {s for s in undefined if s.startswith(("aoti_torch_", "torch_"))}
    cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    exported = {line.split()[-1].partition("@")[0] for line in tool("nm", "-D", "--defined-only", cpu).splitlines()}
    assert torch_c != set() and torch_c - exported == set()


def test_exported_symbols(library):
    """Nothing of ours is exported: no other library can take it for its own."""
    exported = tool("nm", "-DC", "--defined-only", library).splitlines()
    assert [line for line in exported if "dsconv" in line] == []


@pytest.mark.parametrize("path", ISA_OBJECTS or [None], ids=lambda p: p.stem if p else "none")
def test_objects_of_an_instruction_set_lend_nothing(path):
    """The linker keeps one copy of a weak function; if that is the AVX-512 one, other processors crash in it."""
    if path is None:
        pytest.skip("no build folder with objects: the library was built elsewhere")
    isa = path.stem.rpartition("_")[2]
    symbols = re.findall(r"^[0-9a-f ]{16} ([A-Za-z]) (.*)$", tool("nm", "-C", path), re.MULTILINE)
    assert symbols != []
    shared = [(kind, name) for kind, name in symbols if kind in "WVuiTDBRC"]
    own = re.compile(rf"(\w[\w:<>*& ]* )?((vtable|typeinfo|typeinfo name|guard variable) for )?dsconv::cpu::{isa}::")
    strangers = [f"{kind} {name}" for kind, name in shared if not own.match(name)]
    assert strangers == []


def test_the_linked_library_has_no_wide_code_outside_its_namespace(library):
    """Disassembled, no function outside the AVX-512 namespace uses a 512-bit register."""
    wide, current = set(), ""
    for line in tool("objdump", "-dC", "--no-show-raw-insn", library).splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = match[1]
        elif "%zmm" in line:
            wide.add(current)
    assert wide != set()
    assert {name for name in wide if "avx512" not in name} == set()
