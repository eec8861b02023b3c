"""Every activation in both places, with its parameters: values, derivatives, kinks, NaN and infinity as in ATen."""

import math

import pytest
import torch

import oracle
from cases import Case, parse_activation
from dsconv_ext import functional as F
from judges import check, spelled
from tolerance import DTYPES

ACTIVATIONS = [*oracle.ACTIVATIONS, "leaky_relu:0.3", "leaky_relu:-0.2", "leaky_relu:0", "elu:0.4", "elu:-0.4", "elu:0"]
PLACES = (
    "dw n2c17h7w6k3s1d1p1 nhwc {} act={}",
    "sep n2c17h7w6k3s1d1p1o9 nhwc {} mid={} act=none",
    "sep n2c8h7w6k3s1d1p1o9 nchw {} act={} res",
)
PIECEWISE = ("none", "relu", "relu6", "hardswish", "hardsigmoid", "leaky_relu", "leaky_relu:0.3", "leaky_relu:-0.2")
KINKS = [-math.inf, -7.0, -3.0, -0.0, 0.0, 0.5, 3.0, 6.0, 7.0, math.inf, math.nan]


def through(place: str, x, activation: str):
    """``activation`` of ``x`` by an identity convolution, one value per pixel of the only channel."""
    one = torch.ones(1, 1, 1, 1, dtype=x.dtype)
    chosen = spelled(parse_activation(activation))
    x = x.view(1, 1, 1, -1)
    if place == "depthwise":
        return F.depthwise_conv2d(x, one, activation=chosen).view(-1)
    options = {"mid_activation": chosen} if place == "mid" else {"activation": chosen}
    return F.separable_conv2d(x, one, one, **options).view(-1)


def expected(x, activation: str):
    return oracle.activate(x, parse_activation(activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES, ids=["depthwise", "mid", "output"])
def test_values_and_gradients(place, activation, dtype):
    check(Case.parse(place.format(dtype, activation)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_over_the_range(activation):
    """Every piece of the polynomials behind the float32 activations, and what lies where they meet."""
    x = torch.linspace(-12, 12, 200_001)
    y, reference = through("depthwise", x, activation), expected(x.double(), activation)
    torch.testing.assert_close(y.double(), reference, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", ["depthwise", "mid", "output"])
def test_values_at_special_points(place, activation, dtype, library):
    """NaN stays NaN, and infinities, zeros and kinks give what ATen gives in float64 (its vectors differ there)."""
    x = torch.tensor(KINKS, dtype=DTYPES[dtype]).repeat(3)
    y, reference = through(place, x, activation), expected(x.double(), activation).to(x.dtype)
    torch.testing.assert_close(y, reference, equal_nan=True, rtol=4 * torch.finfo(x.dtype).eps, atol=1e-6)


def derivative(x, g, function):
    leaf = x.clone().requires_grad_()
    function(leaf).backward(g)
    return leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", PIECEWISE)
@pytest.mark.parametrize("place", ["depthwise", "mid", "output"])
def test_derivatives_at_kinks(place, activation, dtype):
    """At a kink the derivative is ATen's choice; at NaN, where ATen's vectors and scalars differ, one of the two."""
    x = torch.tensor(KINKS, dtype=DTYPES[dtype]).repeat(3)
    g = torch.linspace(0.5, 2, len(x)).to(x.dtype)
    ours = derivative(x, g, lambda t: through(place, t, activation))
    vectors = derivative(x.repeat(64), g.repeat(64), lambda t: expected(t, activation))[: len(x)]
    scalars = torch.stack([derivative(t, s, lambda u: expected(u, activation)) for t, s in zip(x, g, strict=True)])
    options = {"equal_nan": True, "rtol": 4 * torch.finfo(x.dtype).eps, "atol": 1e-6}
    agree = torch.isclose(ours, vectors, **options) | torch.isclose(ours, scalars, **options)
    assert bool(agree.all()), (
        f"at {x[~agree].tolist()}: {ours[~agree]}, ATen has {vectors[~agree]} or {scalars[~agree]}"
    )


@pytest.mark.parametrize("kink", [-3.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hardsigmoid_between_the_stages_is_flat_where_pytorch_has_it(dtype, kink):
    """Next to a kink the rounded pre-activation decides, not the rounded value, which reaches 0 or 1 earlier."""
    bias = torch.arange(-32, 33).to(dtype) * (torch.finfo(dtype).eps / 8)
    x = torch.full((1, len(bias), 1, 1), kink, dtype=dtype, requires_grad=True)
    one, ones = torch.ones(len(bias), 1, 1, 1, dtype=dtype), torch.ones(1, len(bias), 1, 1, dtype=dtype)
    F.separable_conv2d(x, one, ones, bias, mid_activation="hardsigmoid").backward(torch.ones(1, 1, 1, 1, dtype=dtype))
    rounded = (kink + bias.double()).to(dtype)
    assert 0 < (rounded.abs() < 3).sum() < len(bias)
    assert torch.equal(x.grad.view(-1), torch.where(rounded.abs() < 3, 1 / 6, 0.0).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_far_out(activation, dtype):
    """Where the activation saturates nothing overflows: the derivative is ATen's, up to the rounding of the output."""
    x = torch.tensor([-200.0, -100.0, -50.0, -20.0, 20.0, 50.0, 100.0, 200.0], dtype=DTYPES[dtype])
    eps = torch.finfo(x.dtype).eps
    for place in ("depthwise", "mid", "output"):
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        through(place, ours, activation).backward(torch.ones_like(x))
        expected(theirs, activation).backward(torch.ones_like(x))
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=4 * eps, atol=max(1e-5, eps / 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_a_special_input_reaches_its_own_outputs_only(special, layout, dtype):
    """One NaN or infinity of the input spoils the outputs whose window holds it, in its own channel, and no other."""
    case = Case.parse(f"dw n2c17h9w20k3s1d1p1 {layout} {dtype}")
    tensors = case.inputs(integer=True)
    tensors["weight"].fill_(1)
    tensors["x"][1, 5, 4, 16] = special
    y = F.depthwise_conv2d(*tensors.values(), padding=1)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[1, 5, 3:6, 15:18] = True
    assert bool(y[~touched].isfinite().all())
    assert bool((y[touched].isnan() if math.isnan(special) else y[touched] == special).all())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_a_special_weight_meets_no_padding(special, layout, dtype, library):
    """Padding is left out, not multiplied: zero times an infinite tap does not appear.

    ``nn.Conv2d`` has it so where oneDNN computes, which for float16 depends on the processor; so not compared with it.
    """
    case = Case.parse(f"dw n1c8h5w6k3s1d1p1 {layout} {dtype} bias=none")
    x, weight = torch.ones_like(case.inputs(integer=True)["x"]), torch.ones(8, 1, 3, 3, dtype=case.dtype)
    reference = torch.nn.functional.conv2d(x, weight, padding=1, groups=8)
    weight[3, 0, 0, 0] = special
    reference[:, 3, 1:, 1:] = special  # the windows whose first tap lies inside
    y = F.depthwise_conv2d(x, weight, padding=1)
    torch.testing.assert_close(y, reference, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fuse", ["always", "never"])
def test_a_nan_in_the_middle_reaches_every_output_channel(fuse, dtype):
    x = torch.ones(1, 17, 3, 20, dtype=DTYPES[dtype])
    x[0, 5, 1, 16] = math.nan
    weight, pointwise = torch.ones(17, 1, 1, 1, dtype=x.dtype), torch.ones(9, 17, 1, 1, dtype=x.dtype)
    y = F.separable_conv2d(x, weight, pointwise, mid_activation="relu", activation="relu6", fuse=fuse)
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, :, 1, 16] = True
    assert torch.equal(y.isnan(), touched)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_infinite_gradient_beside_padding_meets_no_padding(layout, dtype):
    """The taps that reach into the padding get no share of it; those that pair it with a zero input get NaN."""
    x = torch.ones(1, 17, 5, 9, dtype=DTYPES[dtype]).to(memory_format=layout)
    x[0, :, 1, 1] = 0
    weight = torch.ones(17, 1, 3, 3, dtype=x.dtype, requires_grad=True)
    y = F.depthwise_conv2d(x.requires_grad_(), weight, padding=1)
    g = torch.zeros_like(y)
    g[0, :, 0, 0] = math.inf
    x_grad, weight_grad = torch.autograd.grad(y, (x, weight), g)
    zero_times_inf, inside = math.nan, math.inf
    # Output (0, 0) pairs tap (u, v) with input (u - 1, v - 1); every other output has gradient 0.
    expected = torch.tensor([[0, 0, 0], [0, inside, inside], [0, inside, zero_times_inf]], dtype=x.dtype)
    assert torch.equal(weight_grad.nan_to_num(-1), expected.expand_as(weight_grad).nan_to_num(-1))
    reached = torch.zeros_like(x_grad)
    reached[0, :, :2, :2] = math.inf
    assert torch.equal(x_grad, reached)
