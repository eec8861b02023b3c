"""The problem strings, the generator of problems and the error measure."""

import math

import pytest
import torch

import cases
import oracle
import tolerance
from cases import Case


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_lines_round_trip(family):
    for case in cases.sample(family, 200):
        assert Case.parse(str(case)) == case
    for line in cases.FIXED[family]:
        assert str(Case.parse(line)) == line


@pytest.mark.parametrize(
    "line",
    [
        "dw n1c8w9k3s1d1p1 nhwc fp31",
        "dw n1c8w9k3s1d1p1 nhcw fp32",
        "dwise n1c8w9k3s1d1p1 nhwc fp32",
        "dw n1c8h7w9k3x3x3s1d1p1 nhwc fp32",
        "dw n1c8w9k3s1d1p1 nhwc fp32 act=swish",
        "dw n1c8w9k3s1d1p1 nhwc fp32 fast",
        "dw n1c8w9k3s1d1p1n2 nhwc fp32",
        "dw n1c8w9k3s1d1p-1 nhwc fp32",
    ],
)
def test_a_wrong_line_is_refused(line):
    with pytest.raises(ValueError):
        Case.parse(line)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_generation_is_repeatable_and_covers_every_value(family):
    generated = cases.generate(family, 200)
    assert generated == cases.generate(family, 200)
    assert generated[:20] != cases.generate(family, 20, seed=1)
    assert {c.channels for c in generated} == set(cases.CHANNELS)
    assert {c.layout for c in generated} == set(cases.LAYOUTS)
    assert {c.dtype_name for c in generated} == set(tolerance.DTYPES)
    assert {c.activation[0] for c in generated} == set(oracle.ACTIVATIONS)
    assert {c.multiplier for c in generated} == {1, 2, 3}
    assert {s for c in generated for s in c.stride} == {s for c in generated for s in c.dilation} == {1, 2, 3}
    assert {k % 2 for c in generated for k in c.kernel} == {0, 1}
    assert any(lo != hi for c in generated for lo, hi in c.padding)
    assert any(lo > k for c in generated for (lo, _), k in zip(c.padding, c.kernel, strict=True))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_layouts_keep_values(layout, shape):
    t = torch.randn(shape)
    arranged = cases.arrange(t, layout)
    repeated = {"expanded": t[:1], "broadcast": t[:, :1]}.get(layout, t)
    assert torch.equal(arranged, repeated.expand(shape))
    assert (arranged.stride(1) == 1) == (
        layout in ("nhwc", "nhwc_sliced") or layout == "transposed" and len(shape) == 3
    )


@pytest.mark.parametrize("family", ["sep1d", "sep2d"])
def test_integer_problems_stay_exact(family):
    """The depthwise value of every separable integer problem fits bfloat16, so that rounding it changes nothing."""
    for case in map(Case.exact, cases.sample(family, 20)):
        tensors = {name: t.double() for name, t in case.inputs(integer=True).items()}
        names = ("x", "depthwise_weight", "depthwise_bias")
        middle = oracle.depthwise(*map(tensors.get, names), *case.geometry, case.mid)
        assert torch.equal(middle.bfloat16().double(), middle), str(case)


@pytest.mark.parametrize("family", ["dw1d", "dw2d", "dw3d"])
def test_the_judge_agrees_with_the_convolution_of_pytorch(family):
    """The definition that is used in float64 is ``F.conv`` with groups, values and gradients."""
    for case in cases.generate(family, 12):
        tensors = [t.double().requires_grad_() for t in case.inputs(integer=False).values()]
        x, weight, bias = (*tensors, None)[:3]
        stride, padding, dilation = case.geometry
        padded = oracle.pad(x, padding)
        ours = oracle.windows_sum(padded, weight, bias, stride, dilation)
        theirs = oracle.CONV[case.spatial](padded, weight, bias, stride, 0, dilation, case.channels)
        g = case.upstream(ours, integer=False)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, tensors, g), torch.autograd.grad(theirs, tensors, g))


def test_the_hardsigmoid_of_the_judge_is_that_of_pytorch():
    """Float64 has its own formula of the same function."""
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64, requires_grad=True)
    ours, theirs = oracle.activate(x, ("hardsigmoid", 0.0)), torch.nn.functional.hardsigmoid(x)
    torch.testing.assert_close(ours, theirs)
    g = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(ours, x, g), torch.autograd.grad(theirs, x, g), rtol=1e-6, atol=1e-7)


def test_error_measure():
    reference = torch.tensor([3.0, 4.0], dtype=torch.float64)
    rms = math.sqrt(12.5)
    assert tolerance.error(reference, reference) == 0
    assert tolerance.error(reference + torch.tensor([0.0, 0.5]), reference) == pytest.approx(0.5 / rms)
    draws = torch.stack([reference, reference])
    assert tolerance.error(draws + torch.tensor([[0.0, 0.5], [0.25, 0.0]]), draws, 2) == pytest.approx(0.375 / rms)
    assert tolerance.error(torch.zeros(3), torch.zeros(3)) == 0
    assert tolerance.error(torch.tensor([1e-9]), torch.zeros(1)) == math.inf
    assert tolerance.error(torch.zeros(2), torch.zeros(3)) == math.inf
    for bad in (math.nan, math.inf):
        assert tolerance.error(torch.tensor([3.0, bad]), reference) == math.inf
        assert tolerance.error(torch.tensor([bad, 4.0]), reference) == math.inf


def test_bound_is_twice_the_yardstick_plus_four_ulp():
    eps = torch.finfo(torch.bfloat16).eps
    assert tolerance.bound(torch.bfloat16, 3 * eps) == pytest.approx(10 * eps)
    eps32, eps64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
    assert tolerance.bound(torch.float64, 3 * eps32) == pytest.approx(76 * eps64)


def test_equality_takes_nan_for_wrong():
    nan = torch.tensor([math.nan])
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        tolerance.assert_equal("y", nan, nan.double(), "a line")
