"""Load the shared library; when that fails, say why in one sentence instead of raising."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ._version import TORCH_MINIMUM

LIBRARY = Path(__file__).with_name("_C.abi3.so")

# What DSCONV_BACKEND may name: the only backend that computes. Without it: the compiled library, Triton, PyTorch.
BACKENDS = ("cuda", "triton", "torch", "cpu")
forced: str | None = os.environ.get("DSCONV_BACKEND") or None
if forced not in (None, *BACKENDS):
    raise ValueError(f"DSCONV_BACKEND: got {forced!r}, expected one of {', '.join(BACKENDS)}")

error: str | None = "the compiled library has not been asked for"


def load() -> None:
    """Load the library and register its operators; afterwards `error` is None, or the reason it could not be loaded."""
    global error
    error = _obstacle()
    if error is None:
        try:
            torch.ops.load_library(str(LIBRARY))
        except (OSError, RuntimeError) as failure:
            cause = str(failure.__cause__ or failure).splitlines()[0]
            error = f"{LIBRARY.name} does not load here, it was probably built for another platform: {cause}"


def _obstacle() -> str | None:
    """What forbids an attempt to load the library."""
    if forced in ("triton", "torch"):
        return f"DSCONV_BACKEND={forced} leaves the library alone"
    if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_MINIMUM:
        return f"dsconv_ext was built for torch >= {'.'.join(map(str, TORCH_MINIMUM))}, you have {torch.__version__}"
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built: run `make build`, or `pip install --no-build-isolation .`"
    return None
