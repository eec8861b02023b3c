"""Autocast: both operations are cast as convolutions are."""

import pytest
import torch

import operators
from dsconv_ext import functional as F
from dsconv_ext import nn


def convolve(x, weight, bias):
    return F.depthwise_conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_those_of_cast_inputs(dtype):
    tensors = operators.depthwise_tensors(torch.float32, requires_grad=False)
    with torch.autocast("cpu", dtype):
        y = convolve(*tensors)
        reference = torch.nn.functional.conv2d(*tensors, padding=1, groups=2)
    assert y.dtype == reference.dtype == dtype
    assert torch.equal(y, convolve(*[t.to(dtype) for t in tensors]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_separable(dtype):
    tensors = operators.separable_tensors(torch.float32, requires_grad=False)

    def f(x, dw, pw, db, pb, r):
        return F.separable_conv2d(x, dw, pw, db, pb, padding=1, mid_activation="relu6", residual=r)

    with torch.autocast("cpu", dtype):
        y = f(*tensors)
    assert y.dtype == dtype
    assert torch.equal(y, f(*[t.to(dtype) for t in tensors]))


def test_gradients_have_the_dtype_of_the_parameters():
    tensors = operators.depthwise_tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(*tensors)
    g = torch.randn(y.shape).bfloat16()
    gradients = torch.autograd.grad(y, tensors, g)
    low = [t.detach().bfloat16().requires_grad_() for t in tensors]
    reference = torch.autograd.grad(convolve(*low), low, g)
    for gradient, expected in zip(gradients, reference, strict=True):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected.float())


def test_float64_and_disabled_regions_are_left_alone():
    tensors = operators.depthwise_tensors(requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(*tensors).dtype == torch.nn.functional.conv2d(*tensors, padding=1, groups=2).dtype
        with torch.autocast("cpu", enabled=False):
            assert convolve(*[t.float() for t in tensors]).dtype == torch.float32


def test_mixed_dtypes_meet_in_the_autocast_dtype():
    """Half weights with a float input are an error outside autocast and fine inside."""
    x, weight, bias = operators.depthwise_tensors(torch.float32, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = convolve(x, weight.bfloat16(), bias)
    assert torch.equal(y, convolve(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


@pytest.mark.parametrize("op", ["dw", "sep"])
def test_the_operators_themselves(op):
    if op == "dw":
        tensors, f = operators.depthwise_tensors(torch.float32, requires_grad=False), operators.depthwise
    else:
        tensors, f = operators.separable_tensors(torch.float32, requires_grad=False), operators.separable
    with torch.autocast("cpu", torch.bfloat16):
        y = f(*tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, f(*[t.bfloat16() for t in tensors]))


def test_a_module_in_training():
    torch.manual_seed(0)
    module = nn.DepthwiseSeparableConv2d(8, 12, 3, padding=1, mid_activation="relu6")
    x = torch.randn(2, 8, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
    exact = module(x)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_transforms_under_autocast():
    x, weight, bias = operators.depthwise_tensors(torch.float32, requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        g = torch.func.grad(lambda w: convolve(x, w, bias).float().square().sum())(weight)
    assert g.dtype == torch.float32
    low = [t.bfloat16() for t in (x, weight, bias)]
    reference = torch.func.grad(lambda w: convolve(low[0], w, low[2]).float().square().sum())(low[1])
    assert torch.equal(g, reference.float())
