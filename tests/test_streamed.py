"""Tensors of more than kStreamedBytes (csrc/cpu/depthwise_rows.h), whose outputs go past the caches: exact values."""

import pytest
import torch
import torch.nn.functional as TF

from dsconv_ext import functional as F

# N, C, H, W, stride, dilation: whole cache lines per pixel, lines that pixels share, planes of a few lines, long rows.
SHAPES = [(2, 32, 129, 160, 1, 1), (2, 37, 120, 131, 1, 1), (3, 56, 97, 99, 2, 1), (9, 211, 27, 28, 1, 2)]


def small_integers(*shape, dtype):
    return torch.randint(-1, 2, shape).to(dtype)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_input_gradient(shape, dtype, layout):
    n, c, h, w, stride, dilation = shape
    torch.manual_seed(0)
    n *= 2 if dtype.itemsize == 2 else 1
    x = small_integers(n, c, h, w, dtype=dtype)
    assert 2 * x.nbytes // stride**2 > 8 << 20 or stride > 1
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "permuted":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    weight, bias = small_integers(c, 1, 3, 3, dtype=dtype), small_integers(c, dtype=dtype)
    x.requires_grad_()
    y = F.depthwise_conv2d(x, weight, bias, stride, dilation, dilation)
    grad = small_integers(*y.shape, dtype=dtype)
    if layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    (grad_x,) = torch.autograd.grad(y, x, grad)

    wide = x.detach().float().requires_grad_()
    expected = TF.conv2d(wide, weight.float(), bias.float(), stride, dilation, dilation, c)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.float())
    assert torch.equal(y.float(), expected)
    assert torch.equal(grad_x.float(), expected_grad)
