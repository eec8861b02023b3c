"""Load the library and try it: forward and backward of both operations in two dtypes against F.conv2d.

A plain script that needs torch and dsconv_ext only: ``python tests/smoke.py``. Prints one line and exits
with 0 if everything agrees.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dsconv_ext
from dsconv_ext import _loader

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def depthwise(f, x, weight, pointwise):
    return f.depthwise_conv2d(x, weight, stride=2, padding=1, activation="relu")


def separable(f, x, weight, pointwise):
    return f.separable_conv2d(x, weight, pointwise, padding=1, mid_activation="silu", activation="silu")


def truth(operation, x, weight, pointwise):
    if operation is depthwise:
        return F.conv2d(x, weight, stride=2, padding=1, groups=x.shape[1]).relu()
    return F.silu(F.conv2d(F.silu(F.conv2d(x, weight, padding=1, groups=x.shape[1])), pointwise))


def worst_error(operation, dtype) -> float:
    """The largest relative error of output and gradients."""
    torch.manual_seed(0)
    tensors = [(torch.randn(shape) / 3).to(dtype) for shape in ((2, 24, 15, 13), (24, 1, 3, 3), (16, 24, 1, 1))]
    used = 2 if operation is depthwise else 3
    results = []
    for function in (lambda *t: operation(dsconv_ext.functional, *t), lambda *t: truth(operation, *t)):
        exact = bool(results)
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        g = torch.cos(torch.arange(y.numel())).view(y.shape).to(dtype).to(y.dtype)
        results.append([y.detach(), *torch.autograd.grad(y, leaves[:used], g)])
    errors = [((a.double() - b).abs().max() / b.square().mean().sqrt()).item() for a, b in zip(*results, strict=True)]
    return max(errors) if all(e == e for e in errors) else float("inf")


def main() -> int:
    if _loader.error is not None:
        print(f"smoke: FAILED, the library was not loaded: {_loader.error}")
        return 1
    cases = [(operation, dtype) for operation in (depthwise, separable) for dtype in TOLERANCE]
    errors = {f"{op.__name__} {str(dtype)[6:]}": (worst_error(op, dtype), TOLERANCE[dtype]) for op, dtype in cases}
    passed = all(error <= limit for error, limit in errors.values())
    summary = ", ".join(f"{name} {error:.1e}" for name, (error, _) in errors.items())
    print(f"smoke: {'passed' if passed else 'FAILED'} in torch {torch.__version__}: {summary}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
