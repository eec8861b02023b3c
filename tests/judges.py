"""The first two judges: exact equality on small integers; random data against float64, PyTorch as the yardstick."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import oracle
from cases import GUARD, Case
from dsconv_ext import functional
from tolerance import KINK_DISTANCE, YARDSTICK, assert_accurate, assert_equal

ENOUGH_OUTPUTS, ENOUGH_DRAWS, ENOUGH_VALUES = 500, 16, 16
Function = Callable[[Case, dict[str, Tensor]], Tensor]


def spelled(activation: tuple[str, float]) -> str | tuple[str, float]:
    """An activation as the public functions take it."""
    return activation if activation[0] in oracle.DEFAULT_PARAM else activation[0]


def subject(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """The library's answer, through its public functions."""
    stride, padding, dilation = case.geometry
    options = {"stride": stride, "padding": padding, "dilation": dilation, "activation": spelled(case.activation)}
    if case.op == "dw":
        return getattr(functional, f"depthwise_conv{case.spatial}d")(**tensors, **options)
    convolve = getattr(functional, f"separable_conv{case.spatial}d")
    return convolve(**tensors, **options, mid_activation=spelled(case.mid), fuse=case.fuse)


def composition_sum(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """What the output activation is applied to, composed of PyTorch's operators."""
    if case.op == "dw":
        return oracle.depthwise_sum(tensors["x"], tensors["weight"], tensors.get("bias"), *case.geometry)
    names = ("x", "depthwise_weight", "pointwise_weight", "depthwise_bias", "pointwise_bias", "residual")
    return oracle.separable_sum(*map(tensors.get, names), *case.geometry, case.mid)


def composition(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    return oracle.activate(composition_sum(case, tensors), case.activation)


@dataclass
class Result:
    """An output and the gradients of the inputs it was computed from."""

    y: Tensor
    gradients: dict[str, Tensor]

    def items(self):
        yield "output", self.y
        for name, gradient in self.gradients.items():
            yield f"gradient of {name}", gradient


def evaluate(function: Function, case: Case, tensors: dict[str, Tensor], g: Callable[[Tensor], Tensor]) -> Result:
    """Forward and backward of ``function``; ``g`` makes the upstream gradient from the output."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = function(case, leaves)
    gradients = torch.autograd.grad(y, tuple(leaves.values()), g(y.detach()))
    return Result(y.detach(), dict(zip(leaves, gradients, strict=True)))


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) for name, t in tensors.items()}


def check_layout(case: Case, tensors: dict[str, Tensor], ours: Result) -> None:
    """Output and gradients have the promised dtype and strides."""
    x = tensors["x"]
    assert ours.y.stride() == oracle.output_strides(x, ours.y.shape), f"{case}\n  output strides {ours.y.stride()}"
    for name, gradient in ours.gradients.items():
        like = tensors[name]
        if name == "x" or name == "residual":
            expected = oracle.output_strides(x, like.shape)
        else:
            expected = torch.empty_like(like).stride()
        strides, message = gradient.stride(), f"{case}\n  gradient of {name}:"
        assert gradient.dtype == like.dtype, f"{message} {gradient.dtype}, expected {like.dtype}"
        assert strides == expected, f"{message} strides {strides}, expected {expected}"


def check_untouched(case: Case, tensors: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """No input was written, nor the bands of NaN around it."""
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{case}\n  {name} was overwritten"
        whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        bands = torch.cat((whole[:GUARD], whole[-GUARD:]))
        assert bool(bands.isnan().all()), f"{case}\n  the memory around {name} was overwritten"


def sound_onednn(case: Case) -> AbstractContextManager:
    """Keep the yardstick from oneDNN where that of torch 2.14 never returns, or reads past its buffers and may crash.

    The former: float16 with long kernels (AVX512-FP16); the latter: the gradient of dilated bfloat16 weights from
    channels_last tensors (AVX512-BF16).
    """
    hangs = case.dtype == torch.float16 and max(case.kernel) > 7
    reads_past = case.dtype == torch.bfloat16 and max(case.dilation) > 1
    unsound = hangs or reads_past
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=False) if unsound else nullcontext()


@functools.lru_cache(maxsize=256)
def exact_truth(case: Case, device: str) -> Result:
    tensors = case.inputs(integer=True, device=device)
    return evaluate(composition, case, cast(tensors, torch.float64), lambda y: case.upstream(y, integer=True))


def check_exact(case: Case, function: Function = subject, device: str = "cpu") -> None:
    """Judge (a): on small integers every value and every gradient is the true one, rounded once."""
    case = case.exact()
    tensors = case.inputs(integer=True, device=device)
    before = {name: t.clone() for name, t in tensors.items()}
    ours = evaluate(function, case, tensors, lambda y: case.upstream(y, integer=True))
    check_untouched(case, tensors, before)
    for (name, value), (_, reference) in zip(ours.items(), exact_truth(case.unfused(), device).items(), strict=True):
        assert_equal(name, value, reference, f"{case} (integers)")
    check_layout(case, tensors, ours)


@functools.lru_cache(maxsize=1024)
def accuracy_truth(case: Case, device: str, draw: int = 0) -> tuple[Tensor, Result, Result]:
    """The upstream gradient, zero next to the kinks of the output activation; the truth; and PyTorch's own result."""
    tensors = case.inputs(integer=False, device=device, draw=draw)
    truths = cast(tensors, torch.float64)
    with torch.no_grad():
        pre_activation = composition_sum(case, truths)
    g = case.upstream(pre_activation, integer=False, draw=draw).to(case.dtype)
    g *= oracle.away_from_kinks(pre_activation, case.activation, KINK_DISTANCE[case.dtype])
    truth = evaluate(composition, case, truths, g.to)
    with sound_onednn(case):
        yardstick = evaluate(composition, case, cast(tensors, YARDSTICK.get(case.dtype, case.dtype)), g.to)
    return g, truth, yardstick


def check_accuracy(case: Case, function: Function = subject, device: str = "cpu") -> None:
    """Judge (b): on random data no value is more than twice as wrong as PyTorch's, up to four ulp.

    Which of two largest errors is larger is chance where there are few values, so small problems, and others with a
    gradient of few values, are drawn several times and the largest errors averaged.
    """
    triples = []
    draws = min(ENOUGH_DRAWS, -(-ENOUGH_OUTPUTS // max(1, case.outputs)))
    fewest = min(value.numel() for _, value in accuracy_truth(case.unfused(), device)[1].items())
    draws = max(draws, min(4, -(-ENOUGH_VALUES // max(1, fewest))))
    for draw in range(draws):
        g, truth, yardstick = accuracy_truth(case.unfused(), device, draw)
        tensors = case.inputs(integer=False, device=device, draw=draw)
        ours = evaluate(function, case, tensors, lambda y, g=g: torch.empty_like(y).copy_(g))
        triples.append((ours, truth, yardstick))
    for values in zip(*(result.items() for triple in triples for result in triple), strict=True):
        name = values[0][0]
        ours, truth, theirs = (torch.stack([value for _, value in values[i::3]]) for i in range(3))
        assert_accurate(name, ours, truth, theirs, str(case), draws)


def check(case: Case, function: Function = subject, device: str = "cpu") -> None:
    """Both judges."""
    check_exact(case, function, device)
    check_accuracy(case, function, device)
