"""The fallback: without the library PyTorch's operators run, with one warning, and explain says why."""

from pathlib import Path

import pytest
import torch

import operators
from cases import Case, sample

FALLBACK = {"DSCONV_BACKEND": "torch"}
IMPORT = "import warnings, torch, dsconv_ext; from dsconv_ext import functional as F\n"


def test_one_warning_per_operator(python):
    printed = python(
        IMPORT
        + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    x, w, p = torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(4, 8, 1, 1)
    counts = []
    for call in (lambda: F.depthwise_conv2d(x, w), lambda: F.separable_conv2d(x, w, p)):
        for _ in range(3):
            call()
            counts.append(len(caught))
print(counts)
print([str(w.message) for w in caught])
print(torch.allclose(F.depthwise_conv2d(x, w), torch.nn.functional.conv2d(x, w, groups=8), atol=1e-5))
""",
        **FALLBACK,
    )
    counts, messages, equal = printed.splitlines()
    assert counts == "[1, 1, 1, 2, 2, 2]"
    assert "DSCONV_BACKEND=torch" in messages and "dsconv::depthwise" in messages and "dsconv::separable" in messages
    assert equal == "True"


def test_import_does_not_warn(python):
    program = "import warnings; warnings.simplefilter('error'); import dsconv_ext; print(dsconv_ext.__version__)"
    assert python(program) == python(program, **FALLBACK) != "\n"


def test_import_takes_little_more_than_that_of_torch(python):
    """The compiler and Triton are large: they are imported by those who use them."""
    program = IMPORT + "import sys; print({'torch._dynamo', 'torch._inductor', 'sympy', 'triton'} & set(sys.modules))"
    assert python(program) == python(program, **FALLBACK) == "set()\n"


def test_explain_says_why(python):
    printed = python(
        IMPORT
        + """
warnings.simplefilter("ignore")
e = dsconv_ext.explain(F.depthwise_conv2d, torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3))
print(e.chosen)
print([c.reason for c in e.candidates[0] if c.reason])
print(e)
""",
        **FALLBACK,
    )
    assert "composition" in printed.splitlines()[0]
    assert "DSCONV_BACKEND=torch" in printed.splitlines()[1]
    assert "DSCONV_BACKEND=torch" in "".join(printed.splitlines()[2:])


@pytest.mark.parametrize("family", ["dw", "sep"])
def test_the_composition_passes_both_judges(python, family):
    """The same problems as the kernels, at most as exact as PyTorch is: the half dtypes round between the stages."""
    lines = [
        str(c) for c in sample(family, 3, seed=3) if c.dtype_name in ("fp32", "fp64") and c.multiplications < 10**6
    ]
    printed = python(
        f"""
import warnings; warnings.simplefilter("ignore")
from cases import Case
from judges import check
for line in {lines!r}:
    check(Case.parse(line))
print("passed", {len(lines)})
""",
        **FALLBACK,
    )
    assert printed == f"passed {len(lines)}\n" and len(lines) > 5


def test_errors_are_the_same_without_the_library(python):
    tests = str(Path(__file__).with_name("test_errors.py"))
    python(f"import pytest; raise SystemExit(pytest.main(['-q', '-p', 'no:cacheprovider', {tests!r}]))", **FALLBACK)


def test_transforms_and_modules_work_without_the_library(python):
    printed = python(
        IMPORT
        + """
warnings.simplefilter("ignore")
from dsconv_ext import nn
m = nn.DepthwiseSeparableConv2d(4, 6, 3, padding=1, mid_activation="silu", activation="relu").double()
x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
print(torch.autograd.gradcheck(m, (x,)), torch.autograd.gradgradcheck(m, (x,), fast_mode=True))
print(torch.func.vmap(m)(torch.randn(3, 2, 4, 5, 5, dtype=torch.float64)).shape)
with torch.no_grad():
    print(torch.equal(m.eval()(x), m(x)))
""",
        **FALLBACK,
    )
    assert printed.split() == ["True", "True", "torch.Size([3,", "2,", "6,", "5,", "5])", "True"]


@pytest.mark.slow
def test_compile_works_without_the_library(python):
    printed = python(
        IMPORT
        + """
warnings.simplefilter("ignore")
m = dsconv_ext.nn.DepthwiseSeparableConv2d(4, 6, 3, padding=1, mid_activation="silu", activation="relu")
x = torch.randn(2, 4, 5, 5)
print(torch.allclose(torch.compile(m, fullgraph=True, backend="aot_eager")(x), m(x)))
""",
        **FALLBACK,
    )
    assert printed == "True\n"


def test_a_missing_library_is_one_sentence(python):
    """Without the file the import works, and the reason says what to do."""
    printed = python(
        """
import warnings; warnings.simplefilter("ignore")
import pathlib, torch
from dsconv_ext import _loader
import dsconv_ext
_loader.LIBRARY = pathlib.Path("nowhere.so")
print(_loader._obstacle())
"""
    )
    assert "nowhere.so is not built" in printed and printed.count("\n") == 1


def test_a_damaged_library_is_reported(python, tmp_path):
    """A file that is no library gives the composition and a sentence with the cause, no traceback."""
    import shutil

    from conftest import PACKAGE

    shutil.copytree(PACKAGE, tmp_path / "dsconv_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "dsconv_ext" / "_C.abi3.so").write_bytes(b"not a library")
    program = """
import warnings; warnings.simplefilter("ignore")
import torch, dsconv_ext
from dsconv_ext import _loader
print(_loader.error)
print(dsconv_ext.functional.depthwise_conv2d(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item())
"""
    error, value = python(program, PYTHONPATH=str(tmp_path)).splitlines()
    assert "_C.abi3.so does not load" in error
    assert value == "9.0"


def test_the_library_serves_the_cpu(library):
    """With the library nothing falls back on the CPU: no warning, whatever the problem."""
    import warnings

    from judges import evaluate, subject

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for line in (
            "dw n1c7t3h3w3k3s1d1p1m2 permuted fp16 act=gelu",
            "sep n2c17w9k4s3d2p5:1o7 sliced fp64 mid=elu act=tanh res",
        ):
            case = Case.parse(line)
            evaluate(subject, case, case.inputs(integer=False), torch.ones_like)


def test_a_wrong_value_of_the_switch_is_an_error(python):
    """The empty string is as if unset."""
    with pytest.raises(AssertionError, match="DSCONV_BACKEND: got 'gpu', expected one of cuda, triton, torch, cpu"):
        python("import dsconv_ext", DSCONV_BACKEND="gpu")
    assert python("import dsconv_ext; from dsconv_ext import _loader; print(_loader.forced)") == "None\n"


def test_compiled_kernels_can_be_forced(python, library):
    """Those of one device: tensors elsewhere, and what has no kernel, are errors; nothing warns of the registration."""
    program = """
import warnings; warnings.simplefilter("error")
import torch, dsconv_ext
x, weight = torch.ones(1, 2, 3, 3, requires_grad=True), torch.ones(2, 1, 3, 3)
try:
    y = dsconv_ext.functional.depthwise_conv2d(x, weight)
    y.backward(torch.ones_like(y))
    print(y.sum().item(), x.grad.sum().item())
except RuntimeError as error:
    print(error)
"""
    assert python(program, DSCONV_BACKEND="cpu") == "18.0 18.0\n"
    assert python(program, DSCONV_BACKEND="cuda") == (
        "dsconv::depthwise: x: got a tensor on cpu, expected cuda as DSCONV_BACKEND asks for\n"
    )


def test_operators_have_one_set_of_schemas(python):
    """With and without the library every operator has the same schema."""
    program = (
        "import dsconv_ext, torch\n"
        "for name in ('depthwise', 'depthwise_backward', 'separable', 'separable_backward', 'pack', 'kernels',"
        " 'build_info', 'explain_begin', 'explain_end', 'set_choices', 'empty_cache'):\n"
        "    print(getattr(torch.ops.dsconv, name).default._schema)"
    )
    with_library, without = python(program), python(program, **FALLBACK)
    assert with_library == without
    assert with_library.count("\n") == 11
    assert str(operators.ops.depthwise.default._schema) in with_library


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("outputs", [1, 5])
def test_the_second_stage_of_two_passes(memory_format, outputs):
    """What runs on a GPU behind the library's depthwise kernels, in the layout of the map."""
    x = torch.randn(2, 8, 3, 4).to(memory_format=memory_format)
    weight, bias, residual = torch.randn(outputs, 8, 1, 1), torch.randn(outputs), torch.randn(2, outputs, 3, 4)
    y = torch.ops.dsconv.pointwise_torch(x, weight, bias, residual, "relu", 0.0)
    torch.testing.assert_close(y, torch.relu(torch.nn.functional.conv2d(x, weight, bias) + residual))
    assert y.stride() == torch.empty_like(y, memory_format=memory_format).stride() or outputs == 1
