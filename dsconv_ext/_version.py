"""The version of the package, and the oldest PyTorch whose stable ABI it is built for."""

__version__ = "0.1.0"
TORCH_MINIMUM = (2, 13)
