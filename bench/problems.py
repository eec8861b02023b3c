"""What is measured: problems of tests/cases.py, the shape files, their tensors, work and traffic, and the truth.

The tensors of a problem depend on its numbers alone, so that every process makes the same ones.
"""

from __future__ import annotations

import functools
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

SHAPES = Path(__file__).with_name("shapes")
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import oracle  # noqa: E402
from cases import Case  # noqa: E402
from judges import Result, cast, composition, composition_sum, evaluate  # noqa: E402
from tolerance import DTYPES as DTYPES  # noqa: E402
from tolerance import KINK_DISTANCE, error  # noqa: E402

PASSES = ("fwd", "dgrad", "wgrad", "bwd", "step")
LAYOUTS = ("nchw", "nhwc")
OPS = {"depthwise": "dw", "separable": "sep"}
# The tensor arguments in the order of the operators, whose backwards return their gradients in the same order.
ARGUMENTS = {
    "dw": ("x", "weight", "bias"),
    "sep": ("x", "depthwise_weight", "pointwise_weight", "depthwise_bias", "pointwise_bias", "residual"),
}
# How often a pass must move the input (or its gradient), the output and the weights; a recomputation adds nothing.
TRAFFIC = {"fwd": (1, 1, 1), "dgrad": (1, 1, 1), "wgrad": (1, 1, 1), "bwd": (2, 1, 2), "step": (2, 2, 2)}
POINTS = 4096  # of each result, that are compared
# What a result may be off, relative to its root mean square. A broken kernel is off by far more; how near a right one
# comes is the tests' concern.
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
# In half precision the map between the stages may round across a kink, where its activation's derivative jumps.
HALF, HALF_KINK_FACTOR, HALF_OUTLIERS = (torch.float16, torch.bfloat16), 4, 0.005


@dataclass(frozen=True)
class Layer:
    """A problem, and the layouts in which it is measured side by side."""

    case: Case
    layouts: tuple[str, ...]


def read_shapes(name: str) -> list[Case]:
    """The problems of ``bench/shapes/<name>.txt``, or of the file ``name``: one a line without layout and dtype."""
    path = Path(name) if name.endswith(".txt") else SHAPES / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHAPES.glob("*.txt")))
        raise ValueError(f"shapes: got {name!r}, expected a .txt file or one of {known}")
    lines = (line.partition("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines())
    return [Case.parse(" ".join([*words[:2], "nchw", "fp32", *words[2:]])) for words in lines if words]


def select(
    shapes: Sequence[str],
    problems: Sequence[str],
    ops: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    layouts: Sequence[str],
) -> list[Layer]:
    """Every problem of the shape files in every batch and dtype; and the problem strings as they are written."""
    written = [Case.parse(line) for line in problems]
    for case in written:
        if case.layout not in LAYOUTS:
            raise ValueError(f"problem: got layout {case.layout!r}, expected one of {', '.join(LAYOUTS)}")
    wanted = {OPS[op] for op in ops}
    chosen = [
        Layer(replace(case, batch=batch, dtype_name=dtype), tuple(layouts))
        for name in shapes
        for case in read_shapes(name)
        if case.op in wanted
        for batch in batches
        for dtype in dtypes
    ]
    layers = [*chosen, *(Layer(replace(case, layout="nchw"), (case.layout,)) for case in written)]
    return list(dict.fromkeys(layers))


def results(case: Case, pass_name: str) -> list[str]:
    """The names of what a pass computes: "output", or the argument whose gradient it is."""
    arguments = [name for name in ARGUMENTS[case.op] if name in case.shapes()]
    match pass_name:
        case "fwd":
            return ["output"]
        case "dgrad":
            return ["x"]
        case "wgrad":
            return [name for name in arguments if "weight" in name or "bias" in name]
        case "bwd":
            return arguments
        case "step":
            return ["output", *arguments]
    raise ValueError(f"pass: got {pass_name!r}, expected one of {', '.join(PASSES)}")


def arrange(t: Tensor, layout: str) -> Tensor:
    """A fresh, aligned copy of ``t``, contiguous in the order of ``layout``."""
    if layout == "nchw":
        return t.clone(memory_format=torch.contiguous_format)
    return t.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def tensors(case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments of a problem and the upstream gradient, in the problem's dtype, contiguous."""
    drawn = replace(case, layout="nchw", dtype_name="fp32", fuse="auto")
    given = {name: arrange(t.to(case.dtype), "nchw") for name, t in drawn.inputs(integer=False).items()}
    keep = _away_from_kinks(case, cast(given, torch.float32))
    return given, drawn.upstream(keep, integer=False).to(case.dtype) * keep.to(case.dtype)


@torch.no_grad()
def _away_from_kinks(case: Case, given: dict[str, Tensor]) -> Tensor:
    """1 where the upstream gradient may have a value, 0 where rounding decides on which side of a kink a value lies.

    That is next to the kinks of the output activation; and where any channel of the map between the stages is next to
    one, except in half precision, where nothing would be left.
    """
    distance = KINK_DISTANCE[case.dtype]
    keep = oracle.away_from_kinks(composition_sum(case, given), case.activation, distance)
    if case.op == "sep" and case.dtype not in HALF:
        depthwise = (given.get(name) for name in ("x", "depthwise_weight", "depthwise_bias"))
        middle = oracle.depthwise_sum(*depthwise, *case.geometry)
        keep = keep & oracle.away_from_kinks(middle, case.mid, distance).all(1, keepdim=True)
    return keep.float()


@functools.lru_cache(maxsize=2)
def truth(case: Case, gradients: bool) -> dict[str, Tensor]:
    """What is right, in float64: the output and, if asked for, the gradients. Image by image, to keep memory small."""
    given, g = tensors(case)
    doubles, per_image = cast(given, torch.float64), ("output", "x", "residual")
    parts: dict[str, list[Tensor]] = {}
    for n in range(case.batch):
        image = {name: t[n : n + 1] if name in per_image else t for name, t in doubles.items()}
        if gradients:
            result = evaluate(composition, case, image, lambda y, n=n: g[n : n + 1].to(y.dtype))
        else:
            with torch.no_grad():
                result = Result(composition(case, image), {})
        for name, value in {"output": result.y, **result.gradients}.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(p) if name in per_image else torch.stack(p).sum(0) for name, p in parts.items()}


def points(name: str, t: Tensor) -> tuple[list[int], list[float]]:
    """The shape of a result, and its values at random places: the same ones for every result of that name and shape."""
    if t.numel() <= POINTS:
        return list(t.shape), t.double().flatten().tolist()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    places = torch.randint(t.numel(), (POINTS,), generator=generator)
    return list(t.shape), t[torch.unravel_index(places, t.shape)].double().tolist()


def worst_error(case: Case, pass_name: str, answers: dict[str, tuple[list[int], list[float]]]) -> tuple[str, float]:
    """The result that is farthest from the truth, and its error relative to its root mean square."""
    right = truth(replace(case, layout="nchw", fuse="auto"), pass_name != "fwd")
    outliers = HALF_OUTLIERS if limit(case, pass_name) > LIMIT[case.dtype] else 0.0
    errors = {}
    for name in results(case, pass_name):
        shape, values = answers.get(name, ([], []))
        expected_shape, expected = points(name, right[name])
        errors[name] = _error(values, expected, outliers) if shape == expected_shape else math.inf
    return max(errors.items(), key=lambda item: item[1])


def limit(case: Case, pass_name: str) -> float:
    """The error from which on a result is wrong."""
    kinked = pass_name != "fwd" and case.dtype in HALF and case.mid[0] in oracle.KINKS
    return LIMIT[case.dtype] * (HALF_KINK_FACTOR if kinked else 1)


def _error(values: list[float], expected: list[float], outliers: float) -> float:
    """The largest error without a fraction of outliers, relative to the root mean square."""
    y, reference = torch.tensor(values, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
    if outliers and bool(torch.isfinite(y).all()):
        keep = (y - reference).abs().argsort()[: len(y) - int(outliers * len(y))]
        y, reference = y[keep], reference[keep]
    return error(y, reference)


def flops(case: Case, pass_name: str) -> int:
    """Floating-point operations the mathematics of a pass needs; a multiply-add is two."""
    inner = case.channels * case.multiplier
    pixels = case.batch * math.prod(case.output_size)
    depthwise, pointwise = 2 * pixels * inner * math.prod(case.kernel), 2 * pixels * inner * case.out_channels
    match pass_name:
        case "wgrad":  # the depthwise weights need the gradient of the map between the stages
            return depthwise + 2 * pointwise
        case "bwd":
            return 2 * (depthwise + pointwise)
        case "step":
            return 3 * (depthwise + pointwise)
    return depthwise + pointwise


def traffic(case: Case, pass_name: str) -> int:
    """Bytes of input, output and weights, each counted as often as the pass must move it."""
    sizes = {name: math.prod(shape) for name, shape in case.shapes().items()}
    source, residual = sizes.pop("x"), sizes.pop("residual", 0)
    times = TRAFFIC[pass_name]
    elements = times[0] * source + times[1] * (case.outputs + residual) + times[2] * sum(sizes.values())
    return elements * case.dtype.itemsize
