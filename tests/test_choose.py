"""geometry.h and choose.h from Python: sizes by enumeration, and the choice of rows for machines one does not have."""

import json
import math
import random
import re

import pytest
import torch

import dsconv_ext  # noqa: F401  (loads the operators)
import native
from conftest import ROOT

MACHINES = {
    "portable": ("portable", 0, 32.0, 55.0, 15.0, 2 << 20),
    "avx2": ("avx2", 0, 64.0, 55.0, 15.0, 2 << 20),
    "avx512": ("avx512", 0, 128.0, 55.0, 15.0, 2 << 20),
    "avx512bf16": ("avx512bf16", 0, 128.0, 55.0, 15.0, 2 << 20),
    "amx": ("amx", 0, 128.0, 55.0, 15.0, 2 << 20),
    "no-cache": ("avx2", 0, 64.0, 55.0, 15.0, 0),
    "sm_75": ("cuda", 75, 8_000.0, 1_000.0, 320.0, 4 << 20),
    "sm_80": ("cuda", 80, 19_500.0, 5_000.0, 1_555.0, 40 << 20),
    "sm_90": ("cuda", 90, 67_000.0, 7_000.0, 3_350.0, 50 << 20),
    "sm_120": ("cuda", 120, 100_000.0, 6_000.0, 1_790.0, 96 << 20),
    "gpu-without-code": ("cuda", 0, 1.0, 1.0, 1.0, 0),
}
ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
PROBLEMS = 400  # for each machine
DEPTHWISE_PASSES = ("depthwise_fwd", "depthwise_dgrad", "depthwise_wgrad", "mask")
PASSES = (*DEPTHWISE_PASSES, "pointwise_fwd", "pointwise_wgrad", "separable_fwd")
machines = pytest.mark.parametrize("machine_name", MACHINES)


@pytest.fixture(scope="module")
def cpp():
    return native.load("choose_module")


def random_problem(rng):
    """Arguments of a legal problem of one to three spatial dimensions, from one value to a large layer."""
    spatial = rng.choice((1, 2, 2, 2, 3))

    def dims(values):
        return [1] * (3 - spatial) + [rng.choice(values) for _ in range(spatial)]

    size = dims((1, 2, 7, 14, 15, 28, 56, 112, 224)[: 9 if spatial < 3 else 5])
    taps = dims((1, 2, 3, 3, 5, 7, 9))
    dilation = dims((1, 1, 1, 2, 3))
    extents = [d * (k - 1) + 1 for d, k in zip(dilation, taps, strict=True)]
    # enough padding for at least one output
    pad = [max(rng.choice((0, e // 2)), -(-(e - n) // 2), 0) for e, n in zip(extents, size, strict=True)]
    channels = rng.choice((1, 3, 7, 8, 16, 17, 32, 96, 384, 1024))
    out_channels = rng.choice((1, 3, 16, 24, 64, 256, 1024))
    return (
        rng.choice(("float64", "float32", "bfloat16", "float16")),
        rng.choice((1, 1, 2, 8, 64)),
        channels,
        rng.choice((1, 1, 1, 2, 3)),
        out_channels,
        size,
        taps,
        dims((1, 1, 2, 3)),
        dilation,
        pad,
        rng.random() < 0.5,
    )


def problems(cpp, machine_name):
    target = MACHINES[machine_name][0]
    if target in ISAS and ISAS.index(target) > ISAS.index(cpp.detected_isa()):
        pytest.skip(f"the rows of {target} say whether they can run in {target} code, which this processor has not")
    rng = random.Random(f"choose {machine_name}")
    for _ in range(PROBLEMS):
        arguments = random_problem(rng)
        yield arguments, cpp.Problem(*arguments)


def can_hold(machine_name, target):
    """Whether the machine runs code for the target."""
    machine, sm = MACHINES[machine_name][:2]
    if "cuda" in (machine, target):
        return machine == target and sm > 0
    return ISAS.index(target) <= ISAS.index(machine)


@machines
@pytest.mark.parametrize("pass_name", PASSES)
def test_the_cheapest_legal_row_is_taken(cpp, machine_name, pass_name):
    """Every row of the pass is considered; each has an estimate or a reason; there is a row wherever one is legal."""
    machine = cpp.Machine(*MACHINES[machine_name])
    table = {name: target for name, row_pass, target in cpp.rows() if row_pass == pass_name}
    for arguments, problem in problems(cpp, machine_name):
        name, candidates = cpp.choose(pass_name, problem, machine, [])
        assert [c.name for c in candidates] == list(table), arguments
        legal = {c.name: c.estimate_us for c in candidates if c.reason is None}
        assert all(can_hold(machine_name, table[row]) for row in legal), arguments
        assert all(math.isfinite(us) and us > 0 for us in legal.values()), (arguments, legal)
        assert all(c.reason for c in candidates if not can_hold(machine_name, table[c.name])), arguments
        assert name == (min(legal, key=legal.get) if legal else None), (arguments, legal)
        again, _ = cpp.choose(pass_name, cpp.Problem(*arguments), cpp.Machine(*MACHINES[machine_name]), [])
        assert again == name


@machines
@pytest.mark.parametrize("pass_name", PASSES)
def test_a_preferred_row_is_taken_where_it_can_run(cpp, machine_name, pass_name):
    machine = cpp.Machine(*MACHINES[machine_name])
    for arguments, problem in problems(cpp, machine_name):
        usual, candidates = cpp.choose(pass_name, problem, machine, [])
        for candidate in candidates:
            name, _ = cpp.choose(pass_name, problem, machine, ["no such row", candidate.name])
            assert name == (candidate.name if candidate.reason is None else usual), arguments


@pytest.mark.parametrize("machine_name", [m for m in MACHINES if MACHINES[m][0] != "cuda"])
def test_a_cpu_runs_every_pass(cpp, machine_name):
    """The portable rows are the last resort of every processor: no problem is without a row."""
    machine = cpp.Machine(*MACHINES[machine_name])
    for arguments, problem in problems(cpp, machine_name):
        for pass_name in PASSES[:-1]:
            assert cpp.choose(pass_name, problem, machine, [])[0] is not None, (pass_name, arguments)
        _, depthwise, pointwise, _ = cpp.choose_separable(problem, "never", machine)
        assert depthwise is not None and pointwise is not None, arguments


def test_a_gpu_without_code_says_so(cpp):
    machine = cpp.Machine(*MACHINES["gpu-without-code"])
    _, problem = next(problems(cpp, "gpu-without-code"))
    _, candidates = cpp.choose("depthwise_fwd", problem, machine, [])
    targets = {name: target for name, _, target in cpp.rows()}
    reasons = {c.name: c.reason for c in candidates}
    cuda = {name: reason for name, reason in reasons.items() if targets[name] == "cuda"}
    assert cuda and set(cuda.values()) == {"the library holds no code for this GPU"}
    assert {r for n, r in reasons.items() if n not in cuda} == {"runs on another device"}
    assert cpp.choose_separable(problem, "auto", machine)[:3] == (None, None, None)


@machines
def test_fused_or_not(cpp, machine_name):
    """As wished wherever it is possible; without a wish the lower estimate decides. On a GPU the second stage of the
    unfused way is PyTorch's matrix product."""
    machine, on_gpu = cpp.Machine(*MACHINES[machine_name]), MACHINES[machine_name][0] == "cuda"
    decisions = set()
    for arguments, problem in problems(cpp, machine_name):
        alone = [cpp.choose(p, problem, machine, []) for p in ("separable_fwd", "depthwise_fwd", "pointwise_fwd")]
        fused, depthwise, pointwise = (name for name, _ in alone)
        separate = depthwise is not None and (on_gpu or pointwise is not None)
        best = [min((c.estimate_us for c in found if c.reason is None), default=math.inf) for _, found in alone]
        for fuse in ("auto", "always", "never"):
            choice = cpp.choose_separable(problem, fuse, machine)
            both = choice[3][-1]
            if fuse == "auto":
                keep = fused is not None and (not separate or best[0] <= both.estimate_us)
                decisions.add(keep)
            else:
                keep = fused is not None and (fuse == "always" or not separate)
            assert choice[0] == (fused if keep else None), (fuse, arguments)
            if not keep:
                assert choice[1:3] == (depthwise, pointwise), (fuse, arguments)
            if separate:
                assert both.name == f"{depthwise} + {'matmul' if on_gpu else pointwise}" and both.reason is None
                assert both.estimate_us > best[1] if on_gpu else math.isclose(both.estimate_us, best[1] + best[2])
            else:
                assert both.reason, arguments
    if MACHINES[machine_name][1] > 0 or MACHINES[machine_name][0] != "cuda":
        assert decisions == {False, True}, "the planner never changes its mind"


def positions(size, taps, stride, dilation, low, high):
    """The first position of every window that fits, by enumeration."""
    last = size + high - dilation * (taps - 1) - 1
    return list(range(-low, last + 1, stride))


def test_output_size_counts_the_windows(cpp):
    rng, none = random.Random(0), 0
    for _ in range(3000):
        size, taps, stride, dilation = rng.randint(1, 40), rng.randint(1, 9), rng.randint(1, 5), rng.randint(1, 4)
        low, high = rng.randint(0, 6), rng.randint(0, 6)
        starts = positions(size, taps, stride, dilation, low, high)
        count = cpp.output_size(size, taps, stride, dilation, low, high)
        assert max(count, 0) == len(starts), (size, taps, stride, dilation, low, high)
        none += not starts
        if starts:
            outputs = rng.randint(1, len(starts))
            reads = [p + u * dilation for p in starts[:outputs] for u in range(taps)]
            extent = cpp.input_extent(outputs, taps, stride, dilation)
            assert extent == max(reads) - min(reads) + 1, (outputs, taps, stride, dilation)
    assert 0 < none < 1500


def test_output_size_of_large_numbers(cpp):
    """Nothing is cut to 32 bits."""
    assert cpp.output_size(2**40, 3, 1, 1, 1, 1) == 2**40
    assert cpp.output_size(2**40, 2, 3, 2**39, 0, 0) == (2**40 - 2**39 - 1) // 3 + 1


def test_division_rounds_towards_minus_infinity_and_up(cpp):
    for a in range(-30, 31):
        for b in range(1, 9):
            assert cpp.floor_div(a, b) == a // b
            if a >= 0:
                assert cpp.ceil_div(a, b) == -(-a // b)


@pytest.mark.parametrize("dimension", range(5))
def test_the_border_of_32_bit_offsets(cpp, dimension):
    """The largest offset decides, whichever dimension reaches it; an absent tensor always fits."""
    extents = [2 + (i == dimension) for i in range(5)]
    batch, channels, *size = extents
    stride = [3, 5, 7, 11, 13]
    rest = sum(s * (n - 1) for i, (s, n) in enumerate(zip(stride, extents, strict=True)) if i != dimension)
    for past, fits in ((-1, True), (0, False), (2**31, False), (2**40, False)):
        wanted = 2**30 + past - rest  # offset of the last element along the dimension, which takes two steps
        stride[dimension] = -(-wanted // 2) if past >= 0 else wanted // 2
        assert cpp.fits_int32(True, stride, batch, channels, size) is fits, (dimension, past)
        assert cpp.fits_int32(False, stride, batch, channels, size) is True


def test_the_table_is_the_source(library):
    """The operator lists what kernels.inc lists."""
    listed = re.findall(r"^DSCONV_KERNEL\(\w+, (\w+),", (ROOT / "csrc" / "kernels.inc").read_text(), re.MULTILINE)
    info = json.loads(torch.ops.dsconv.build_info())
    compiled = {row["name"] for row in json.loads(torch.ops.dsconv.kernels())}
    assert compiled <= set(listed)
    assert {name for name in set(listed) - compiled if "cuda" not in name} == set()
    assert info["cuda_compiled"] == any("cuda" in name for name in compiled)
