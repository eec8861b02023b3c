"""The kernel table, the choice and what is said about both."""

import json

import pytest
import torch

import choices
import dsconv_ext
from cases import Case, sample
from dsconv_ext import functional as F
from judges import check, evaluate, subject
from row_tests import ISAS

pytestmark = pytest.mark.usefixtures("library")
PASSES = {
    "depthwise_fwd",
    "depthwise_dgrad",
    "depthwise_wgrad",
    "mask",
    "pointwise_fwd",
    "pointwise_wgrad",
    "separable_fwd",
}
CHOICES = """
import json, torch, choices
from cases import Case
from judges import evaluate, subject
with choices.recorded() as made:
    for line in ("dw n1c16h9w9k3s1d1p1 nhwc fp32 act=silu", "sep n1c16h9w9k3s1d1p1o16 nhwc fp32 mid=relu6"):
        case = Case.parse(line)
        evaluate(subject, case, case.inputs(integer=True), torch.ones_like)
print(json.dumps([sorted(choices.chosen(made)), json.loads(torch.ops.dsconv.build_info())]))
"""


def test_the_table():
    """Names are unique and say pass and target; the portable rows leave no pass out."""
    table = json.loads(torch.ops.dsconv.kernels())
    names = [row["name"] for row in table]
    assert len(set(names)) == len(names) > 0
    for row in table:
        assert row["name"].startswith(row["pass"]), row
        assert row["pass"] in PASSES and row["target"] in (*ISAS, "cuda"), row
        assert row["name"].endswith((row["target"], "reference")), row
    assert {row["pass"] for row in table if row["target"] == "portable"} == PASSES


def test_build_info():
    info = json.loads(torch.ops.dsconv.build_info())
    assert info["version"] == dsconv_ext.__version__
    assert tuple(map(int, info["torch_target"].split("."))) >= (2, 0)
    assert set(info["cpu_isa_compiled"]) <= set(ISAS)
    assert ISAS.index(info["cpu_isa_used"]) <= ISAS.index(info["cpu_isa_found"])
    assert isinstance(info["cuda_compiled"], bool)
    assert bool(info["cuda_archs"]) == info["cuda_compiled"]
    assert info["compiler"]


@pytest.mark.parametrize("case", [*sample("dw", 2, seed=4), *sample("sep", 4, seed=4)], ids=str)
def test_every_choice_is_legal(case):
    """What is chosen is among the candidates and can run; what cannot run says why; the rest has an estimate."""
    with choices.recorded() as made:
        evaluate(subject, case, case.inputs(integer=True), torch.ones_like)
    name = "depthwise" if case.op == "dw" else "separable"
    assert {choice["op"] for choice in made} == {name, f"{name}_backward"}
    for choice in made:
        candidates = {c["name"]: c for c in choice["candidates"]}
        assert choice["pass"] in PASSES and choice["problem"]
        assert candidates[choice["chosen"]]["reason"] is None
        for candidate in choice["candidates"]:
            assert (candidate["reason"] is None) == (candidate["estimate_us"] is not None), candidate
            assert candidate["reason"] is None or len(candidate["reason"]) > 5
            assert candidate["estimate_us"] is None or candidate["estimate_us"] >= 0


def test_the_cheapest_candidate_is_chosen():
    case = Case.parse("dw n2c16h17w17k3s1d1p1 nhwc fp32")
    with choices.recorded() as made:
        evaluate(subject, case, case.inputs(integer=True), torch.ones_like)
    for choice in made:
        able = {c["name"]: c["estimate_us"] for c in choice["candidates"] if c["reason"] is None}
        assert able[choice["chosen"]] == min(able.values())


@pytest.mark.parametrize("fuse", ["always", "never"])
def test_fuse_is_obeyed(fuse):
    for line in (
        "sep n1c32h14w14k3s1d1p1o64 nhwc fp32 mid=relu6",
        "sep n1c96h7w7k3s1d1p1o96 nchw bf16 mid=relu6 act=relu res",
        "sep n2c16w33k5s1d2p4o8 nhwc fp16",
    ):
        case = Case.parse(f"{line} fuse={fuse}")
        with choices.recorded() as made, torch.no_grad():
            subject(case, case.inputs(integer=True))
        assert any(name.startswith("separable_fwd") for name in choices.chosen(made)) == (fuse == "always"), line


def test_choices_are_kept_until_they_are_replaced():
    case = Case.parse("dw n1c16h9w9k3s1d1p1 nhwc fp32")
    with choices.forced("depthwise_fwd_reference"):
        for _ in range(2):
            with choices.recorded() as made, torch.no_grad():
                subject(case, case.inputs(integer=True))
            assert choices.chosen(made) == {"depthwise_fwd_reference"}
        several = ("depthwise_fwd_reference", "depthwise_wgrad_rows_portable", "depthwise_dgrad_reference")
        with choices.forced(*several), choices.recorded() as made:
            check(case)
        assert choices.chosen(made) == set(several)
    with choices.recorded() as made, torch.no_grad():
        subject(case, case.inputs(integer=True))
    assert choices.chosen(made) != {"depthwise_fwd_reference"}


def test_an_unknown_row_is_refused():
    with pytest.raises(RuntimeError, match="rows: got 'depthwise_fwd_magic', expected"):
        torch.ops.dsconv.set_choices("depthwise_fwd_reference,depthwise_fwd_magic")


def test_nothing_is_recorded_outside():
    case = Case.parse("dw n1c16h9w9k3s1d1p1 nhwc fp32")
    subject(case, case.inputs(integer=True))
    with choices.recorded() as made:
        pass
    subject(case, case.inputs(integer=True))
    assert made == []


def test_the_public_explanation():
    x, weight, pointwise = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)

    def step():
        F.separable_conv2d(F.depthwise_conv2d(x, weight), weight, pointwise)

    explanation = dsconv_ext.explain(step)
    names = {row["name"] for row in json.loads(torch.ops.dsconv.kernels())}
    assert len(explanation.chosen) == len(explanation.candidates) >= 2
    assert {part for name in explanation.chosen for part in name.split(" + ")} <= names
    for chosen, candidates in zip(explanation.chosen, explanation.candidates, strict=True):
        assert {c.name: c.reason for c in candidates}[chosen] is None
        assert chosen in str(explanation)


def test_explain_passes_exceptions_on_and_stops_recording():
    with pytest.raises(ZeroDivisionError):
        dsconv_ext.explain(lambda: 1 / 0)
    assert dsconv_ext.explain(lambda: None).chosen == ()


@pytest.mark.parametrize("isa", ISAS)
def test_the_instruction_set_can_be_limited(python, isa):
    """DSCONV_CPU_ISA changes which rows run."""
    found = json.loads(torch.ops.dsconv.build_info())["cpu_isa_found"]
    names, info = json.loads(python(CHOICES, DSCONV_CPU_ISA=isa))
    expected = min(isa, found, key=ISAS.index)
    assert info["cpu_isa_used"] == expected
    # those above AVX-512 multiply bfloat16 alone
    expected = "avx512" if expected in ("avx512bf16", "amx") else expected
    assert {name.rpartition("_")[2] for name in names} == {expected}


def test_an_unknown_instruction_set_is_refused(python):
    wanted = "amx, avx512bf16, avx512, avx2 or portable"
    with pytest.raises(AssertionError, match=f"DSCONV_CPU_ISA: got 'sse9', expected {wanted}"):
        python(CHOICES, DSCONV_CPU_ISA="sse9")


def test_the_command_line(python):
    program = (
        "import runpy, sys; sys.argv = ['dsconv_ext', 'info']; runpy.run_module('dsconv_ext', run_name='__main__')"
    )
    printed = python(program, COLUMNS="240")
    for word in (dsconv_ext.__version__, torch.__version__, "cuda_archs", "depthwise_fwd_reference"):
        assert word in printed
