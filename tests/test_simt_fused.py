"""The fused CUDA kernels in the harness of ``tests/test_simt.py``: numbers, races, accesses, traffic, bank conflicts."""

from __future__ import annotations

import functools
import json
import random
import re
import zlib

import pytest

from cases import Deck
from dsconv_ext import _build
from test_simt import HALVES, PLAIN, TRACED, VARIANTS, Variant, drive, line


def table() -> list[str]:
    """The fused CUDA rows of kernels.inc."""
    text = (_build.CSRC / "kernels.inc").read_text()
    return re.findall(r"^DSCONV_KERNEL\(separable_fwd, (\w+), cuda,", text, re.MULTILINE)


ROWS = table()
# Around 16-byte units, chunks of channels, tiles of outputs; and those of real layers.
CHANNELS = (1, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 64, 96, 100)
OUTPUTS = (1, 5, 8, 16, 24, 40, 63, 64, 65, 96, 100, 129)
LARGE = (320, 728)


def parts_of(row: str) -> tuple[bool, int | None, int | None]:
    """channels_last, taps along a row and stride of a row; None where it takes any."""
    layout, taps, stride = re.search(r"_(nhwc|nchw)_k(\d+|any)(?:s(\d))?_cuda", row).groups()
    return layout == "nhwc", None if taps == "any" else int(taps), int(stride) if stride else None


def separable(channels_last: bool, window: list[tuple[int, ...]], **fields) -> str:
    layout = "channels_last" if channels_last else "contiguous"
    return line(channels_last, window, **{"pass": "separable_fwd", "residual": layout, **fields})


def problems(row: str, count: int) -> list[str]:
    """Problems that ``row`` must run: sizes around its tiles and chunks, every dtype, padding of both sides."""
    rng = random.Random(zlib.crc32(row.encode()))
    deck = functools.partial(Deck, rng)
    channels_last, taps, stride = parts_of(row)
    dtypes, data = deck(("float32", *HALVES)), deck(("integers", "reals", "nonfinite"))
    channels, outputs = deck(CHANNELS), deck(OUTPUTS)
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
        if not taps and any(7 * dim[2] + dim[3] * (dim[1] - 1) > 22 for dim in window):
            continue  # does not fit shared memory
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
                dtype=dtypes.deal(),
                data=kind,
                seed=rng.randint(1, 999),
                n=rng.choice((1, 1, 2)),
                c=rng.choice(LARGE) if deep else channels.deal(),
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


COUNTS = {"plain": (12, 150), "traced": (4, 40), "sanitized": (4, 40)}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("row", ROWS)
def test_every_row(row, variant):
    check_row(variant, row, COUNTS[variant.name][0])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_on_more_problems(row, variant):
    check_row(variant, row, COUNTS[variant.name][1])
