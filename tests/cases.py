"""One-line problem strings: the same line names a problem in a test, in a failure message and on a command line.

Grammar::

    dw|sep  n<N>c<C>[t<T>][h<H>]w<W>k<K>s<S>d<D>p<P>[m<M>][o<O>]  <layout>  <dtype>  [option ...]

    n c t h w   batch, channels, sizes; only w is 1D, h and w are 2D, t, h and w are 3D
    k s d p     kernel, stride, dilation, padding: one value for all dimensions (k3) or one per dimension (k3x5);
                a padding value lo:hi is asymmetric (p1:2, p0x1:2)
    m           depth multiplier, 1 where absent
    o           output channels of the pointwise convolution (sep only)
    layout      nchw nhwc (contiguous in that order, whatever the rank)
                sliced nhwc_sliced (a part of a larger tensor) expanded broadcast (stride 0 of batch, of channels)
                transposed (last two dimensions) permuted (the batch innermost)
    dtype       fp64 fp32 bf16 fp16
    options     act=<activation> (after the operation) mid=<activation> (between the two, sep only),
                <activation> is a name or name:parameter; bias=none|dw|pw|both; res (a residual, sep only);
                fuse=auto|always|never (sep only)

Examples: ``dw n2c37h13w11k3s2d1p1 nhwc bf16 act=relu6``, ``dw n2c24w40k4s1d1p3:0 nchw bf16``,
``sep n2c37h13w11k3s2d1p1o24 nhwc bf16 mid=relu6 act=silu res``.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import oracle
from tolerance import DTYPES

LAYOUTS = ("nchw", "nhwc", "sliced", "nhwc_sliced", "expanded", "broadcast", "transposed", "permuted")
CHANNELS = (1, 7, 8, 15, 16, 17, 24, 37, 96)
EXACT = ("none", "relu", "relu6", "leaky_relu")  # map small integers to numbers every dtype holds
GUARD = 67  # elements of NaN on both sides of every input; odd, so that inputs are misaligned too
FIELDS = re.compile(r"([a-z])([\d:x]+)")


def parse_activation(text: str) -> tuple[str, float]:
    name, _, parameter = text.partition(":")
    if name not in oracle.ACTIVATIONS:
        raise ValueError(f"activation {name!r}, expected one of {', '.join(oracle.ACTIVATIONS)}")
    return name, float(parameter) if parameter else oracle.DEFAULT_PARAM.get(name, 0.0)


def format_activation(activation: tuple[str, float]) -> str:
    name, parameter = activation
    return name if parameter == oracle.DEFAULT_PARAM.get(name, 0.0) else f"{name}:{parameter:g}"


@dataclass(frozen=True)
class Case:
    """A problem; ``str`` and :meth:`parse` are inverse to each other."""

    op: str
    batch: int
    channels: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    multiplier: int = 1
    out_channels: int = 0
    layout: str = "nchw"
    dtype_name: str = "fp32"
    activation: tuple[str, float] = ("none", 0.0)
    mid: tuple[str, float] = ("none", 0.0)
    bias: str = "both"
    residual: bool = False
    fuse: str = "auto"

    @classmethod
    def parse(cls, line: str) -> Case:
        op, numbers, layout, dtype_name, *options = line.split()
        found = FIELDS.findall(numbers)
        fields = dict(found)
        if "".join(a + b for a, b in found) != numbers or len(fields) != len(found):
            raise ValueError(f"cannot read {numbers!r} in {line!r}")
        if op not in ("dw", "sep") or layout not in LAYOUTS or dtype_name not in DTYPES:
            raise ValueError(f"unknown operation, layout or dtype in {line!r}")
        size = tuple(int(fields[d]) for d in "thw" if d in fields)

        def per_dimension(text: str, read=int) -> tuple:
            values = tuple(read(v) for v in text.split("x"))
            values = values * len(size) if len(values) == 1 else values
            if len(values) != len(size):
                raise ValueError(f"{len(size)} values expected, got {text!r} in {line!r}")
            return values

        def sides(text: str) -> tuple[int, int]:
            low, _, high = text.partition(":")
            return int(low), int(high or low)

        given: dict = {}
        for option in options:
            key, _, value = option.partition("=")
            match key:
                case "act" | "mid":
                    given["activation" if key == "act" else "mid"] = parse_activation(value)
                case "bias" | "fuse":
                    given[key] = value
                case "res":
                    given["residual"] = True
                case _:
                    raise ValueError(f"unknown option {option!r} in {line!r}")
        return cls(
            op,
            int(fields["n"]),
            int(fields["c"]),
            size,
            per_dimension(fields["k"]),
            per_dimension(fields["s"]),
            per_dimension(fields["d"]),
            per_dimension(fields["p"], sides),
            int(fields.get("m", 1)),
            int(fields["o"]) if op == "sep" else 0,
            layout,
            dtype_name,
            **given,
        )

    def __str__(self) -> str:
        def joined(values, show=str) -> str:
            return show(values[0]) if len(set(values)) == 1 else "x".join(map(show, values))

        def sides(pair: tuple[int, int]) -> str:
            return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}:{pair[1]}"

        names = oracle.SPATIAL[len(self.size)]
        numbers = f"n{self.batch}c{self.channels}" + "".join(f"{d}{n}" for d, n in zip(names, self.size, strict=True))
        numbers += f"k{joined(self.kernel)}s{joined(self.stride)}d{joined(self.dilation)}p{joined(self.padding, sides)}"
        numbers += f"m{self.multiplier}" * (self.multiplier > 1) + f"o{self.out_channels}" * (self.op == "sep")
        words = [self.op, numbers, self.layout, self.dtype_name]
        words += [f"mid={format_activation(self.mid)}"] * (self.mid[0] != "none")
        words += [f"act={format_activation(self.activation)}"] * (self.activation[0] != "none")
        words += [f"bias={self.bias}"] * (self.bias != "both") + ["res"] * self.residual
        words += [f"fuse={self.fuse}"] * (self.fuse != "auto")
        return " ".join(words)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def spatial(self) -> int:
        return len(self.size)

    @property
    def geometry(self) -> tuple:
        """``stride, padding, dilation`` as the oracle takes them."""
        return self.stride, self.padding, self.dilation

    @property
    def output_size(self) -> tuple[int, ...]:
        return oracle.output_size(self.size, self.kernel, *self.geometry)

    @property
    def outputs(self) -> int:
        """Number of elements of the output."""
        channels = self.out_channels or self.channels * self.multiplier
        return self.batch * channels * math.prod(self.output_size)

    @property
    def multiplications(self) -> int:
        inner = self.channels * self.multiplier
        per_pixel = inner * math.prod(self.kernel) + inner * self.out_channels
        return self.batch * math.prod(self.output_size) * per_pixel

    def exact(self) -> Case:
        """The same problem with activations that keep small integers exact."""

        def keep(activation: tuple[str, float]) -> tuple[str, float]:
            if activation[0] == "leaky_relu":
                return "leaky_relu", 0.5
            return activation if activation[0] in EXACT else ("relu6", 0.0)

        return replace(self, activation=keep(self.activation), mid=keep(self.mid))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor argument that the problem has, in the order of the functional interface."""
        inner, separable = self.channels * self.multiplier, self.op == "sep"
        prefix = "depthwise_" if separable else ""
        shapes = {"x": (self.batch, self.channels, *self.size), f"{prefix}weight": (inner, 1, *self.kernel)}
        if separable:
            shapes["pointwise_weight"] = (self.out_channels, inner) + (1,) * self.spatial
        if self.bias in ("both", "dw"):
            shapes[f"{prefix}bias"] = (inner,)
        if separable and self.bias in ("both", "pw"):
            shapes["pointwise_bias"] = (self.out_channels,)
        if self.residual:
            shapes["residual"] = (self.batch, self.out_channels, *self.output_size)
        return shapes

    def unfused(self) -> Case:
        """The same problem without a wish how it is computed."""
        return replace(self, fuse="auto")

    def generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.unfused()} {purpose}".encode()))

    def inputs(self, integer: bool, device: str = "cpu", draw: int = 0) -> dict[str, Tensor]:
        """The tensors of the problem: small integers, or random numbers that float32 holds, others for each ``draw``.

        Integers are bounded so that the depthwise values of a separable problem fit bfloat16's 8 bits; where nothing is
        rounded on the way every second channel is larger, to show an accumulator that is too short. ``x`` has the
        case's layout, the residual the output's, and around every tensor lies a band of NaN.
        """
        generator = self.generator("integer" if integer else f"random {draw}")
        bound = max(1, min(2, 250 // math.prod(self.kernel)))

        def values(name: str, shape: tuple[int, ...]) -> Tensor:
            if integer:
                reach = bound if name == "x" else 1 if "weight" in name else 2
                t = torch.randint(-reach, reach + 1, shape, generator=generator).double()
                if name == "x" and self.op == "dw":
                    t[:, 1::2] = torch.randint(-100, 101, t[:, 1::2].shape, generator=generator).double()
                return t
            scale = math.sqrt(math.prod(shape[1:])) / 2 if "weight" in name else 1.0
            return (torch.randn(shape, generator=generator) / scale).double()

        tensors = {name: values(name, shape).to(self.dtype) for name, shape in self.shapes().items()}
        channels_last = self.channels > 1 and self.layout in ("nhwc", "nhwc_sliced")
        layouts = {"x": self.layout, "residual": "nhwc" if channels_last else "nchw"}
        return {name: arrange(t.to(device), layouts.get(name, "nchw")) for name, t in tensors.items()}

    def upstream(self, y: Tensor, integer: bool, draw: int = 0) -> Tensor:
        """A random upstream gradient for the output ``y``, in ``y``'s layout."""
        generator = self.generator(f"upstream {draw}")
        if integer:
            g = torch.randint(-1, 2, y.shape, generator=generator).double()
        else:
            g = torch.randn(y.shape, generator=generator).double()
        return torch.empty_like(y).copy_(g)


def guarded(t: Tensor) -> Tensor:
    """A copy of ``t`` in C order inside a larger buffer of NaN."""
    buffer = torch.full((t.numel() + 2 * GUARD,), float("nan"), dtype=t.dtype, device=t.device)
    return buffer[GUARD : GUARD + t.numel()].view(t.shape).copy_(t)


def arrange(t: Tensor, layout: str) -> Tensor:
    """``t`` in ``layout``; an expanded layout repeats its first slice. What lies between the elements is NaN."""

    def surrounded(u: Tensor) -> Tensor:
        larger = torch.full([n + 2 for n in u.shape[:-1]] + [2 * u.shape[-1] + 1], float("nan"), dtype=u.dtype)
        view = guarded(larger.to(u.device))[(slice(1, -1),) * (u.dim() - 1) + (slice(1, None, 2),)]
        return view.copy_(u)

    match layout:
        case "nchw":
            return guarded(t)
        case "nhwc":
            return guarded(t.movedim(1, -1)).movedim(-1, 1)
        case "sliced":
            return surrounded(t)
        case "nhwc_sliced":
            wide = torch.full([*t.movedim(1, -1).shape[:-1], t.shape[1] + 3], float("nan"), dtype=t.dtype)
            return guarded(wide.to(t.device)).movedim(-1, 1)[:, 2:-1].copy_(t)
        case "expanded":
            return guarded(t[:1]).expand(t.shape)
        case "broadcast":
            return guarded(t[:, :1]).expand(t.shape)
        case "transposed":
            return guarded(t.transpose(-1, -2)).transpose(-1, -2)
        case "permuted":
            return guarded(t.movedim(0, -1)).movedim(-1, 0)
    raise ValueError(layout)


# Problems that are always tried: tile edges, real layers, and what random choice seldom finds.
FIXED = {
    "dw1d": (
        "dw n1c16w33k31s1d1p15 nhwc fp32 act=silu",
        "dw n2c24w40k4s1d1p3:0 nchw bf16 act=silu",
        "dw n2c37w17k5s2d2p9 nhwc fp16",
        "dw n3c7w1k1s1d1p0 nchw fp64",
    ),
    "dw2d": (
        "dw n2c37h13w11k3s2d1p1 nhwc bf16 act=relu6",
        "dw n1c32h112w112k3s1d1p1 nchw fp32 act=relu6",
        "dw n1c32h112w112k3s2d1p0:1 nhwc bf16 act=relu6",
        "dw n1c96h28w28k7s1d1p3 nhwc fp32",
        "dw n1c16h9w9k3s1d6p6 nchw fp32",
        "dw n2c8h3w5k2x4s1d1p5x7 nchw fp16 act=elu:0.5",
        "dw n1c1h17w1k5x1s3x1d1p2x0 nhwc fp64",
        "dw n2c17h8w16k3s1d1p1 nhwc_sliced fp32 act=hardswish",
        "dw n2c15h7w9k3s1d2p2m3 sliced bf16 act=leaky_relu:0.2",
        "dw n1c37h300w9k1x3s40x1d1p0x1 nhwc fp32",
        "dw n1c40h33w33k3s1d4p4 nchw fp32",
        "dw n1c17h20w19k13s1d1p6 nhwc fp32",
        "dw n1c24h19w23k5s3d2p4 nhwc fp32 act=relu",
        "dw n1c16h15w15k3s2d3p40 nhwc fp32",
    ),
    "dw3d": (
        "dw n1c8t5h6w7k3s1d1p1 nchw fp32 act=relu",
        "dw n2c17t4h5w3k2x3x3s1x2x2d1p0:1x1x1 nhwc bf16",
    ),
    "sep1d": (
        "sep n2c37w29k5s1d1p2o24 nhwc fp32 mid=silu act=gelu res",
        "sep n1c96w17k3s2d1p1o16 nchw bf16 mid=relu",
        "sep n1c24w16k3s1d2p2:5m2o1 permuted fp32 mid=relu act=tanh bias=none res",
    ),
    "sep2d": (
        "sep n2c37h13w11k3s2d1p1o24 nhwc bf16 mid=relu6 act=silu res",
        "sep n1c32h56w56k3s1d1p1o64 nchw fp32 mid=relu6 act=relu6",
        "sep n1c96h28w28k3s2d1p1o24 nhwc fp32 mid=relu6",
        "sep n1c96h14w14k5s1d1p2o96 nhwc bf16 mid=hardswish act=hardswish",
        "sep n1c17h9w17k3s1d2p2m2o1 nchw fp16 act=relu res",
        "sep n2c8h5w7k3s1d1p1o17 nhwc fp64 mid=gelu act=gelu_tanh res fuse=always",
        "sep n2c16h6w6k3s1d1p1o16 nhwc fp32 mid=relu6 act=tanh fuse=never",
        "sep n1c24h4w4k1s1d1p0o37 nhwc fp32 act=elu:0.5",
        "sep n3c17h4w9k5x4s1x2d2x3p6x5o1 permuted fp16 mid=hardsigmoid act=leaky_relu:-0.5 fuse=never",
    ),
}
FAMILIES = tuple(FIXED)


class Deck:
    """Deals each value equally often, in random order."""

    def __init__(self, rng: random.Random, values):
        self.rng, self.values, self.left = rng, tuple(values), []

    def deal(self):
        if not self.left:
            self.left = self.rng.sample(self.values, len(self.values))
        return self.left.pop()


def generate(family: str, count: int, seed: int = 0, budget: int = 1_500_000) -> list[Case]:
    """``count`` random problems of a family, each within a ``budget`` of multiplications; repeatable by ``seed``."""
    rng = random.Random(f"{family} {seed}")
    op, rank = family[:-2], int(family[-2])
    activations = [*oracle.ACTIVATIONS, "leaky_relu:0.25", "leaky_relu:-0.5", "elu:0.5", "elu:-0.5"]
    decks = {
        "channels": CHANNELS,
        "outputs": CHANNELS,
        "layout": ("nchw", "nhwc", *LAYOUTS),
        "dtype": DTYPES,
        "act": activations,
        "mid": activations,
        "kernel": (1, 2, 3, 3, 4, 5, 5, 6, 7) if rank < 3 else (1, 2, 3, 3, 4, 5),
        "stride": (1, 1, 2, 3),
        "dilation": (1, 1, 2, 3),
        "multiplier": (1, 1, 2, 3),
        "bias": ("both", "both", "none", "dw", "pw") if op == "sep" else ("both", "none"),
        "square": (True, True, False),
        "padding": ("same", "zero", "large", "uneven"),
        "fuse": ("auto", "always", "never"),
    }
    deal = {name: Deck(rng, values).deal for name, values in decks.items()}
    if rank == 1:
        deal["kernel"] = Deck(rng, (*decks["kernel"], 9, 31)).deal
    cases: list[Case] = []
    while len(cases) < count:
        square, style = deal["square"](), deal["padding"]()

        def per_dimension(name: str, square: bool = square) -> tuple[int, ...]:
            return (deal[name](),) * rank if square else tuple(deal[name]() for _ in range(rank))

        kernel, stride, dilation = (per_dimension(name) for name in ("kernel", "stride", "dilation"))
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if style == "same":
            padding = tuple((r // 2, r // 2) for r in reach)
        elif style == "zero":
            padding = ((0, 0),) * rank
        elif style == "large":
            padding = tuple((k + 1, k + 1) for k in kernel)
        else:
            padding = tuple((rng.randint(0, r + 1), rng.randint(0, r + 1)) for r in reach)
        size = tuple(
            rng.randint(max(1, r + 1 - lo - hi), max(17 if rank < 3 else 7, r + 1 - lo - hi))
            for r, (lo, hi) in zip(reach, padding, strict=True)
        )
        case = Case(
            op,
            rng.choice((1, 2, 3)),
            deal["channels"](),
            size,
            kernel,
            stride,
            dilation,
            padding,
            deal["multiplier"](),
            deal["outputs"]() if op == "sep" else 0,
            deal["layout"](),
            deal["dtype"](),
            parse_activation(deal["act"]()),
            parse_activation(deal["mid"]()) if op == "sep" else ("none", 0.0),
            deal["bias"](),
            op == "sep" and rng.random() < 0.4,
            deal["fuse"]() if op == "sep" else "auto",
        )
        if case.multiplications <= budget:
            cases.append(case)
    return cases


def sample(families: str, count: int, seed: int = 0) -> list[Case]:
    """The fixed problems of the families whose name starts with ``families``, and ``count`` random ones of each."""
    chosen = [family for family in FAMILIES if family.startswith(families)]
    return [case for f in chosen for case in [*map(Case.parse, FIXED[f]), *generate(f, count, seed)]]
