"""The CUDA kernels, run on the CPU thread by thread: numbers, races, accesses, traffic. See ``tests/simt/simt.h``.

``tests/simt/driver.cpp`` is compiled with csrc/cuda by g++ in three ways. A failure prints a line that reruns alone:
``echo "ROW LINE" | build/simt-plain/driver``.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import re
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import native
from cases import Deck
from conftest import ROOT
from dsconv_ext import _build

# What runs on the device; device.cu asks the hardware and stays out.
KERNELS = [s for s in _build.sources(cuda=True) if s.endswith(".cu") and s != "csrc/cuda/device.cu"]
KERNELS += ["tests/simt/plants.cu", "tests/simt/matrix_plants.cu", "tests/simt/primitives.cu"]
HARNESS = [*(f"tests/simt/{name}.cpp" for name in ("simt", "matrix", "trace", "driver")), "csrc/choose.cpp"]


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


def ninja_lines(variant: Variant) -> list[str]:
    common = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DDSCONV_CUDA=1"]
    common += [f"-DDSCONV_X86={int(_build.IS_X86)}", "-ffp-contract=off", *variant.flags]
    folders = [ROOT / "tests/simt/stand_in", ROOT / "tests", ROOT / "tests/core", ROOT / "csrc"]
    common += [*(f"-I{folder}" for folder in folders), f"-isystem {cuda_include()}"]
    common += [SANITIZE] * (variant is SANITIZED)
    lines, objects = [f"cxx = {os.environ.get('CXX', 'g++')}"], []
    for source in [*HARNESS, *KERNELS]:
        kernel = ["-include simt/device.h", "-x c++", *variant.kernel_flags] if source.endswith(".cu") else []
        objects.append(source.replace("/", "_") + ".o")
        lines += [f"build {objects[-1]}: compile {ROOT / source}", f"  flags = {' '.join([*common, *kernel])}"]
    # The reference rows and the other CPU kernels of the table are the library's own objects.
    library = [s for s in _build.sources(cuda=False) if s.startswith("csrc/cpu/") or s == "csrc/machine.cpp"]
    objects += map(native.built_object, library)
    link = SANITIZE if variant is SANITIZED else ""
    lines += [f"build driver: link {' '.join(objects)}", f"  flags = {link}"]
    return lines


@functools.cache
def build(variant: Variant) -> Path:
    folder = ROOT / "build" / f"simt-{variant.name}"
    native.build(folder, ninja_lines(variant))
    return folder / "driver"


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
    "out_of_bounds": {"plain": "", "traced": "reads outside every buffer", "sanitized": "use-after-poison"},
    "shared_out_of_bounds": {"plain": "", "traced": "writes outside every buffer", "sanitized": "use-after-poison"},
    "missing_barrier": {"plain": "values are wrong", "traced": "race in shared memory", "sanitized": ""},
    "divergent_barrier": {v.name: r"divergent barrier: .*plants.cu:\d+.*plants.cu:\d+" for v in VARIANTS},
    "early_exit": {v.name: r"divergent barrier: .*plants.cu:\d+.*has ended" for v in VARIANTS},
    "divergent_shuffle": {v.name: r"divergent barrier: .*exchange of plants.cu:\d+, .*has ended" for v in VARIANTS},
    "forgotten_wait": {v.name: "copies that it never waited for" for v in VARIANTS},
    "plain_add": {"plain": "", "traced": "race in global memory", "sanitized": ""},
    "misaligned": {"plain": "", "traced": "misaligned access of 16", "sanitized": "misaligned address"},
    # Of mma, ldmatrix and groups of copies, whose host bodies report what they do in every build.
    "swapped_fragments": {v.name: "values are wrong" for v in VARIANTS},
    "no_group_wait": {v.name: "(?s)copies that it never waited for.*values are wrong" for v in VARIANTS},
    "wrong_group": {v.name: "(?s)copies that it never waited for.*values are wrong" for v in VARIANTS},
    "early_refill": {v.name: "race in shared memory: writes what is read" for v in VARIANTS},
    "divergent_mma": {v.name: r"divergent barrier: .*exchange of matrix_plants.cu:\d+" for v in VARIANTS},
    "misaligned_row": {v.name: "loads a matrix row from a misaligned address" for v in VARIANTS},
    "no_warp_barrier": {"plain": "", "traced": "race in shared memory: reads what is written", "sanitized": ""},
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


def test_the_kernels_without_a_bug_pass():
    for variant in VARIANTS:
        for name in ("none", "product"):
            done = drive(variant, "--plant", name)
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


def test_bank_conflicts_of_matrix_rows_are_counted():
    """Of four chunks, each: a by 32 copies of 16 bytes and by ldmatrix x4 of two warps; b by 16 stores and x2 of each.
    Eight rows to each bank cost eight times as much where a is written and read."""
    of_a, of_b = 4 * (4 + 2 * 4), 4 * (2 * 2 + 2 * 2)
    assert counted("product")[2:] == [of_a + of_b] * 2
    assert counted("conflicting_rows")[2:] == [8 * of_a + of_b, of_a + of_b]


def table() -> list[str]:
    """The forward CUDA rows of kernels.inc."""
    text = (_build.CSRC / "kernels.inc").read_text()
    return re.findall(r"^DSCONV_KERNEL\(depthwise_fwd, (\w+), cuda,", text, re.MULTILINE)


ROWS = table()
# And the twin of the general row with offsets of 64 bits, which is launched for tensors that no test could hold.
WIDE = "depthwise_fwd_direct_wide_cuda"
HALVES = ("float16", "bfloat16")


def line(channels_last: bool, window: list[tuple[int, ...]], **fields) -> str:
    """A problem as ``tests/core`` reads it. ``window``: size, taps, stride, dilation, low and high padding of each
    spatial dimension, at most three."""
    window = [(1, 1, 1, 1, 0, 0)] * (3 - len(window)) + window
    names = ("in", "taps", "stride", "dilation", "pad")
    sizes = {name: "x".join(str(dim[i]) for dim in window) for i, name in enumerate(names)}
    out = [(n + low + high - d * (k - 1) - 1) // s + 1 for n, k, s, d, low, high in window]
    layout = "channels_last" if channels_last else "contiguous"
    sizes |= {"out": "x".join(map(str, out)), "x": layout, "output": layout}
    return " ".join(f"{name}={value}" for name, value in {"pass": "depthwise_fwd", **sizes, **fields}.items())


def problems(row: str, count: int) -> list[str]:
    """Problems that ``row`` must run: sizes at the edges of its blocks, every dtype, padding of both sides."""
    rng = random.Random(zlib.crc32(row.encode()))
    deck = functools.partial(Deck, rng)
    general, narrow = "direct" in row, "narrow" in row or "nchw" in row
    taps, stride = ("any", "") if general else re.search(r"_k(\d+|any)s(\d)", row).groups()
    dtypes = deck(("float32", *HALVES, *(("float64",) if general else ())))
    sizes, downs = deck((1, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33)), deck((1, 2, 3, 5, 7, 8, 9, 11))
    widths = deck((1, 2, 4, 6, 8, 9, 16, 17, 31) if taps == "any" else (int(taps),))
    square = "nchw" in row and taps != "any"  # and undilated
    heights = deck((1, 3, 5) if taps == "any" else (int(taps),) if square else (1, 3, 5, 7))
    dilations = deck((1, 1, 2, 3) if stride != "2" and not square else (1,))
    data, batches = deck(("integers", "reals", "nonfinite")), deck((1, 1, 2, 3))
    kinds = {"integers": deck(("none", "relu", "relu6")), "nonfinite": deck(("none", "relu"))}
    kinds["reals"] = deck(("none", "relu6", "hardswish", "silu", "gelu", "leaky_relu:0.5", "tanh", "elu:0.5"))
    found = []
    while len(found) < count:
        dtype = dtypes.deal()
        vector = 1 if narrow or general else 4 if dtype == "float32" else 8
        channels = vector * rng.choice((1, 2, 7, 8, 9) if vector > 1 else (1, 3, 7, 31, 32, 33))
        window = []
        for size, tap in ((downs.deal(), heights.deal()), (sizes.deal(), widths.deal())):
            step = int(stride) if stride else rng.choice((1, 2, 3))
            dilation = dilations.deal()
            reach = dilation * (tap - 1)
            low, high = rng.choice(((reach // 2, reach - reach // 2), (reach, 0), (0, reach), (reach + 2, 1)))
            window.append((max(size, 1), tap, step, dilation, low, high))
        depth = [(3, 2, 1, 1, 1, 0)] if general and rng.random() < 0.3 else []
        kind = data.deal()
        found.append(
            line(
                "nhwc" in row or (general and rng.random() < 0.5),
                [*depth, *window],
                dtype=dtype,
                data=kind,
                seed=rng.randint(1, 999),
                n=batches.deal(),
                c=channels,
                m=rng.choice((1, 2, 3)) if general else 1,
                act=kinds[kind].deal(),
                has_bias=rng.randint(0, 1),
                wild=rng.randint(0, 1) if channels > 1 else 0,
                offset=rng.choice((0, 1, 3)) if narrow or general else 0,
            )
        )
    return found


def check_row(variant: Variant, row: str, count: int) -> None:
    """Three orders of threads, integers exactly and reals within the bound of their sums, nothing else touched."""
    wanted = problems(row, count)
    done = drive(variant, lines=[f"{row} {problem}" for problem in wanted])
    answers = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout[-3000:]
    assert len(answers) == count and all(a.startswith(f"ok {row} ") for a in answers), done.stdout[-3000:]
    if variant is TRACED:  # every output once, and nothing else
        for answer in answers:
            counts = json.loads(answer[answer.index("{") :])
            assert counts["bytes_written"] == counts["distinct_bytes_written"] == counts["output_bytes"], answer


COUNTS = {"plain": (12, 150), "traced": (4, 40), "sanitized": (4, 40)}


def row_tests(rows: list[str], check: Callable[[Variant, str, int], None]) -> tuple[Callable, Callable]:
    """Tests of every row in every variant: on few problems, and on many."""

    @pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
    @pytest.mark.parametrize("row", rows)
    def on_few(row, variant):
        check(variant, row, COUNTS[variant.name][0])

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
    @pytest.mark.parametrize("row", rows)
    def on_many(row, variant):
        check(variant, row, COUNTS[variant.name][1])

    return on_few, on_many


test_every_row, test_every_row_on_more_problems = row_tests([*ROWS, WIDE], check_row)


@pytest.mark.parametrize(
    ("size", "stride", "kernel"),
    [
        ((1 << 15, (1 << 15) - 1), 1, "depthwise_direct"),
        ((1 << 15, (1 << 15) + 1), 1, "depthwise_direct_wide"),  # offsets of the input and the output
        ((1 << 15, (1 << 15) + 1), 4, "depthwise_direct_wide"),  # of the input alone
        ((1, (1 << 30) - 100), 1, "depthwise_direct"),
        ((1, (1 << 30) - 2), 1, "depthwise_direct_wide"),  # columns behind the last one
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_offsets_that_fit_32_bits(size, stride, kernel, channels_last):
    window = [(n, 1, min(n, stride), 1, 0, 0) for n in size]
    done = drive(
        PLAIN, "--dry", lines=[f"depthwise_fwd_direct_cuda {line(channels_last, window, dtype='float32', c=1)}"]
    )
    assert done.stdout.split() == [kernel], done.stdout


def centred(size: tuple[int, int], taps: tuple[int, int], stride: int = 1, dilation: int = 1) -> list[tuple[int, ...]]:
    """Windows padded alike on both sides."""
    dims = [(n, k, dilation * (k - 1) // 2) for n, k in zip(size, taps, strict=True)]
    return [(n, k, min(n, stride), dilation, pad, pad) for n, k, pad in dims]


def traffic(row: str, dtype: str, channels: int, window: list[tuple[int, ...]]) -> dict:
    """What the row moves for a layer that fills any GPU: it is cut as on one multiprocessor."""
    problem = line("nhwc" in row, window, dtype=dtype, n=1, c=channels)
    done = drive(TRACED, "--gpu", "1", lines=[f"{row} {problem}"])
    assert done.returncode == 0 and done.stdout.startswith("ok "), done.stdout
    return json.loads(done.stdout[done.stdout.index("{") :])


# Sectors that blocks move, each once per block, over input + output + weights: a block of h x w outputs reads
# (s(h - 1) + k)(s(w - 1) + k) inputs and its slab's weights, and tiles are as large as these limits ask for: 1.35 for
# 3x3, 1.9 for 7x7, 1.15 for 1D.
LIMITS = {1: 1.15, 3: 1.35, 5: 1.9, 7: 1.9}
TRAFFIC = [("nhwc_wide", (n, n), (k, k), s, 1) for k in (3, 5, 7) for s in (1, 2) for n in (28, 56)]
TRAFFIC += [("nhwc_wide", (n, n), (k, k), 1, d) for k in (3, 5, 7) for d in (2, 3) for n in (28, 56)]
TRAFFIC += [("nchw", (n, n), (k, k), s, 1) for k in (3, 5, 7) for s in (1, 2) for n in (7, 9, 14, 28, 56, 112)]
TRAFFIC += [("nchw", size, (k, k), s, 1) for k in (3, 7) for s in (1, 2) for size in ((13, 17), (10, 300))]
TRAFFIC += [(name, (1, 768), (1, k), 1, 1) for name in ("nhwc_wide", "nchw") for k in (4, 31)]
TRAFFIC += [("nhwc_wide", (1, 768), (1, 15), 1, d) for d in (2, 3, 16)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("name", "size", "taps", "stride", "dilation"), TRAFFIC)
def test_traffic(name, size, taps, stride, dilation, dtype):
    wide, one_dimensional = "wide" in name, taps[0] == 1
    channels = (32 if dtype == "float32" else 64) if wide else 8 if min(size) > 14 or one_dimensional else 64
    row = f"depthwise_fwd_{name}_k{'any' if one_dimensional else taps[1]}s{stride}_cuda"
    counts = traffic(row, dtype, channels, centred(size, taps, stride, dilation))
    least = counts["input_bytes"] + counts["output_bytes"]
    assert 32 * (counts["sectors_read"] + counts["sectors_written"]) <= LIMITS[taps[0]] * least, counts
    assert counts["bytes_written"] == counts["distinct_bytes_written"] == counts["output_bytes"], counts
    # Maps of 4x4 outputs are stored with gaps, which cut sectors.
    if wide or -(-size[1] // stride) > 4:
        asked = counts["bytes_read"] + counts["bytes_written"]
        assert asked >= 0.9 * 32 * counts["sectors_requested"], counts
    # channels_last: 16 bytes of channels. Contiguous: 4 columns at once, at any width.
    assert counts["largest_access"] == (16 if wide else 4 * (4 if dtype == "float32" else 2)), counts
    assert counts["wavefronts"] <= 1.05 * counts["fewest_wavefronts"], counts


# Contiguous, windows that are no undilated square: planes, window, limit of the sectors moved.
PLANES = {14: 64, 28: 8, 33: 8, 56: 2, 112: 1}
ANY = [(PLANES[n], centred((n, n), (3, 3), 1, d), 1.35) for d in (2, 3) for n in PLANES]
ANY += [(PLANES[n], centred((n, n), taps), 1.35) for taps in ((3, 1), (1, 3), (5, 3)) for n in (28, 33, 112)]
ANY += [(min(2, PLANES[n]), centred((n, n), (k, k)), 1.9) for k in (9, 11) for n in (28, 33, 112)]
ANY += [(PLANES[n], centred((n, n), (5, 3), 2), 1.35) for n in (28, 33, 56)] + [(2, centred((28, 28), (9, 9), 2), 1.9)]
ROW = (1, 1, 1, 1, 0, 0)
ANY += [(c, [ROW, (n, k, 1, 1, k // 2, k // 2)], 1.15) for c, n in ((16, 131), (2, 768)) for k in (15, 31)]
ANY += [(2, [ROW, (768, 31, 1, 1, 30, 0)], 1.15), (4, [ROW, (768, 15, 2, 1, 7, 7)], 1.15)]
ANY += [(2, [ROW, (768, 3, 1, d, d, d)], 1.15) for d in (2, 3, 4, 5, 6, 16)]
ANY += [(16, [ROW, (100, 3, 1, d, d, d)], 1.15) for d in (3, 6)] + [(2, [ROW, (500, 15, 1, 3, 21, 21)], 1.15)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("planes", "window", "limit"), ANY)
def test_traffic_of_any_window(planes, window, limit, dtype):
    counts = traffic(f"depthwise_fwd_nchw_kanys{window[1][2]}_cuda", dtype, planes, window)
    least = counts["input_bytes"] + counts["output_bytes"]
    assert 32 * (counts["sectors_read"] + counts["sectors_written"]) <= limit * least, counts
    assert counts["bytes_written"] == counts["distinct_bytes_written"] == counts["output_bytes"], counts
    # Planes of other sizes begin and end within sectors and vectors.
    share = 0.9 if window[0][0] * window[1][0] % 4 == 0 else 0.8
    assert counts["bytes_read"] + counts["bytes_written"] >= share * 32 * counts["sectors_requested"], counts
    assert counts["largest_access"] == 4 * (4 if dtype == "float32" else 2), counts
    assert counts["wavefronts"] <= 1.05 * counts["fewest_wavefronts"], counts


def choices(*options: str, lines: list[str] | None = None) -> list[list[str]]:
    """GPU, row, blocks and problem of every choice; each was legal, and its launch one that CUDA takes."""
    done = drive(PLAIN, *options, lines=lines)
    assert done.returncode == 0, "\n".join(a for a in done.stdout.splitlines() if not a.startswith("ok"))[:3000]
    found = [a.split(";")[1:] for a in done.stdout.splitlines()]
    assert {gpu for gpu, *_ in found} == {"T4", "A100", "A10", "L4", "H100", "B200", "RTX 5090"}
    return found


def check_choices(count: int, seed: int) -> set[str]:
    """Every problem of ``count`` has a legal row on every GPU; the rows that were chosen."""
    found = choices("--choose-random", "depthwise_fwd", str(count), str(seed))
    assert len(found) == 7 * count
    return {row for _, row, *_ in found}


def test_choices():
    assert len(check_choices(400, 1)) >= 8


@pytest.mark.slow
def test_more_choices():
    """Among thousands of problems every row is the best of some."""
    assert check_choices(6000, 2) == set(ROWS)


def test_small_maps_at_batch_1_fill_a_gpu():
    """The depthwise layers of EfficientNet-B0 from 14x14 down, channels_last, one image: a block per multiprocessor."""
    layers = [(480, 14, 3), (480, 14, 5), (672, 14, 5), (1152, 7, 5), (1152, 7, 3)]
    lines = [line(True, [(n, k, 1, 1, k // 2, k // 2)] * 2, dtype="float16", n=1, c=c) for c, n, k in layers]
    lines += [line(False, [(n, k, 1, 1, k // 2, k // 2)] * 2, dtype="float16", n=1, c=c) for c, n, k in layers]
    for gpu, row, blocks, problem in choices("--choose", lines=lines):
        if gpu == "H100":
            assert int(blocks) >= 132, (row, blocks, problem)


@pytest.mark.parametrize("row", [r for r in ROWS if "direct" not in r])
def test_what_a_row_cannot_run_it_refuses_in_words(row):
    window = [(9, 3, 1, 1, 1, 1)] * 2
    refused = {
        "float64": line("nhwc" in row, window, dtype="float64", c=8),
        "multiplier": line("nhwc" in row, window, dtype="float32", c=8, m=2),
        "three spatial": line("nhwc" in row, [*window, window[0]], dtype="float32", c=8),
        "stride": line("nhwc" in row, [(9, 3, 3, 1, 1, 1)] * 2, dtype="float32", c=8),
    }
    done = drive(PLAIN, lines=[f"{row} {problem}" for problem in refused.values()])
    answers = done.stdout.splitlines()
    assert len(answers) == len(refused)
    for word, answer in zip(refused, answers, strict=True):
        assert answer.startswith(f"refused {row}: ") and (word in answer or "taps" in answer), answer
