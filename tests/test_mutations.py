"""The judges themselves: they pass PyTorch's own composition and notice every mistake that is planted in it."""

from dataclasses import replace

import pytest
import torch

import oracle
from cases import Case
from judges import check_accuracy, check_exact, check_layout, composition, evaluate

DEPTHWISE = "dw n2c17h9w8k3s1x2d1p1x2 nhwc {} act=leaky_relu:0.2"
SEPARABLE = "sep n2c8h9w8k3s1d2p1:2o7 nchw {} mid=leaky_relu:0.2 act=relu6 res"
DTYPES = ("fp64", "fp32", "bf16", "fp16")


class Promised(torch.autograd.Function):
    """The identity; value and gradient get the strides that the library promises."""

    @staticmethod
    def forward(ctx, t, value_strides, gradient_strides):
        ctx.strides = gradient_strides
        return torch.empty_strided(t.shape, value_strides, dtype=t.dtype).copy_(t)

    @staticmethod
    def backward(ctx, g):
        return torch.empty_strided(g.shape, ctx.strides, dtype=g.dtype).copy_(g), None, None


def honest(case, tensors):
    def promised(name, t):
        follows_x = name in ("x", "residual")
        gradient = oracle.output_strides(tensors["x"], t.shape) if follows_x else torch.empty_like(t).stride()
        return Promised.apply(t, torch.empty_like(t).stride(), gradient)

    y = composition(case, {name: promised(name, t) for name, t in tensors.items()})
    strides = oracle.output_strides(tensors["x"], y.shape)
    return Promised.apply(y, strides, strides)


def on_tensors(change):
    """A mistake in what one of the tensors holds; ``change`` maps the dictionary of tensors to another."""
    return lambda case, tensors: honest(case, {**tensors, **change(tensors)})


def on_case(change):
    """A mistake in the numbers of the problem."""
    return lambda case, tensors: honest(replace(case, **change(case)), tensors)


def on_output(change):
    def function(case, tensors):
        y = honest(case, tensors)
        return y + change(y).detach() - y.detach()

    return function


class LossyGradient(torch.autograd.Function):
    """The identity, with a backward that loses the last column of the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx, g):
        g = g.clone(memory_format=torch.preserve_format)
        g[..., -1] = 0
        return g


def poisoned(y):
    y = y.clone(memory_format=torch.preserve_format)
    y[(0,) * y.dim()] = float("nan")
    return y


def one_pixel_off(y):
    y = y.clone(memory_format=torch.preserve_format)
    y[0, -1, -1, -1] = y[0, -1, 0, 0] + 1
    return y


def weight_name(tensors):
    return "weight" if "weight" in tensors else "depthwise_weight"


def bias_name(tensors):
    return "bias" if "bias" in tensors else "depthwise_bias"


COMMON = {
    "flipped kernel": on_tensors(lambda t: {weight_name(t): t[weight_name(t)].flip(-1)}),
    "transposed kernel": on_tensors(lambda t: {weight_name(t): t[weight_name(t)].mT}),
    "channels shifted by one": on_tensors(lambda t: {weight_name(t): t[weight_name(t)].roll(1, 0)}),
    "bias dropped": on_tensors(lambda t: {bias_name(t): t[bias_name(t)] * 0}),
    "batch ignored": on_tensors(lambda t: {"x": t["x"][:1].expand_as(t["x"])}),
    "padding off by one": on_case(lambda c: {"padding": tuple((lo - 1, hi + 1) for lo, hi in c.padding)}),
    "a NaN": on_output(poisoned),
    "one wrong pixel": on_output(one_pixel_off),
    "gradient of x loses a column": on_tensors(lambda t: {"x": LossyGradient.apply(t["x"])}),
    "gradient of the weight loses a tap": on_tensors(
        lambda t: {weight_name(t): LossyGradient.apply(t[weight_name(t)])}
    ),
}
DEPTHWISE_ONLY = {"wrong slope": on_case(lambda c: {"activation": ("leaky_relu", 0.1)})}
SEPARABLE_ONLY = {
    "wrong slope": on_case(lambda c: {"mid": ("leaky_relu", 0.1)}),
    "mid activation dropped": on_case(lambda c: {"mid": ("none", 0.0)}),
    "output activation dropped": on_case(lambda c: {"activation": ("none", 0.0)}),
    "residual dropped": on_tensors(lambda t: {"residual": t["residual"] * 0}),
    "pointwise weight transposed": on_tensors(lambda t: {"pointwise_weight": t["pointwise_weight"].flip(0, 1)}),
    "pointwise bias dropped": on_tensors(lambda t: {"pointwise_bias": t["pointwise_bias"] * 0}),
}
MUTANTS = [(DEPTHWISE, name, f) for name, f in {**COMMON, **DEPTHWISE_ONLY}.items()]
MUTANTS += [(SEPARABLE, name, f) for name, f in {**COMMON, **SEPARABLE_ONLY}.items()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("line", [DEPTHWISE, SEPARABLE], ids=["dw", "sep"])
def test_judges_pass_an_honest_composition(line, dtype):
    case = Case.parse(line.format(dtype))
    tensors = case.inputs(integer=True)
    check_accuracy(case, honest)
    if dtype != "bf16":  # PyTorch rounds before it adds the residual, and on some processors within sums
        check_exact(case, honest)
    assert evaluate(honest, case, tensors, torch.ones_like).y.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("judge", [check_exact, check_accuracy])
@pytest.mark.parametrize(
    ("line", "function"),
    [(line, f) for line, _, f in MUTANTS],
    ids=[f"{line.split()[0]}: {name}" for line, name, _ in MUTANTS],
)
def test_judges_notice(line, function, judge, dtype):
    with pytest.raises(AssertionError, match=line.split()[1]):
        judge(Case.parse(line.format(dtype)), function)


def test_half_precision_accumulation_is_noticed():
    """A depthwise sum rounded to bfloat16 after every tap is not exact."""

    def rounding(case, tensors):
        x, weight = torch.nn.functional.pad(tensors["x"], (2,) * 4), tensors["weight"]
        height, width = case.output_size
        y = torch.zeros(case.batch, case.channels, height, width, dtype=case.dtype)
        for u in range(5):
            for v in range(5):
                y = y + x[..., u : u + height, v : v + width] * weight[:, 0, u, v, None, None]
        return y

    case = Case.parse("dw n2c16h9w9k5s1d1p2 nchw bf16 bias=none")
    with pytest.raises(AssertionError, match="output: .* differ"):
        check_exact(case, rounding)


def test_a_wrong_layout_is_noticed():
    case = Case.parse("dw n2c8h5w6k3s1d1p1 nhwc fp32")
    tensors = case.inputs(integer=True)
    result = evaluate(honest, case, tensors, torch.ones_like)
    check_layout(case, tensors, result)
    result.y = result.y.contiguous()
    with pytest.raises(AssertionError, match="output strides"):
        check_layout(case, tensors, result)


def test_writing_an_input_is_noticed():
    def overwriting(case, tensors):
        y = honest(case, tensors)
        tensors["x"].detach().zero_()
        return y

    case = Case.parse("dw n2c8h5w6k3s1d1p1 nchw fp32")
    with pytest.raises(AssertionError, match="x was overwritten"):
        check_exact(case, overwriting)


def test_writing_beside_an_input_is_noticed():
    def overwriting(case, tensors):
        x = tensors["x"].detach()
        x.as_strided((1,), (1,), x.storage_offset() + x.numel()).zero_()
        return honest(case, tensors)

    case = Case.parse("dw n2c8h5w6k3s1d1p1 nchw fp32")
    with pytest.raises(AssertionError, match="memory around x"):
        check_exact(case, overwriting)
