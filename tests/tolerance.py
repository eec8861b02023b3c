"""How far a result may be from the truth: at most twice as far as PyTorch's in the same dtype, plus four ulp."""

from __future__ import annotations

import torch

ULPS = 4
FLOAT64_ULPS = 64
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
YARDSTICK = {torch.float64: torch.float32}  # where the truth has the same dtype: PyTorch's error one below, scaled
KINK_DISTANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}


def error(y: torch.Tensor, reference: torch.Tensor, draws: int = 1) -> float:
    """``max|y - reference| / rms(reference)``; infinite when anything is NaN, infinite or of another shape.

    The maximum is that of each of the ``draws`` along the first dimension, on average: of few values it is mostly
    chance, which its average is not.
    """
    if y.shape != reference.shape:
        return float("inf")
    if y.numel() == 0:
        return 0.0
    reference = reference.double()
    distance = (y.double() - reference).abs()
    if not bool(torch.isfinite(distance).all()):
        return float("inf")
    worst, rms = distance.reshape(draws, -1).amax(1).mean().item(), reference.square().mean().sqrt().item()
    if rms == 0.0:
        return 0.0 if worst == 0.0 else float("inf")
    return worst / rms


def bound(dtype: torch.dtype, yardstick_error: float) -> float:
    """The largest error allowed in ``dtype`` where PyTorch in the yardstick's dtype makes ``yardstick_error``.

    The truth of a float64 result is a float64 result too, and may be as far off (the derivative of gelu_tanh loses
    7 ulp a value in ATen as in ours): the allowance is that of both.
    """
    eps = torch.finfo(dtype).eps
    if dtype in YARDSTICK:
        return 4 * yardstick_error * eps / torch.finfo(YARDSTICK[dtype]).eps + FLOAT64_ULPS * eps
    return 2 * yardstick_error + ULPS * eps


def assert_accurate(
    name: str, y: torch.Tensor, reference: torch.Tensor, yardstick: torch.Tensor, line: str, draws: int = 1
) -> None:
    """Fail unless ``y`` is as near to the float64 ``reference`` as the bound allows; the message names ``line``."""
    ours, theirs = error(y, reference, draws), error(yardstick, reference, draws)
    limit = bound(y.dtype, theirs)
    assert ours <= limit, f"{line}\n  {name}: error {ours:.3e}, allowed {limit:.3e} (PyTorch makes {theirs:.3e})"


def assert_equal(name: str, y: torch.Tensor, reference: torch.Tensor, line: str) -> None:
    """Fail unless ``y`` is exactly the float64 ``reference`` rounded once to ``y``'s dtype."""
    assert y.shape == reference.shape, f"{line}\n  {name}: shape {tuple(y.shape)}, expected {tuple(reference.shape)}"
    expected = reference.to(y.dtype)
    wrong = ~(y == expected)  # a NaN is wrong too
    if not bool(wrong.any()):
        return
    where = tuple(wrong.nonzero()[0].tolist())
    got, want = y[where].item(), expected[where].item()
    count = f"{int(wrong.sum())} of {y.numel()}"
    raise AssertionError(f"{line}\n  {name}: {count} differ, first at {where}: {got} != {want}")
