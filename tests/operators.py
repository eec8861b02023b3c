"""Direct calls of the operators, for the tests that go below the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

import dsconv_ext  # noqa: F401 (defines the operators)
import oracle
from cases import parse_activation

ops = torch.ops.dsconv
READ_OFF_OUTPUT = ("relu", "relu6", "hardsigmoid", "sigmoid", "tanh", "leaky_relu", "elu")


def geometry(stride=1, padding=1, dilation=1, spatial=2) -> tuple[list[int], list[int], list[int]]:
    return [stride] * spatial, [padding] * (2 * spatial), [dilation] * spatial


def reads_output(activation: tuple[str, float]) -> bool:
    """Whether ``*_backward`` takes the derivative of the output activation from the output."""
    return activation[0] in READ_OFF_OUTPUT and activation[1] >= 0


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", where=None) -> Tensor:
    return ops.depthwise(x, weight, bias, *(where or geometry()), *parse_activation(activation))


def depthwise_backward(g, x, weight, bias, activation: str = "none", where=None, needs=(True, True, True)):
    chosen, where = parse_activation(activation), where or geometry()
    output = ops.depthwise(x, weight, bias, *where, *chosen) if reads_output(chosen) else None
    return ops.depthwise_backward(g, x, weight, bias, output, *where, *chosen, *needs)


def separable(
    x, dw, pw, dw_bias, pw_bias, residual, mid: str = "none", activation: str = "none", where=None, fuse="auto"
):
    chosen = (*parse_activation(mid), *parse_activation(activation))
    return ops.separable(x, dw, pw, dw_bias, pw_bias, residual, *(where or geometry()), *chosen, fuse)


def separable_backward(
    g, x, dw, pw, dw_bias, pw_bias, residual, mid: str = "none", activation: str = "none", where=None, needs=(True,) * 6
):
    tensors, where = (x, dw, pw, dw_bias, pw_bias, residual), where or geometry()
    output = separable(*tensors, mid, activation, where) if reads_output(parse_activation(activation)) else None
    chosen = (*parse_activation(mid), *parse_activation(activation))
    return ops.separable_backward(g, *tensors, output, *where, *chosen, *needs)


def depthwise_truth(x, weight, bias, activation: str = "none"):
    return oracle.depthwise(x, weight, bias, (1, 1), ((1, 1), (1, 1)), (1, 1), parse_activation(activation))


def separable_truth(x, dw, pw, dw_bias, pw_bias, residual, mid: str = "none", activation: str = "none"):
    where = (1, 1), ((1, 1), (1, 1)), (1, 1)
    y = oracle.separable_sum(x, dw, pw, dw_bias, pw_bias, residual, *where, parse_activation(mid))
    return oracle.activate(y, parse_activation(activation))


def random(*shapes: tuple[int, ...], dtype=torch.float64, seed: int = 0, requires_grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(requires_grad) for s in shapes]


def depthwise_tensors(dtype=torch.float64, requires_grad: bool = True) -> list[Tensor]:
    """x, weight and bias of a small problem with multiplier 2."""
    return random((2, 2, 4, 3), (4, 1, 3, 3), (4,), dtype=dtype, requires_grad=requires_grad)


def separable_tensors(dtype=torch.float64, requires_grad: bool = True) -> list[Tensor]:
    """x, the weights, the biases and the residual of a small problem with multiplier 2."""
    shapes = (2, 2, 4, 3), (4, 1, 3, 3), (3, 4, 1, 1), (4,), (3,), (2, 3, 4, 3)
    return random(*shapes, dtype=dtype, requires_grad=requires_grad)
