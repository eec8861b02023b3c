"""The fused CUDA kernels in the harness of ``tests/test_simt.py``: numbers, races, accesses, traffic, banks."""

from __future__ import annotations

import functools
import json
import math
import random
import re
import zlib

import pytest

from cases import Deck
from dsconv_ext import _build
from test_simt import HALVES, PLAIN, TRACED, Variant, choices, drive, line, row_tests


def table() -> list[str]:
    """The fused CUDA rows of kernels.inc."""
    text = (_build.CSRC / "kernels.inc").read_text()
    return re.findall(r"^DSCONV_KERNEL\(separable_fwd, (\w+), cuda,", text, re.MULTILINE)


ROWS = table()
# Around 16-byte units, chunks of channels, tiles of outputs; and those of real layers.
CHANNELS = (1, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 64, 96, 100)
OUTPUTS = (1, 5, 8, 16, 24, 40, 63, 64, 65, 96, 100, 129)
TILES = (65, 72, 100, 128, 129, 200, 320, 728)  # of outputs: more than one
LARGE = (320, 728)
# float32 tensors whose product is rounded for tensor cores.
TF32 = "float32 tf32=1"


def parts_of(row: str) -> tuple[bool, int | None, int | None]:
    """channels_last, taps along a row and stride of a row; None where it takes any."""
    layout, taps, stride = re.search(r"_(nhwc|nchw)_k(\d+|any)(?:s(\d))?_cuda", row).groups()
    return layout == "nhwc", None if taps == "any" else int(taps), int(stride) if stride else None


def is_resident(row: str) -> bool:
    """Whether a block keeps the depthwise values of all channels, for several tiles of outputs."""
    return "_resident_" in row


def separable(channels_last: bool, window: list[tuple[int, ...]], **fields) -> str:
    layout = "channels_last" if channels_last else "contiguous"
    return line(channels_last, window, **{"pass": "separable_fwd", "residual": layout, **fields})


def problems(row: str, count: int) -> list[str]:
    """Problems that ``row`` must run: sizes around its tiles and chunks, every dtype, padding of both sides."""
    rng = random.Random(zlib.crc32(row.encode()))
    deck = functools.partial(Deck, rng)
    channels_last, taps, stride = parts_of(row)
    dtypes, data = deck(("float32", TF32, *HALVES)), deck(("integers", "reals", "nonfinite"))
    channels, outputs = deck(CHANNELS), deck(TILES if is_resident(row) else OUTPUTS)
    sizes = deck((1, 3, 7, 8, 9, 15, 16, 17, 23, 33))
    widths, heights = deck((taps,) if taps else (1, 2, 3, 4, 7)), deck((1, taps) if taps else (1, 3, 5))
    strides, dilations = deck((stride,) if stride else (1, 2, 3)), deck((1,) if taps else (1, 1, 2, 3))
    exact = {"integers": ("none", "relu", "relu6"), "nonfinite": ("none", "relu")}
    smooth = ("none", "relu6", "hardswish", "silu", "gelu", "leaky_relu:0.5", "tanh", "elu:0.5", "sigmoid")
    found = []
    while len(found) < count:
        window = []
        step = strides.deal()
        for size, tap in ((sizes.deal(), heights.deal()), (sizes.deal(), widths.deal())):
            dilation = dilations.deal()
            reach = dilation * (tap - 1)
            low, high = rng.choice(((reach // 2, reach - reach // 2), (reach, 0), (0, reach), (reach + 2, 1)))
            window.append((size, tap, step, dilation, low, high))
        dtype = dtypes.deal()
        kind = data.deal()
        acts = exact.get(kind, smooth)
        # A tenth of the problems has as many channels as a deep layer, few pixels and few outputs.
        deep = len(found) % 10 == 9
        if deep:
            window = [(8, *dim[1:]) for dim in window]
        found.append(
            separable(
                channels_last,
                window,
                dtype=dtype,
                data=kind,
                seed=rng.randint(1, 999),
                n=rng.choice((1, 1, 2)),
                c=rng.choice(LARGE if dtype in HALVES else LARGE[:1]) if deep else channels.deal(),
                k=outputs.deal(),
                m=1 if deep else rng.choice((1, 1, 2, 3)),
                mid=rng.choice(acts),
                act=rng.choice(acts),
                has_bias=rng.randint(0, 1),
                has_pointwise_bias=rng.randint(0, 1),
                has_residual=rng.randint(0, 1),
                offset=rng.choice((0, 0, 1, 3)),
            )
        )
    return found


def answers_of(variant: Variant, lines: list[str], *options: str) -> list[dict[str, int]]:
    """Every line ran and was right; what was counted."""
    done = drive(variant, *options, lines=lines)
    answers = done.stdout.splitlines()
    good = done.returncode == 0 and len(answers) == len(lines) and all(a.startswith("ok ") for a in answers)
    assert good, "\n".join(a for a in answers if not a.startswith("ok "))[:3000]
    return [json.loads(answer[answer.index("{") :]) for answer in answers]


def check_row(variant: Variant, row: str, count: int) -> None:
    """Cut as on a large GPU and as large layers are cut: integers exactly, reals within the bound of their sums."""
    lines = [f"{row} {problem}" for problem in problems(row, count)]
    for gpu, part in (("132", lines[::2]), ("1", lines[1::2])):
        for counts in answers_of(variant, part, "--gpu", gpu):
            if variant is TRACED:  # every output once, and nothing else: the depthwise map stays on the chip
                assert counts["bytes_written"] == counts["distinct_bytes_written"] == counts["output_bytes"], counts


test_every_row, test_every_row_on_more_problems = row_tests(ROWS, check_row)


def check_choices(count: int, seed: int) -> set[str]:
    """Every choice among ``count`` problems is legal on every GPU; the rows that were chosen."""
    found = choices("--choose-random", "separable_fwd", str(count), str(seed))
    assert len(found) == 7 * count
    assert not any(row != "-" and gpu == "T4" and "dtype=bfloat16" in problem for gpu, row, _, problem in found)
    return {row for _, row, *_ in found} - {"-"}


def test_choices():
    assert len(check_choices(400, 1)) >= 6


@pytest.mark.slow
def test_more_choices():
    """Among thousands of problems every row is the best of some."""
    assert check_choices(6000, 2) == set(ROWS)


def layer(batch: int, channels: int, outputs: int, size: int, taps: int, dtype: str) -> str:
    window = [(size, taps, 1, 1, taps // 2, taps // 2)] * 2
    return separable(True, window, dtype=dtype, n=batch, c=channels, k=outputs, has_residual=0)


def chosen(*of_layer) -> dict[str, tuple[str, int]]:
    """Of each GPU: the dataflow, or - for two passes, and the blocks."""
    found = choices("--choose", lines=[layer(*of_layer)])
    return {gpu: (row.split("_")[2] if "_" in row else row, int(blocks)) for gpu, row, blocks, _ in found}


def test_the_dataflow_follows_the_layer():
    """Few outputs: accumulators, whose depthwise values nobody computes twice. Many, of wide filters: all depthwise
    values stay in shared memory. A product that dwarfs the rest: two passes."""
    assert {flow for flow, _ in chosen(32, 32, 64, 112, 3, "float16").values()} == {"fused"}
    assert {flow for flow, _ in chosen(32, 96, 384, 56, 7, "float16").values()} == {"resident"}
    assert {flow for flow, _ in chosen(32, 1024, 1024, 7, 3, "float16").values()} == {"-"}


def test_small_maps_are_split():
    """One image reaches more multiprocessors by smaller tiles of pixels, and by blocks for parts of the outputs, which
    compute the depthwise values anew."""
    row, of_layer = "separable_fwd_fused_nhwc_k3s1_cuda", layer(1, 64, 256, 14, 3, "float16")
    alone, many = (answers_of(PLAIN, [f"{row} {of_layer}"], "--gpu", gpu)[0]["blocks"] for gpu in ("1", "132"))
    assert alone == 2 * 2 and many >= 7 * 4


def count(row: str, size: tuple[int, int], channels: int, outputs: int, dtype: str) -> dict[str, int]:
    """What the row moves for a layer that fills any GPU: it is cut as on one multiprocessor."""
    channels_last, taps, stride = parts_of(row)
    window = [(n, min(taps, n), stride, 1, min(taps, n) // 2, min(taps, n) // 2) for n in size]
    problem = separable(channels_last, window, dtype=dtype, data="reals", c=channels, k=outputs, has_residual=0)
    return answers_of(TRACED, [f"{row} {problem}"], "--gpu", "1")[0]


def tiles_and_reads(size: int, tile: int, taps: int) -> tuple[int, int]:
    """Tiles along a dimension of stride 1 and the positions that they read together."""
    low = [max(0, first - taps // 2) for first in range(0, size, tile)]
    high = [min(size, first + tile + taps // 2) for first in range(0, size, tile)]
    return len(low), sum(b - a for a, b in zip(low, high, strict=True))


# Tiles of rows x columns of pixels x outputs; the inputs that they read over those of the map; outputs of a block.
TRAFFIC = [
    *(
        (dtype, *case)
        for dtype in ("float16", TF32, "float32")
        for case in (
            ("fused_nhwc_k3s1", (56, 56), (16, 8, 128), 128, 1.4, 128),
            ("fused_nhwc_k3s1", (28, 28), (16, 8, 64), 64, 1.4, 64),
            ("fused_nhwc_k3s1", (16, 32), (16, 8, 128), 256, 1.4, 128),
            ("fused_nhwc_k3s1", (32, 32), (16, 8, 64), 64, 1.4, 64),
            ("fused_nhwc_k5s1", (16, 16), (16, 8, 64), 64, 1.4, 64),
            ("fused_nhwc_k3s1", (1, 300), (1, 128, 64), 64, 1.1, 64),
        )
    ),
    *((dtype, "resident_nhwc_k3s1", (16, 32), (16, 8, 128), 256, 1.4, 256) for dtype in ("float16", TF32)),
    ("float32", "resident_nhwc_k3s1", (32, 32), (16, 8, 64), 256, 1.4, 256),
    *((dtype, "fused_nchw_k3s1", (16, 32), (8, 16, 128), 128, 1.4, 128) for dtype in (TF32, "float32")),
    ("float16", "fused_nchw_k3s1", (16, 32), (4, 32, 128), 128, 1.4, 128),
    ("float16", "resident_nchw_k3s1", (16, 32), (4, 32, 128), 256, 1.4, 256),
]


@pytest.mark.parametrize(("dtype", "name", "size", "tile", "outputs", "halo", "of_block"), TRAFFIC)
def test_traffic(dtype, name, size, tile, outputs, halo, of_block):
    """Inputs of the tile and its halo once per block, weights once per tile of pixels, every output once: a block of a
    resident row has all outputs, and reads inputs once."""
    itemsize = 2 if dtype == "float16" else 4
    channels = 256 // itemsize  # four chunks
    row = f"separable_fwd_{name}_cuda"
    counts = count(row, size, channels, outputs, dtype)
    splits = -(-outputs // of_block)
    taps = [min(parts_of(row)[1], n) for n in size]
    (down, rows), (across, columns) = map(tiles_and_reads, size, tile[:2], taps)
    assert counts["blocks"] == down * across * splits
    assert rows * columns <= halo * math.prod(size)
    inputs = splits * rows * columns * channels * itemsize
    weights = down * across * channels * (outputs + splits * math.prod(taps)) * itemsize
    assert 32 * counts["sectors_written"] == counts["bytes_written"] == counts["output_bytes"]
    # Rows of a contiguous map start and end within sectors.
    assert inputs + weights <= 32 * counts["sectors_read"] <= (1.0 if "nhwc" in name else 1.5) * inputs + weights
    assert counts["wavefronts"] <= 1.1 * counts["fewest_wavefronts"], counts
    assert counts["largest_access"] == 16


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ["fused_nhwc_k3s1", "fused_nchw_k3s1", "resident_nhwc_k3s1"])
def test_warps_without_a_pixel_do_nothing(name, dtype):
    """The second of two tiles has pixels for one warp of four: they read 5 eighths of what two whole tiles read from
    shared memory, but for what all threads copy."""
    row, outputs = f"separable_fwd_{name}_cuda", 256 if "resident" in name else 64
    part, whole = (count(row, size, 64, outputs, dtype) for size in ((9, 16), (16, 16)))
    assert part["blocks"] == whole["blocks"] == 2
    assert part["wavefronts"] <= 0.65 * whole["wavefronts"]


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_cannot_run_it_refuses_in_words(row):
    channels_last, taps, stride = parts_of(row)
    dim = (9, taps or 3, stride or 1, 1, 1, 1)
    fields = {"dtype": "float32", "c": 8, "k": 72}
    refused = {
        "float64": separable(channels_last, [dim, dim], **{**fields, "dtype": "float64"}),
        "three spatial": separable(channels_last, [dim, dim, dim], **fields),
        "shared memory": separable(channels_last, [(4000, dim[1], dim[2], 400, 400, 400), dim], **fields),
    }
    if taps:
        refused |= {
            "taps": separable(channels_last, [dim, (9, taps + 1, *dim[2:])], **fields),
            "stride": separable(channels_last, [dim, (9, taps, 3, 1, 1, 1)], **fields),
            "dilated": separable(channels_last, [dim, (99, taps, dim[2], 2, 1, 1)], **fields),
        }
    if is_resident(row):
        refused["one tile"] = separable(channels_last, [dim, dim], **{**fields, "k": 32})
    if channels_last:
        refused["channels_last"] = separable(False, [dim, dim], **fields)
    done = drive(PLAIN, lines=[f"{row} {problem}" for problem in refused.values()])
    answers = done.stdout.splitlines()
    assert len(answers) == len(refused)
    for word, answer in zip(refused, answers, strict=True):
        assert answer.startswith(f"refused {row}: ") and word in answer, answer
