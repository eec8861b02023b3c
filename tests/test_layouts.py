"""Memory layouts: which inputs are accepted, which strides come out, and that every element of an output is written."""

import pytest
import torch

import cases
import oracle
from cases import Case
from dsconv_ext import functional as F
from judges import check, check_exact, check_layout, composition, evaluate, subject
from tolerance import assert_equal

LINES = (
    "dw n2c17w13k3s1d1p1 {} {} act=relu",
    "dw n2c17h7w6k3s2d1p1 {} {} act=silu",
    "dw n2c8t4h5w3k2s1d1p1:0 {} {} act=hardswish",
    "sep n2c17w13k3s1d1p1o9 {} {} mid=relu6 act=relu res",
    "sep n2c17h7w6k3s1d2p2o9 {} {} mid=silu act=relu res",
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("line", LINES)
def test_every_layout(line, layout, dtype):
    check(Case.parse(line.format(layout, dtype)))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    "line",
    [
        "dw n2c1h7w6k3s1d1p1 {} fp32",
        "dw n1c8h1w1k1s1d1p0 {} fp32",
        "dw n2c8h9w1k3s1d1p1 {} fp32",
        "dw n2c8h1w9k1x3s1d1p0x1 {} bf16",
        "dw n1c1h1w1k3s1d1p1 {} fp32",
        "dw n1c1w5k3s1d1p1m3 {} fp32",
        "sep n2c1h7w6k3s1d1p1o1 {} fp32 res",
        "sep n2c8h1w1k3s1d1p1o5 {} bf16 res",
        "sep n1c1h1w1k1s1d1p0o1 {} fp32 res",
    ],
)
def test_degenerate_sizes(line, layout):
    """One channel, one-wide maps, one pixel: the strides of such tensors are ambiguous, the rule is not."""
    check(Case.parse(line.format(layout)))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    "line",
    [
        "dw n0c8w5k3s1d1p1 {} fp32 act=relu",
        "dw n0c8h5w5k3s1d1p1 {} bf16",
        "dw n0c8t5h5w5k3s1d1p1m2 {} fp32",
        "sep n0c8w5k3s1d1p1o4 {} fp32",
        "sep n0c8h5w5k3s1d1p1o4 {} fp32 mid=silu act=gelu res",
    ],
)
def test_an_empty_batch(line, layout):
    """The output is empty, of the right shape, and the gradients of the parameters are zero."""
    case = Case.parse(line.format(layout))
    tensors = case.inputs(integer=True)
    result = evaluate(subject, case, tensors, torch.empty_like)
    assert result.y.shape == (0, case.out_channels or case.channels * case.multiplier, *case.output_size)
    for name, gradient in result.gradients.items():
        assert gradient.shape == tensors[name].shape and gradient.dtype == case.dtype
        assert_equal(f"gradient of {name}", gradient, torch.zeros(gradient.shape), str(case))


@pytest.mark.parametrize(
    "line",
    [
        "dw n1c8w9k3s1d1p1 nchw fp32 act=relu",
        "dw n1c8h9w7k3s2d1p1 nchw fp32",
        "dw n1c8t4h5w6k3s1d1p1 nchw bf16",
        "sep n1c8w9k3s1d1p1o5 nchw fp32 res",
        "sep n1c8h9w7k3s2d1p1o5 nchw bf16 mid=relu res",
    ],
)
def test_unbatched(line):
    """An input without batch dimension gives the batched answer without it, and gradients of the inputs' own shapes."""
    case = Case.parse(line)

    def unbatched(case, tensors):
        return subject(case, {n: t.squeeze(0) if n in ("x", "residual") else t for n, t in tensors.items()}).unsqueeze(
            0
        )

    check(case, unbatched)
    tensors = case.inputs(integer=True)
    x = tensors["x"][0]
    residual = {"residual": tensors["residual"][0]} if case.residual else {}
    y = subject(case, {**tensors, "x": x, **residual})
    assert y.shape == (case.out_channels or case.channels, *case.output_size)


@pytest.mark.parametrize("arrange", ["nchw", "nhwc", "sliced", "transposed", "permuted", "expanded"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    "line", ["dw n2c8h6w6k3s1d1p1 {} fp32 act=relu", "sep n2c8h6w6k3s1d1p1o7 {} bf16 mid=relu act=relu res"]
)
def test_upstream_gradients_of_every_layout(line, layout, arrange):
    case = Case.parse(line.format(layout))
    tensors = case.inputs(integer=True)

    def g(y):
        return cases.arrange(case.upstream(y, integer=True), arrange)

    ours = evaluate(subject, case, tensors, g)
    truth = evaluate(composition, case, {n: t.double() for n, t in tensors.items()}, g)
    for (name, value), (_, reference) in zip(ours.items(), truth.items(), strict=True):
        assert_equal(name, value, reference, f"{case} upstream {arrange}")
    check_layout(case, tensors, ours)


@pytest.mark.parametrize("line", ["dw n2c8h6w6k3s1d1p1 nhwc fp32", "sep n2c8h6w6k3s1d1p1o7 nchw fp32 res"])
def test_the_gradient_of_a_sum(line):
    """``sum().backward()`` sends an expanded scalar."""
    case = Case.parse(line)
    tensors = case.inputs(integer=True)
    ours = evaluate(subject, case, tensors, lambda y: torch.ones((), dtype=y.dtype).expand(y.shape))
    truth = evaluate(composition, case, {n: t.double() for n, t in tensors.items()}, torch.ones_like)
    for (name, value), (_, reference) in zip(ours.items(), truth.items(), strict=True):
        assert_equal(name, value, reference, str(case))


@pytest.mark.parametrize("layout", ["nhwc", "sliced", "nhwc_sliced", "transposed", "permuted"])
@pytest.mark.parametrize("line", ["dw n2c8h6w6k3s1d1p1 nchw fp32 act=relu", "sep n2c8h6w6k3s1d1p1o7 nhwc bf16 res"])
def test_weights_and_residuals_of_every_layout(line, layout):
    """Values do not depend on the layout of weights and residual; gradients follow the weights, the residual's x."""
    case = Case.parse(line)

    tensors = case.inputs(integer=True)
    leaves = {n: cases.arrange(t, layout) if n != "x" and t.dim() > 1 else t for n, t in tensors.items()}
    plain = evaluate(subject, case, tensors, lambda y: case.upstream(y, integer=True))
    ours = evaluate(subject, case, leaves, lambda y: case.upstream(y, integer=True))
    for (name, value), (_, reference) in zip(ours.items(), plain.items(), strict=True):
        assert_equal(name, value, reference.double(), f"{case} with weights {layout}")
    for name, gradient in ours.gradients.items():
        if name == "residual":
            assert gradient.stride() == oracle.output_strides(tensors["x"], gradient.shape)
        elif name != "x":
            assert gradient.stride() == torch.empty_like(leaves[name]).stride(), name


def test_fresh_memory_is_nan():
    """What the suite relies on to see an element that a kernel left out: allocations hold NaN.

    Blocks of less than about a kilobyte may come from glibc's per-thread cache, which does not fill them.
    """
    for n in (1000, 2000, 10_000, 100_000, 5_000_000):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert bool(torch.empty(n, dtype=dtype).isnan().all())
            assert bool(torch.empty_strided((n,), (1,), dtype=dtype).isnan().all())


@pytest.mark.parametrize("channels", [1, 7, 8, 15, 16, 17, 24, 37, 96])
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17])
def test_every_element_is_written(channels, width):
    """Output and gradients hold no NaN of fresh memory, whatever tile an edge belongs to."""
    for layout in ("nchw", "nhwc"):
        check_exact(Case.parse(f"dw n1c{channels}h3w{width}k3s1d1p1 {layout} fp32"))
        check_exact(Case.parse(f"sep n1c{channels}h3w{width}k3s1d1p1o17 {layout} fp32 mid=relu"))


def test_channels_last_is_kept_through_a_chain():
    x = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    y = F.depthwise_conv2d(F.depthwise_conv2d(x, torch.randn(16, 1, 3, 3), padding=1), torch.randn(16, 1, 3, 3))
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()


def test_large_strides_of_unit_dimensions():
    """A dimension of size one may have any stride; it must not take part in 32-bit index arithmetic."""
    far = 2**31 + 64
    view = torch.arange(4.0).as_strided((1, 1, 2, 2), (far, far, 2, 1))
    assert torch.equal(F.depthwise_conv2d(view, torch.ones(1, 1, 1, 1)), torch.arange(4.0).view(1, 1, 2, 2))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("offset", "channels"), [(8, 512), (8, 500), (24, 40), (32, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_that_begin_within_a_line(dtype, offset, channels, stride):
    """Columns a power of two apart, of which the first channel lies anywhere between what caches fetch together."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    x = drawn(1, 1024, 9, 14).contiguous(memory_format=torch.channels_last)[:, offset : offset + channels]
    weight, bias = drawn(channels, 1, 3, 3), drawn(channels)
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, 1, groups=channels)
    assert torch.equal(F.depthwise_conv2d(x, weight, bias, stride, 1), expected.to(dtype))
