"""The compiled core without torch: every CPU row on seeded problems, under sanitizers, emulated processors, other CPUs.

``tests/core/driver.cpp`` draws the problems, runs the rows of the kernel table and compares them with the reference
rows; here it is built in several ways, each in its own folder ``build/core-*``. A failure prints a line that reruns
alone: ``build/core-plain/driver --row NAME --problem "LINE"``.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import native
from conftest import ROOT
from dsconv_ext import _build

DRIVER = "tests/core/driver.cpp"
TARGETS = ["portable", "avx2", "avx512", "avx512bf16", "amx"]
PLAIN_COMPILER = os.environ.get("CXX", "g++")
# An object of AVX2 under the names of AVX-512.
RENAME = [
    "rule rename",
    """  command = nm $in | awk '{ old = $$NF } gsub(/4avx2/, "6avx512", $$NF) { print old, $$NF }' > $out.names """
    "&& objcopy --redefine-syms=$out.names $in $out",
]


@dataclass(frozen=True)
class Variant:
    """One way to build the driver: what its flags add to those of the library, and what starts the program."""

    name: str
    flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    compiler: str = PLAIN_COMPILER
    x86: bool = _build.IS_X86
    runner: tuple[str, ...] = ()
    block_flags: tuple[str, ...] | None = None  # instead of `flags`, for the block kernels
    emulates_amx: bool = False
    mistake: tuple[str, str] | None = None  # in tile_product.cpp: what it says, and what it should not

    @property
    def is_library(self) -> bool:
        """Whether the kernels are those of the library, object by object."""
        return not self.flags and self.x86 == _build.IS_X86 and self.compiler == PLAIN_COMPILER


# -O1 and frame pointers: a sanitized -O3 build takes minutes and its traces point nowhere.
SANITIZED = ("-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
PLAIN = Variant("plain")
# The block kernels, and those over planes, are megabytes of straight-line code, which takes a quarter of an hour to
# compile with UBSan.
ADDRESS = Variant(
    "asan",
    (*SANITIZED, "-fsanitize=address,undefined"),
    ("-fsanitize=address,undefined",),
    block_flags=(*SANITIZED, "-g0", "-fsanitize=address"),
)
THREAD = Variant("tsan", (*SANITIZED, "-fsanitize=thread"), ("-fsanitize=thread",))
# Static: the emulator then needs no libraries of the other architecture.
AARCH64 = Variant("aarch64", link=("-static",), compiler="aarch64-linux-gnu-g++", x86=False, runner=("qemu-aarch64",))
# tile_product.cpp with registers and instructions of its own (core/emulated), and the rest of AVX-512's namespace in
# vectors of AVX2 (where AVX2 has the same kernels, its objects): every bfloat16 row of AMX, on a processor that has
# neither. (-O1 compiles in half the time.)
AMX = Variant("amx", block_flags=("-O1",), emulates_amx=True)
AMX_ADDRESS = replace(ADDRESS, name="amx-asan", emulates_amx=True)


def need(*programs: str) -> None:
    """Skip the test, and say what is missing."""
    packages = {"qemu-x86_64": "qemu-user", "qemu-aarch64": "qemu-user", AARCH64.compiler: "g++-aarch64-linux-gnu"}
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: apt-get install {packages.get(program, program)})")


def core_sources(x86: bool) -> list[str]:
    """The sources of the library that know no torch, and the driver."""
    library = [s for s in _build.sources(cuda=False) if s != "csrc/library.cpp" and not s.startswith("csrc/ops/")]
    return [*(s for s in library if x86 or _build.isa_of(s) not in _build.X86_ISAS), DRIVER]


def ready_object(variant: Variant, source: str) -> str | None:
    """The object of a source where another build has made it, with the same flags."""
    is_product = Path(source).stem == "tile_product"
    if variant.mistake and not is_product:
        return ready_object(AMX, source) or str(folder_of(AMX) / object_of(source))
    is_other = variant.emulates_amx and (is_product or _build.isa_of(source) == "avx512")
    is_kernel = source.startswith("csrc/cpu/") and variant.is_library and not is_other
    return native.built_object(source) if is_kernel else None


def compiled_for_avx2(source: str) -> str | None:
    """The source of AVX2 that says the same as this one of AVX-512, but for names and the size of vectors."""
    twin = source.replace("_avx512.cpp", "_avx2.cpp")
    if twin == source or not (ROOT / twin).exists():
        return None
    text = (
        (ROOT / source)
        .read_text()
        .replace("avx512", "avx2")
        .replace("DSCONV_VECTOR_BYTES 64", "DSCONV_VECTOR_BYTES 32")
    )
    return twin if text == (ROOT / twin).read_text() else None


def compile_lines(variant: Variant, source: str) -> list[str]:
    """How to compile a source: the library's flags for its instruction set, then the variant's."""
    isa, path = _build.isa_of(source), ROOT / source
    is_block = path.name.startswith(("blocks_", "planes_avx", "grad_planes_avx", "narrow_planes_avx"))
    own = variant.flags if variant.block_flags is None or not is_block else variant.block_flags
    includes = [f"{ROOT}/tests/core/emulated"] if variant.emulates_amx else []
    includes += _build.INCLUDE_DIRS
    if variant.mistake:
        path = rewritten(path, folder_of(variant), re.escape(variant.mistake[0]), variant.mistake[1])
    elif variant.emulates_amx and (isa == "avx512" or path.name == "machine.cpp"):
        # takes AVX2's vectors for AVX-512's, and asks the processor for no more
        pattern = r'(?<=DSCONV_VECTOR_BYTES )64\b|(?<=cpu_supports\(")avx512\w+'
        path = rewritten(path, folder_of(variant), pattern, lambda found: "32" if found[0] == "64" else "avx2")
        isa = isa.replace("avx512", "avx2")
    flags = [*_build.CXX_FLAGS, "-DDSCONV_CUDA=0", f"-DDSCONV_X86={int(variant.x86)}", *(f"-I{i}" for i in includes)]
    flags += ["-pthread", *_build.ISA_FLAGS[isa], *own]
    return [f"build {object_of(source)}: compile {path}", f"  flags = {' '.join(flags)}"]


def ninja_lines(variant: Variant) -> list[str]:
    """What to build."""
    lines, objects = [f"cxx = {variant.compiler}", *RENAME], []
    for source in core_sources(variant.x86):
        ready, twin = ready_object(variant, source), compiled_for_avx2(source)
        objects.append(ready or object_of(source))
        if variant.emulates_amx and twin and not variant.mistake:
            lines.append(f"build {object_of(source)}: rename {ready_object(variant, twin) or object_of(twin)}")
        elif not ready:
            lines += compile_lines(variant, source)
    lines += [f"build driver: link {' '.join(objects)}", f"  flags = -pthread {' '.join(variant.link)}"]
    return lines


def rewritten(source: Path, folder: Path, pattern: str, by: str | Callable[[re.Match], str]) -> Path:
    """A copy of a source in which something else stands."""
    text = source.read_text()
    changed = re.sub(pattern, by, text)
    assert changed != text, source
    copy = folder / source.name
    folder.mkdir(parents=True, exist_ok=True)
    if not copy.exists() or copy.read_text() != changed:
        copy.write_text(changed)
    return copy


def object_of(source: str) -> str:
    return source.replace("/", "_") + ".o"


def folder_of(variant: Variant) -> Path:
    return ROOT / "build" / f"core-{variant.name}"


@functools.cache
def build(variant: Variant) -> Path:
    """The driver, compiled as far as its sources have changed."""
    if variant.mistake:
        build(AMX)
    folder = folder_of(variant)
    native.build(folder, ninja_lines(variant))
    return folder / "driver"


def drive(variant: Variant, *options: str, runner: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run the driver; stderr, where sanitizers write, is part of its output."""
    sanitizers = {"TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1"}
    environment = {**os.environ, **sanitizers}
    environment.pop("DSCONV_CPU_ISA", None)
    command = [*(runner or variant.runner), str(build(variant)), *options]
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800
    )


@functools.cache
def table(x86: bool) -> dict[str, str]:
    """The CPU rows as kernels.inc has them: name -> target."""
    text = (_build.CSRC / "kernels.inc").read_text()
    found = re.findall(r"^DSCONV_KERNEL\(\w+, (\w+), (\w+),", text, re.MULTILINE)
    return {name: target for name, target in found if target == "portable" or (x86 and target in TARGETS)}


def check_all_rows(done: subprocess.CompletedProcess, x86: bool, best: str | None = None) -> None:
    """Every row that the processor can run ran and was right, the others are named, and dispatch took the best ones."""
    assert done.returncode == 0, done.stdout[-6000:]
    processor = re.search(r"^processor: (\w+)$", done.stdout, re.MULTILINE)[1]
    assert best in (None, processor)
    able = TARGETS[: TARGETS.index(processor) + 1]
    lines = dict(re.findall(r"^(\w+) +((?:ok|skipped|FAILED).*)$", done.stdout, re.MULTILINE))
    expected = {name: "ok" if target in able else "skipped" for name, target in table(x86).items()}
    assert {name: line.partition(":")[0] for name, line in lines.items()} == expected
    chosen = {name: int(re.search(r"chosen (\d+)", line)[1]) for name, line in lines.items() if line.startswith("ok")}
    assert all(int(re.match(r"ok: (\d+) run", lines[name])[1]) > 0 for name in chosen)
    assert sum(count for name, count in chosen.items() if table(x86)[name] == processor) > 0


def check_noticed(done: subprocess.CompletedProcess, complaint: str) -> None:
    """The planted bug made the driver fail, for the right reason, with a line that names the row and the problem."""
    assert done.returncode != 0, done.stdout[-3000:]
    assert re.search(complaint, done.stdout), done.stdout[-3000:]
    assert re.search(r'^FAILED \w+: .*--row \w+ --problem "pass=.*"$', done.stdout, re.MULTILINE), done.stdout[-3000:]


def test_every_row():
    check_all_rows(drive(PLAIN, "--count", "60"), PLAIN.x86)


@pytest.mark.skipif(not PLAIN.x86, reason="emulates AMX on x86-64")
def test_every_row_with_amx():
    check_all_rows(drive(AMX, "--count", "60"), AMX.x86, "amx")


# A mistake in the use of tiles, and what the emulated processor or the judges must say of it.
TILE_MISTAKES = {
    "no-begin": ("configure_tiles(config);", "", "emulated AMX: a tile that is not configured"),
    "no-end": ("release_tiles();", "", "emulated AMX: configured again before it was released"),
    "no-clear": ("clear_tile<3>();", "", "got .*, expected"),
    "other-rows": ("multiply_tiles<2, 5, 6>", "multiply_tiles<2, 4, 6>", "got .*, expected"),
    "other-columns": ("b + kStepValues / 2", "b", "got .*, expected"),
    "exchanged": ("multiply_tiles<0, 4, 6>", "multiply_tiles<0, 6, 4>", "got .*, expected"),
    "short-step": ("a += kStep,", "a += kStep / 2,", "got .*, expected"),
}


@pytest.mark.skipif(not PLAIN.x86, reason="emulates AMX on x86-64")
@pytest.mark.parametrize("mistake", TILE_MISTAKES)
def test_a_wrong_use_of_tiles_is_noticed(mistake):
    there, instead, complaint = TILE_MISTAKES[mistake]
    variant = replace(AMX, name=f"amx-{mistake}", mistake=(there, instead))
    check_noticed(drive(variant, "--count", "12", "--target", "amx"), complaint)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_every_row_on_more_problems(seed):
    check_all_rows(drive(PLAIN, "--count", "400", "--seed", str(seed)), PLAIN.x86)


def test_a_failure_reruns_alone():
    """The printed line is the problem: alone it passes without the bug and fails with it."""
    done = drive(PLAIN, "--plant", "drop_product", "--pass", "separable_fwd")
    name, line = re.search(r'--row (\w+) --problem "(.*)"$', done.stdout, re.MULTILINE).groups()
    again = drive(PLAIN, "--row", name, "--problem", line)
    assert again.returncode == 0 and re.search(rf"^{name} +ok: 1 run", again.stdout, re.MULTILINE), again.stdout
    check_noticed(drive(PLAIN, "--row", name, "--problem", line, "--plant", "drop_product"), "expected")


def test_a_row_that_never_ran_is_a_failure():
    done = drive(PLAIN, "--pass", "mask", "--count", "0")
    assert done.returncode == 1 and "never ran" in done.stdout
    done = drive(PLAIN, "--row", "no_such_row")
    assert done.returncode == 1 and "no row is called that" in done.stdout


# A planted bug and what the driver must say of it. Every row commits it, and every row must be caught.
PLAIN_BUGS = {
    "write_behind": "wrote outside (output|grad_weight|grad_bias)",
    "write_before": "wrote outside (output|grad_weight|grad_bias)",
    "write_input": "changed an input",
    "workspace_behind": "wrote outside its workspace",
    "read_behind": "died",
    "skip_channel": "got -?nan, expected",
    "drop_product": "got .*, expected",
    "half_sums": r"got .*, expected .* \+- ",
    "count_threads": "has other bits with 2 threads",
    "order_of_slots": "has other bits with 4 slots in reverse order",
}


@pytest.mark.parametrize("bug", PLAIN_BUGS)
def test_a_planted_bug_is_noticed_in_every_row(bug):
    done = drive(PLAIN, "--count", "12", "--plant", bug)
    check_noticed(done, PLAIN_BUGS[bug])
    passed = re.findall(r"^(\w+) +ok", done.stdout, re.MULTILINE)
    blind = ("avx512bf16", "amx") if bug == "half_sums" else ()  # their results are bfloat16
    assert [name for name in passed if table(PLAIN.x86)[name] not in blind] == []


@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept under Linux only")
@pytest.mark.parametrize("sanitizers", ["thread", "address,undefined"])
def test_kept_memory(sanitizers):
    folder = ROOT / "build" / f"kept-memory-{sanitizers.partition(',')[0]}"
    includes = [f"-I{path}" for path in _build.INCLUDE_DIRS]
    flags = [*_build.CXX_FLAGS, *SANITIZED, f"-fsanitize={sanitizers}", "-pthread", *includes]
    sources = [ROOT / "csrc" / "ops" / "kept_memory.cpp", ROOT / "tests" / "core" / "kept_memory.cpp"]
    lines = [f"cxx = {PLAIN_COMPILER}", f"flags = {' '.join(flags)}"]
    for i, source in enumerate(sources):
        lines.append(f"build {i}.o: compile {source}")
    native.build(folder, [*lines, "build program: link 0.o 1.o"])
    environment = {**os.environ, "DSCONV_CPU_CACHE": "1"}
    done = subprocess.run([folder / "program"], env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "wrong: 0\n"), done.stderr[-4000:]


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers():
    check_all_rows(drive(ADDRESS, "--count", "60"), ADDRESS.x86)


@pytest.mark.slow
@pytest.mark.skipif(not PLAIN.x86, reason="emulates AMX on x86-64")
def test_sanitizers_with_amx():
    check_all_rows(drive(AMX_ADDRESS, "--count", "60"), AMX_ADDRESS.x86, "amx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bug", "complaint"),
    [
        ("read_behind", "ERROR: AddressSanitizer: .*\n(.*\n)*READ of size 1"),
        ("write_behind", "ERROR: AddressSanitizer: .*\n(.*\n)*WRITE of size"),
        ("workspace_behind", "ERROR: AddressSanitizer: .*\n(.*\n)*WRITE of size 1"),
        ("overflow", "runtime error: signed integer overflow"),
    ],
)
def test_a_planted_bug_is_noticed_by_the_sanitizers(bug, complaint):
    check_noticed(drive(ADDRESS, "--count", "2", "--plant", bug), complaint)


@pytest.mark.slow
def test_thread_sanitizer():
    check_all_rows(drive(THREAD, "--count", "50"), THREAD.x86)


@pytest.mark.slow
def test_a_planted_race_is_noticed():
    check_noticed(drive(THREAD, "--count", "2", "--plant", "race"), "WARNING: ThreadSanitizer: data race")


# A processor with AVX2 and one without AVX: dispatch must find out by itself, and no wider instruction may run.
PROCESSORS = {"Haswell": "avx2", "Nehalem": "portable"}


@pytest.mark.slow
@pytest.mark.skipif(not PLAIN.x86, reason="emulates other x86-64 processors")
@pytest.mark.parametrize("cpu", PROCESSORS)
def test_on_an_older_processor(cpu):
    need("qemu-x86_64")
    runner = ("qemu-x86_64", "-cpu", cpu)
    check_all_rows(drive(PLAIN, "--count", "15", runner=runner), PLAIN.x86, PROCESSORS[cpu])
    # The emulator does refuse what such a processor refuses.
    check_noticed(drive(PLAIN, "--count", "1", "--plant", "wide_instruction", runner=runner), "died")


@pytest.mark.slow
def test_on_aarch64():
    need(AARCH64.compiler, *AARCH64.runner)
    check_all_rows(drive(AARCH64, "--count", "15"), AARCH64.x86, "portable")
    check_noticed(drive(AARCH64, "--count", "12", "--plant", "half_sums"), "expected")
