"""On a GPU: outputs and gradients against float64 with cuDNN as the peer, both layouts, streams and graphs."""

import itertools
import re
import warnings

import pytest
import torch

import choices
import oracle
from cases import Case, sample
from dsconv_ext import functional as F
from dsconv_ext import nn
from judges import Result, accuracy_truth, cast, check, composition, evaluate, subject
from tolerance import assert_accurate, assert_equal

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
    pytest.mark.filterwarnings("ignore:dsconv.*composition of PyTorch operators"),
]
LINES = (
    "dw n2c37h13w11k3s2d1p1 {} {} act=relu6",
    "dw n2c96h56w56k7s1d1p3 {} {}",
    "dw n1c16w33k31s1d1p15 {} {} act=silu",
    "dw n2c8t5h6w7k3s1d1p1 {} {}",
    "sep n2c37h13w11k3s2d1p1o24 {} {} mid=relu6 act=silu res",
    "sep n2c32h56w56k3s1d1p1o64 {} {} mid=relu6 act=relu6",
)


@pytest.fixture(autouse=True)
def exact_matrices():
    """No TF32 in the yardstick."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        yield
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "sliced"])
@pytest.mark.parametrize("line", LINES)
def test_both_judges(line, layout, dtype):
    check(Case.parse(line.format(layout, dtype)), device="cuda")


@pytest.mark.parametrize("case", [*sample("dw", 20, seed=5), *sample("sep", 20, seed=5)], ids=str)
def test_a_sample(case):
    check(case, device="cuda")


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("line", LINES)
def test_against_cudnn(line, dtype, enabled, benchmark):
    """cuDNN and PyTorch's native kernels, each as the yardstick in turn."""
    case = Case.parse(line.format("nhwc", dtype))
    g, truth, _ = accuracy_truth(case, "cuda")
    with torch.backends.cudnn.flags(
        enabled=enabled, benchmark=benchmark, deterministic=not benchmark, allow_tf32=False
    ):
        peer: Result = evaluate(composition, case, cast(case.inputs(False, "cuda"), case.dtype), g.to)
    ours = evaluate(subject, case, case.inputs(False, "cuda"), lambda y: torch.empty_like(y).copy_(g))
    for (name, value), (_, reference), (_, theirs) in zip(ours.items(), truth.items(), peer.items(), strict=True):
        assert_accurate(name, value, reference, theirs, f"{case} cudnn={enabled} benchmark={benchmark}")


@pytest.mark.parametrize("line", LINES)
def test_the_cpu_and_the_gpu_agree_on_integers(line):
    case = Case.parse(line.format("nhwc", "fp32")).exact()
    results = [
        evaluate(subject, case, case.inputs(True, device), lambda y: case.upstream(y.cpu(), True).to(y.device))
        for device in ("cpu", "cuda")
    ]
    for (name, cpu), (_, gpu) in zip(results[0].items(), results[1].items(), strict=True):
        assert_equal(name, gpu.cpu(), cpu.double(), str(case))


@pytest.mark.parametrize("row", [r["name"] for r in choices.rows(target="cuda")] or ["none compiled"])
def test_every_row(row):
    """A layer of the row's taps and stride, in both layouts."""
    if row == "none compiled":
        pytest.skip("the library was built without CUDA")
    taps, stride = (
        int(n) if n and n.isdigit() else None for n in re.search(r"(?:_k(\d+|any)(?:s(\d))?)?_cuda", row).groups()
    )
    window = f"h17w19k{taps or 4}s{stride or 1}d1p{(taps or 4) // 2}"
    problem = f"sep n2c40{window}o72" if row.startswith("separable") else f"dw n2c40{window}"
    ran = 0
    for layout, dtype in itertools.product(("nchw", "nhwc"), ("fp32", "bf16", "fp16")):
        with choices.forced(row), choices.recorded() as made:
            check(Case.parse(f"{problem} {layout} {dtype} act=relu6"), device="cuda")
        ran += row in choices.chosen(made)
    assert ran > 0, f"{row} ran on no problem"


def test_channels_last_and_strides():
    for layout in ("nchw", "nhwc"):
        case = Case.parse(f"dw n2c16h9w8k3s1d1p1 {layout} fp16")
        tensors = case.inputs(False, "cuda")
        y = subject(case, tensors)
        assert y.stride() == oracle.output_strides(tensors["x"], y.shape)


def test_the_current_stream_is_used():
    """Work queued on a side stream sees what that stream wrote before, without a synchronisation."""
    x, weight = torch.zeros(8, 64, 56, 56, device="cuda"), torch.ones(64, 1, 3, 3, device="cuda")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        y = F.depthwise_conv2d(x, weight)
    side.synchronize()
    assert torch.equal(y, torch.full_like(y, 9))


def test_a_call_does_not_synchronise():
    x, weight = torch.randn(2, 16, 9, 9, device="cuda"), torch.randn(16, 1, 3, 3, device="cuda", requires_grad=True)
    F.depthwise_conv2d(x, weight).backward(torch.ones(2, 16, 7, 7, device="cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = F.depthwise_conv2d(x, weight)
        y.backward(torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs():
    """Capture and replay, forward and backward, with new inputs."""
    module = nn.DepthwiseSeparableConv2d(16, 24, 3, padding=1, mid_activation="relu6").cuda()
    x = torch.randn(2, 16, 14, 14, device="cuda")
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    for _ in range(3):
        x = torch.randn_like(x)
        y, g = graphed(x.clone().requires_grad_()), torch.randn(2, 24, 14, 14, device="cuda")
        expected = module.depthwise(x)
        expected = module.pointwise(expected.clamp(0, 6))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        y.backward(g)


def test_runs_are_bitwise_equal():
    for line in LINES:
        case = Case.parse(line.format("nhwc", "bf16"))

        def once(case=case):
            return evaluate(
                subject, case, case.inputs(False, "cuda"), lambda y: case.upstream(y.cpu(), False).to(y.device)
            )

        for (name, a), (_, b) in zip(once().items(), once().items(), strict=True):
            assert torch.equal(a, b), f"{case}: {name}"


def test_many_channels_and_images():
    """Batch and channels beyond 65,535 do not go on a grid's y or z."""
    for shape, channels in (((70_000, 1, 3, 3), 1), ((1, 70_000, 3, 3), 70_000)):
        x, weight = torch.randn(shape, device="cuda"), torch.randn(channels, 1, 3, 3, device="cuda")
        expected = torch.nn.functional.conv2d(x, weight, groups=channels)
        torch.testing.assert_close(F.depthwise_conv2d(x, weight), expected, rtol=1e-4, atol=1e-4)


def test_autocast():
    module = nn.DepthwiseSeparableConv2d(16, 24, 3, padding=1, mid_activation="relu6").cuda()
    x = torch.randn(2, 16, 9, 9, device="cuda")
    with torch.autocast("cuda", torch.float16):
        y = module(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), module(x), rtol=0.02, atol=0.02)


def test_mixed_devices_are_refused():
    with pytest.raises(ValueError, match="weight: got device cpu, expected cuda"):
        F.depthwise_conv2d(torch.randn(1, 8, 5, 5, device="cuda"), torch.randn(8, 1, 3, 3))


def test_a_second_device_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    x, weight = torch.randn(1, 8, 5, 5, device="cuda:1"), torch.randn(8, 1, 3, 3, device="cuda:1")
    y = F.depthwise_conv2d(x, weight)
    assert y.device == x.device
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, groups=8), rtol=1e-4, atol=1e-4)


def test_a_forward_row_is_compiled_in():
    """With CUDA in the library a depthwise forward runs on a kernel of ours, without a warning."""
    if not choices.rows(target="cuda"):
        pytest.skip("the library was built without CUDA")
    with warnings.catch_warnings(), choices.recorded() as made, torch.no_grad():
        warnings.simplefilter("error")
        F.depthwise_conv2d(torch.randn(1, 8, 9, 9, device="cuda"), torch.randn(8, 1, 3, 3, device="cuda"))
    assert any("cuda" in name for name in choices.chosen(made))
