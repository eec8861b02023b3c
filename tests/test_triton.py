"""The Triton kernels, interpreted on the CPU: the judges, both layouts, and what chooses them.

Whether kernels are interpreted is settled when Triton is imported, so the programs here run in processes of their own.
"""

import json

import pytest
import torch

from cases import Case, sample
from judges import accuracy_truth, evaluate, subject
from tolerance import bound, error

pytest.importorskip("triton", reason="the triton package is not installed")

INTERPRETED = {"DSCONV_BACKEND": "triton", "TRITON_INTERPRET": "1"}
PRELUDE = "import interpreted, torch, dsconv_ext\nfrom dsconv_ext import functional as F, triton_ops\n"
JUDGE = (
    PRELUDE
    + """
from cases import Case
from judges import check
torch.set_float32_matmul_precision("high")
for line in {lines!r}:
    check(Case.parse(line))
print("passed", {count})
"""
)
# Taps 1 to 31, strides and dilations 1 to 3; positions and channels at a block's edges: 63, 64, 65 and 15, 16, 17, 33.
# The derivative of gelu is ATen's, which is less exact where it is vectorised: for ours, not for the yardstick, whose
# upstream gradient is not channels_last.
DEPTHWISE = (
    "dw n1c16h9w7k1s1d1p0 {} {} act=relu6",
    "dw n1c17h8w8k3s1d1p1 {} {} act=silu",
    "dw n2c15h13w9k3s2d1p1:0 {} {} act=leaky_relu:-0.5",
    "dw n1c33h5w13k3s1d3p3 {} {} act=tanh",
    "dw n1c64h7w9k3s1d2p2 {} {} act=sigmoid bias=none",
    "dw n2c8h11w10k5s3d1p2 {} {} act=hardswish",
    "dw n1c8h9w9k7s1d1p3 {} {} act=gelu_tanh",
    "dw n1c8w70k31s1d1p15 {} {}",
    "dw n1c4h11w10k3x4s2x3d2x1p2:1x0:3m2 {} {} act=elu:0.5",
    "dw n1c5t4h5w6k2x3x3s1x2x1d1p0:1x1x1 {} {} act=gelu",
)
SEPARABLE = (
    "sep n1c17h8w8k3s1d1p1o16 {} {} mid=relu6 act=silu res",
    "sep n1c33h13w10k5s2d1p2o17 {} {} mid=silu act=relu bias=none",
    "sep n1c8h9w8k3s1d2p2m2o65 {} {} mid=gelu res bias=dw",
    "sep n2c9w40k7s1d1p3o24 {} {} act=hardsigmoid fuse=always",
    "sep n1c24h9w9k3s1d1p1o15 {} {} mid=hardswish act=relu6 res fuse=never",
    "sep n1c8h9w9k3s3d1p1o130 {} {} mid=hardsigmoid fuse=never",
)
LAYOUTS, HALF_AND_SINGLE = ("nchw", "nhwc"), ("fp32", "fp16", "bf16")


def judged(python, lines) -> None:
    lines = list(lines)
    printed = python(JUDGE.format(lines=lines, count=len(lines)), **INTERPRETED)
    assert printed == f"passed {len(lines)}\n" and lines


def lines(templates, dtype: str, alternate: int) -> list[str]:
    """Each problem in one of the two layouts, in turn."""
    return [t.format(LAYOUTS[(i + alternate) % 2], dtype) for i, t in enumerate(templates)]


def groups(templates):
    """Both layouts of every problem in every dtype; half of them by default."""
    for i, dtype in enumerate(HALF_AND_SINGLE):
        for alternate in (0, 1):
            marks = [pytest.mark.slow] if (i + alternate) % 2 else []
            yield pytest.param(lines(templates, dtype, alternate), id=f"{dtype}-{alternate}", marks=marks)


@pytest.mark.parametrize("problems", list(groups(DEPTHWISE)))
def test_depthwise_passes_the_judges(python, problems):
    judged(python, problems)


@pytest.mark.parametrize("problems", list(groups(SEPARABLE)))
def test_separable_passes_the_judges(python, problems):
    judged(python, problems)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
@pytest.mark.parametrize("family", ["dw1d", "dw2d", "dw3d", "sep1d", "sep2d"])
def test_a_sample_passes_the_judges(python, family, part):
    """Any layout, dtype, multiplier and padding."""
    cases = [c for c in sample(family, 40, seed=7) if c.multiplications < 50_000 or c.outputs > 500]
    judged(python, [str(c) for c in cases if c.multiplications < 300_000][part::16])


def test_derivatives_by_finite_differences(python):
    """The third judge: the first and second derivatives of both operators, in float64."""
    printed = python(
        PRELUDE
        + """
torch.manual_seed(0)
x, w, b = torch.randn(1, 2, 4, 3), torch.randn(4, 1, 3, 2), torch.randn(4)
p, pb, r = torch.randn(3, 4, 1, 1), torch.randn(3), torch.randn(1, 3, 2, 4)
x, w, b, p, pb, r = (t.double().requires_grad_() for t in (x, w, b, p, pb, r))
where = dict(stride=(2, 1), padding=((1, 0), (1, 1)), dilation=1)
def depthwise(*t): return F.depthwise_conv2d(*t, **where, activation="silu")
def separable(x, w, p, b, pb, r): return F.separable_conv2d(
    x, w, p, b, pb, **where, mid_activation="gelu", activation="tanh", residual=r)
for function, tensors in ((depthwise, (x, w, b)), (separable, (x, w, p, b, pb, r))):
    print(torch.autograd.gradcheck(function, tensors, fast_mode=True))
    print(torch.autograd.gradgradcheck(function, tensors, fast_mode=True))
""",
        **INTERPRETED,
    )
    assert printed.split() == ["True"] * 4


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_the_compiled_cpu_kernels_give_the_same(python, tmp_path, library, dtype):
    """Triton and the library differ by no more than both may differ from the truth."""
    problems = [DEPTHWISE[2].format("nhwc", dtype), SEPARABLE[0].format("nchw", dtype)]
    path = str(tmp_path / "results.pt")
    python(
        PRELUDE
        + f"""
from cases import Case
from judges import accuracy_truth, evaluate, subject
results = []
for case in map(Case.parse, {problems!r}):
    g = accuracy_truth(case, "cpu")[0]
    found = evaluate(subject, case, case.inputs(False), lambda y: torch.empty_like(y).copy_(g))
    results.append(dict(found.items()))
torch.save(results, {path!r})
""",
        **INTERPRETED,
    )
    for case, triton in zip(map(Case.parse, problems), torch.load(path), strict=True):
        g, truth, yardstick = accuracy_truth(case, "cpu")
        compiled = evaluate(subject, case, case.inputs(False), lambda y, g=g: torch.empty_like(y).copy_(g))
        for (name, value), (_, true), (_, theirs) in zip(
            *(r.items() for r in (compiled, truth, yardstick)), strict=True
        ):
            difference, allowed = error(triton[name], value), 2 * bound(value.dtype, error(theirs, true))
            assert difference <= allowed, f"{case}\n  {name}: {difference:.3e} apart, allowed {allowed:.3e}"


def test_runs_are_bitwise_equal(python):
    printed = python(
        PRELUDE
        + f"""
from cases import Case
from judges import evaluate, subject
case = Case.parse({"dw n2c8h24w24k3s1d1p1 nhwc fp32"!r})
def once(): return evaluate(subject, case, case.inputs(False), lambda y: case.upstream(y, False))
print(all(torch.equal(a, b) for (_, a), (_, b) in zip(once().items(), once().items())))
""",
        **INTERPRETED,
    )
    assert printed == "True\n"


def test_64_bit_offsets(python):
    """The kernels for tensors beyond 2^31 elements pass the judges too."""
    python(
        PRELUDE
        + """
triton_ops.INT32_LIMIT = 0
from cases import Case
from judges import check
check(Case.parse("dw n1c17h8w8k3s2d1p1 nhwc fp32 act=silu"))
check(Case.parse("sep n1c9h8w8k3s1d1p1o17 nchw fp16 act=relu fuse=always"))
""",
        **INTERPRETED,
    )


def test_the_guard_of_bfloat16_is_needed(python):
    """Without it the interpreter truncates where it rounds, and multiplies payloads in tl.dot: the judges notice."""
    printed = python(
        PRELUDE
        + """
import triton.language as tl
from cases import Case
from dsconv_ext import triton_kernels
from judges import check_accuracy, check_exact
problems = ((check_exact, Case.parse("dw n1c8h9w9k3s1d1p1 nhwc bf16")),
            (check_accuracy, Case.parse("sep n1c16h9w9k1s1d1p0o16 nhwc bf16 fuse=always")))
for guarded in (True, False):
    triton_kernels.GUARDED = tl.constexpr(guarded)
    for judge, case in problems:
        try:
            judge(case)
            print("passes")
        except AssertionError as error:
            print("output" in str(error))
""",
        **INTERPRETED,
    )
    assert printed.split() == ["passes", "passes", "True", "True"]


def test_special_values_and_kinks_are_those_of_the_library(python):
    """NaN, infinities, kinks, padding beside an infinite tap: the library's own tests, by the fused kernel."""
    python(
        """
import interpreted, pytest, torch
torch.set_float32_matmul_precision("high")
tests = ("special_points", "special_input", "meets_no_padding", "nan_in_the_middle")
raise SystemExit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/test_activations.py", "-k",
    "(" + " or ".join(tests) + ") and fp32 or hardsigmoid_between"]))
""",
        **INTERPRETED,
    )


def test_explain_names_what_was_passed_over(python):
    printed = python(
        PRELUDE
        + """
import json
x, w, p = torch.randn(1, 8, 5, 5).half(), torch.randn(8, 1, 3, 3).half(), torch.randn(4, 8, 1, 1).half()
found = []
for call in (lambda: F.depthwise_conv2d(x, w), lambda: F.separable_conv2d(x, w, p),
             lambda: F.separable_conv2d(x, w, p, fuse="never"),
             lambda: F.separable_conv2d(x, w, p.new_ones(300, 8, 1, 1))):
    e = dsconv_ext.explain(call)
    found.append([e.chosen[0], {c.name: c.reason for c in e.candidates[0]}])
print(json.dumps(found))
""",
        **INTERPRETED,
    )
    (depthwise, reasons), (fused, _), (unfused, never), (wide, limit) = json.loads(printed)
    assert (depthwise, fused) == ("triton_depthwise", "triton_separable_fused")
    assert unfused == wide == "triton_depthwise + torch.matmul"
    assert reasons == {"triton_depthwise": None, "compiled_kernels": "DSCONV_BACKEND=triton leaves the library alone"}
    assert never["triton_separable_fused"] == "fuse='never'"
    assert limit["triton_separable_fused"] == "300 outputs do not fit one program: 256 at most"


def test_the_order_of_backends(python):
    """What the library has no kernel for goes to Triton, and where that cannot run, to PyTorch; each says why."""
    printed = python(
        """
import json, warnings; warnings.simplefilter("ignore")
"""
        + PRELUDE
        + """
from dsconv_ext import backends
x, w = torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3)
where = [1, 1], [0] * 4, [1, 1], "none", 0.0
def found(op):
    (call,) = dsconv_ext.explain(op, x, w, None, *where).calls
    return [call.chosen, *([c.name, c.reason] for c in call.candidates if c.reason)]
beyond_the_library = torch.ops.dsconv.depthwise_torch
print(json.dumps([found(beyond_the_library), found(torch.ops.dsconv.depthwise)]))
backends._triton_obstacle = triton_ops.obstacle
print(json.dumps(found(beyond_the_library)))
""",
        TRITON_INTERPRET="1",
    )
    (last, compiled), second = map(json.loads, printed.splitlines())
    skipped = ["compiled_kernels", "the library has no cpu kernel for it"]
    assert last == ["composition", skipped, ["triton", "Triton has no target for cpu"]]
    assert second == ["triton_depthwise", skipped]
    assert compiled[0].startswith("depthwise_fwd_")


def test_triton_does_not_warn(python):
    python(
        "import warnings; warnings.simplefilter('error')\n"
        + PRELUDE
        + "F.separable_conv2d(torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3), torch.ones(2, 2, 1, 1))",
        **INTERPRETED,
    )


def test_a_missing_package_is_a_reason(python):
    """No import error; the reason is named by what forces Triton, and where it would have come first."""
    program = """
import sys; sys.modules["triton"] = None
import torch, dsconv_ext
from dsconv_ext import backends
print(backends._triton_obstacle(torch.device("cuda", 0)))
try:
    print(dsconv_ext.functional.depthwise_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item())
except RuntimeError as error:
    print(error)
"""
    for backend, outcome in (("", "9.0"), ("triton", "DSCONV_BACKEND=triton, but the triton package cannot be")):
        reason, result = python(program, DSCONV_BACKEND=backend).splitlines()
        assert reason.startswith("the triton package cannot be imported") and outcome in result


def test_triton_without_a_gpu_says_what_to_do(python):
    program = """
import torch, dsconv_ext
try:
    dsconv_ext.functional.depthwise_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))
except RuntimeError as error:
    print(error)
"""
    printed = python(program, DSCONV_BACKEND="triton", TRITON_INTERPRET="0")
    assert "dsconv::depthwise: DSCONV_BACKEND=triton, but Triton has no target for cpu" in printed
    assert "TRITON_INTERPRET=1" in printed


def test_opcheck(python):
    """Schemas; fake tensors and dynamic shapes of the operators in front, whose fakes run no kernel."""
    python(
        PRELUDE
        + """
from torch.library import opcheck
tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
where, silu, relu = ([2, 1], [1, 0, 1, 1], [1, 2]), ("silu", 0.0), ("relu", 0.0)
ops = torch.ops.dsconv
for memory_format in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(2, 3, 5, 6).to(memory_format=memory_format)
    w, b, p = torch.randn(6, 1, 3, 2), torch.randn(6), torch.randn(4, 6, 1, 1)
    y = ops.depthwise_triton(x, w, b, *where, *silu)
    opcheck(ops.depthwise_triton, (x, w, b, *where, *silu), test_utils="test_schema")
    opcheck(ops.depthwise_dgrad_triton, (y, x, w, *where), test_utils="test_schema")
    opcheck(ops.depthwise_wgrad_triton, (y, x, w, *where, True, True), test_utils="test_schema")
    weights, tile = (x, w, p, b, None, None), list(triton_ops.FUSED_TILES[0])
    opcheck(ops.separable_triton, (*weights, *where, *silu, *relu, tile), test_utils="test_schema")
    opcheck(ops.depthwise.default, (x, w, b, *where, *silu), test_utils=tests)
    opcheck(ops.separable.default, (*weights, *where, *silu, *relu, "auto"), test_utils=tests)
""",
        **INTERPRETED,
    )


def test_compile_without_graph_breaks(python):
    """Forward and backward through torch.compile(fullgraph=True), with fake tensors, equal eager PyTorch."""
    printed = python(
        PRELUDE
        + """
torch.manual_seed(0)
m = dsconv_ext.nn.DepthwiseSeparableConv2d(4, 6, 3, padding=1, mid_activation="silu", activation="relu")
x = torch.randn(2, 4, 5, 5, requires_grad=True)
compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
y, g = compiled(x), torch.randn(2, 6, 5, 5)
found = torch.autograd.grad(y, (x, *m.parameters()), g)
expected = torch.relu(m.pointwise(torch.nn.functional.silu(m.depthwise(x))))
wanted = torch.autograd.grad(expected, (x, *m.parameters()), g)
torch.testing.assert_close((y, *found), (expected, *wanted), rtol=1e-4, atol=1e-5)
print(dsconv_ext.explain(compiled, x).chosen)
""",
        **INTERPRETED,
    )
    assert printed == "('triton_depthwise + torch.matmul',)\n"


@pytest.mark.filterwarnings("ignore")
def test_the_graph_of_the_operators_holds_the_kernels():
    """Outside the interpreter, torch.compile(fullgraph=True) traces into the Triton operators with fake tensors."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dsconv_ext import triton_ops

    targets: list[str] = []

    def compiler(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def step(x, w, p):
        where = [1, 1], [1] * 4, [1, 1]
        y = torch.ops.dsconv.depthwise_triton(x, w, None, *where, "silu", 0.0)
        columns = torch.ops.dsconv.depthwise_wgrad_triton(y, x, w, *where, True, False)
        tile = list(triton_ops.FUSED_TILES[0])
        z = torch.ops.dsconv.separable_triton(x, w, p, None, None, None, *where, *("relu", 0.0) * 2, tile)
        return torch.ops.dsconv.depthwise_dgrad_triton(y, x, w, *where), columns, z

    torch._dynamo.reset()
    with FakeTensorMode():
        x, w, p = (torch.empty(s, device="cuda") for s in ((2, 8, 9, 9), (8, 1, 3, 3), (16, 8, 1, 1)))
        results = torch.compile(step, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(x, w, p)
    assert [tuple(r.shape) for r in results] == [(2, 8, 9, 9), (9, 8), (2, 16, 9, 9)]
    assert sum("triton_kernel_wrapper" in target for target in targets) == 4, targets


def test_an_empty_batch(python):
    """Outputs are empty, gradients of weights are zero."""
    printed = python(
        PRELUDE
        + """
from cases import Case
from judges import evaluate, subject
for dtype in ("fp64", "fp32", "bf16", "fp16"):
    for line in ("dw n0c4h5w5k3s1d1p1 nhwc", "sep n0c4h5w5k3s1d1p1o6 nchw"):
        case = Case.parse(f"{line} {dtype} act=relu")
        result = evaluate(subject, case, case.inputs(True), torch.empty_like)
        gradients = {name: g.abs().sum() for name, g in result.gradients.items() if g.numel()}
        print(result.y.numel(), len(gradients) > 1 and not any(gradients.values()))
""",
        **INTERPRETED,
    )
    assert set(printed.splitlines()) == {"0 True"}
