"""Tensors of more than kStreamedBytes (csrc/cpu/row_stage.h), whose outputs go past the caches: exact values."""

import pytest
import torch
import torch.nn.functional as TF

from dsconv_ext import functional as F

STREAMED = 8 << 20
# N, C, H, W, stride, dilation: whole cache lines per pixel, lines that pixels share, a stride, dilation over small
# planes, and a large one.
SHAPES = [
    (2, 32, 129, 160, 1, 1),
    (2, 37, 120, 131, 1, 1),
    (3, 72, 127, 129, 2, 1),
    (9, 211, 27, 28, 1, 2),
    (2, 64, 256, 260, 1, 1),
]
# Outputs of the pointwise stage: whole panels, a panel that ends with a cache line, one that ends in it.
OUTPUTS = [64, 48, 37]


def small_integers(*shape, dtype):
    return torch.randint(-1, 2, shape).to(dtype)


def arranged(x, layout):
    if layout == "permuted":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.contiguous(
        memory_format=getattr(torch, "channels_last" if layout == "channels_last" else "contiguous_format")
    )


layouts = pytest.mark.parametrize("layout", ["channels_last", "contiguous", "permuted"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


@layouts
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_input_gradient(shape, dtype, layout):
    n, c, h, w, stride, dilation = shape
    torch.manual_seed(0)
    n *= 2 if dtype.itemsize == 2 else 1
    x = small_integers(n, c, h, w, dtype=dtype)
    x = arranged(x, layout)
    weight, bias = small_integers(c, 1, 3, 3, dtype=dtype), small_integers(c, dtype=dtype)
    x.requires_grad_()
    y = F.depthwise_conv2d(x, weight, bias, stride, dilation, dilation)
    grad = arranged(small_integers(*y.shape, dtype=dtype), layout)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    assert x.nbytes + y.nbytes > STREAMED

    wide = x.detach().float().requires_grad_()
    expected = TF.conv2d(wide, weight.float(), bias.float(), stride, dilation, dilation, c)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.float())
    assert torch.equal(y.float(), expected)
    assert torch.equal(grad_x.float(), expected_grad)


@layouts
@dtypes
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("fuse", ["always", "never"])
def test_separable(fuse, outputs, dtype, layout):
    """Sums of few channels and taps, exact in every dtype."""
    torch.manual_seed(0)
    n, c, h, w = 4 if dtype.itemsize == 2 else 2, 16, 160, 161
    x = arranged(small_integers(n, c, h, w, dtype=dtype), layout)
    depthwise = small_integers(c, 1, 3, 3, dtype=dtype)
    pointwise = small_integers(outputs, c, 1, 1, dtype=dtype) * (torch.arange(c) % 4 == 0).view(1, c, 1, 1)
    bias, residual = (
        small_integers(outputs, dtype=dtype),
        arranged(small_integers(n, outputs, h, w, dtype=dtype), layout),
    )
    y = F.separable_conv2d(x, depthwise, pointwise, None, bias, 1, 1, activation="relu", residual=residual, fuse=fuse)
    assert x.nbytes + y.nbytes > STREAMED
    middle = TF.conv2d(x.float(), depthwise.float(), None, 1, 1, 1, c)
    expected = TF.conv2d(middle, pointwise.float(), bias.float()) + residual.float()
    assert torch.equal(y.float(), expected.relu())


@dtypes
@pytest.mark.parametrize("fuse", ["always", "never"])
@pytest.mark.parametrize(
    ("stride", "dilation", "padding"), [(1, 1, 1), (2, 1, 0), (1, 3, 0), ((3, 1), 1, (5, 1))], ids=str
)
def test_tiles_that_fetch_the_input_of_the_next(stride, dilation, padding, fuse, dtype):
    torch.manual_seed(0)
    n = {2: 6, 4: 3, 8: 2}[dtype.itemsize]
    x = small_integers(n, 48, 170, 161, dtype=dtype).to(memory_format=torch.channels_last)
    assert x.nbytes > 13 << 20
    depthwise, pointwise = small_integers(48, 1, 3, 3, dtype=dtype), small_integers(8, 48, 1, 1, dtype=dtype)
    pointwise *= (torch.arange(48) % 12 == 0).view(1, 48, 1, 1)
    y = F.separable_conv2d(x, depthwise, pointwise, None, None, stride, padding, dilation, fuse=fuse)
    middle = TF.conv2d(x.float(), depthwise.float(), None, stride, padding, dilation, 48)
    assert torch.equal(y.float(), TF.conv2d(middle, pointwise.float()))


@dtypes
@pytest.mark.parametrize("fuse", ["always", "never"])
def test_weights_that_are_fetched_ahead(fuse, dtype):
    """Panels of weights beyond the caches (kFetchedBytes), the last of which is not whole."""
    torch.manual_seed(0)
    c, k = (2100, 2101) if dtype.itemsize < 8 else (1200, 1101)
    x = small_integers(2, c, 9, 7, dtype=dtype).to(memory_format=torch.channels_last)
    depthwise, pointwise = small_integers(c, 1, 3, 3, dtype=dtype), small_integers(k, c, 1, 1, dtype=dtype)
    pointwise *= (torch.arange(c) % 500 == 0).view(1, c, 1, 1)
    assert pointwise.nbytes > 8 << 20
    y = F.separable_conv2d(x, depthwise, pointwise, None, None, 1, 1, fuse=fuse)
    middle = TF.conv2d(x.float(), depthwise.float(), None, 1, 1, 1, c)
    assert torch.equal(y.float(), TF.conv2d(middle, pointwise.float()))
