"""Depthwise and depthwise-separable convolutions for PyTorch, with hand-written kernels.

Examples
--------
>>> import torch, dsconv_ext
>>> x = torch.randn(2, 8, 16, 16).to(memory_format=torch.channels_last)
>>> layer = dsconv_ext.nn.DepthwiseSeparableConv2d(8, 24, 3, padding=1, mid_activation="relu6", activation="relu6")
>>> layer(x).shape
torch.Size([2, 24, 16, 16])
"""

from . import _loader
from ._version import __version__

_loader.load()  # before the operators are used

from . import functional, nn, reference  # noqa: E402
from .backends import Call, Candidate, Explanation, empty_cache, explain  # noqa: E402
from .convert import Report, convert, revert  # noqa: E402

__all__ = [
    "Call",
    "Candidate",
    "Explanation",
    "Report",
    "__version__",
    "convert",
    "empty_cache",
    "explain",
    "functional",
    "nn",
    "reference",
    "revert",
]
