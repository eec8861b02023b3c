"""Each wrong argument: the type of the error, and a message that names function, argument, what came and was wanted."""

import re

import pytest
import torch

import operators
from dsconv_ext import functional as F

DOUBLE, HALF, INT, META = (
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.int(),
    lambda t: t.to("meta"),
)
X, W, P, B = (2, 8, 7, 6), (8, 1, 3, 3), (5, 8, 1, 1), (8,)

WHERE = [
    ("stride", 0, ValueError, "0"),
    ("stride", (1, -2), ValueError, "-2"),
    ("stride", (1, 1, 1), ValueError, "2 ints"),
    ("stride", 1.5, TypeError, "1.5"),
    ("stride", "2", TypeError, "'2'"),
    ("stride", True, TypeError, "True"),
    ("stride", None, TypeError, "None"),
    ("dilation", 0, ValueError, "0"),
    ("dilation", (2, 0), ValueError, "0"),
    ("dilation", [1, 2, 3], ValueError, "2 ints"),
    ("padding", -1, ValueError, "-1"),
    ("padding", (0, -1), ValueError, "-1"),
    ("padding", ((0, 0), (0, -1)), ValueError, "-1"),
    ("padding", ((0, 0), (0, 1, 2)), ValueError, "2 ints"),
    ("padding", (1, 2, 3), ValueError, "2 ints"),
    ("padding", "full", ValueError, "'full'"),
    ("padding", 0.5, TypeError, "0.5"),
    ("activation", "swish", ValueError, "swish"),
    ("activation", ("relu", 0.1), ValueError, "relu"),
    ("activation", ("leaky_relu", "0.1"), TypeError, "0.1"),
    ("activation", 3, TypeError, "3"),
]
DEPTHWISE = [
    ("x", lambda x: x[0, 0], ValueError, "dimensions"),
    ("x", lambda x: x[None], ValueError, "dimensions"),
    ("x", lambda x: x.tolist(), TypeError, "list"),
    ("x", lambda x: None, TypeError, "NoneType"),
    ("x", INT, TypeError, "int32|torch.int"),
    ("x", lambda x: x.to(torch.complex64), TypeError, "complex64"),
    ("x", lambda x: x[:, :, :2], ValueError, "size"),
    ("weight", DOUBLE, TypeError, "float64"),
    ("weight", HALF, TypeError, "float16"),
    ("weight", lambda w: w[0], ValueError, "dimensions"),
    ("weight", lambda w: w.expand(8, 2, 3, 3), ValueError, "2, 3, 3"),
    ("weight", lambda w: w[:7], ValueError, "8"),
    ("weight", lambda w: w[..., :0], ValueError, "0"),
    ("weight", META, ValueError, "meta"),
    ("weight", lambda w: None, TypeError, "NoneType"),
    ("bias", lambda b: b[:7], ValueError, "7"),
    ("bias", lambda b: b[None], ValueError, "dimensions"),
    ("bias", HALF, TypeError, "float16"),
    ("bias", META, ValueError, "meta"),
    ("bias", lambda b: 1.0, TypeError, "float"),
]
SEPARABLE = [
    ("pointwise_weight", lambda w: w[:, :7], ValueError, "7"),
    ("pointwise_weight", lambda w: w.expand(5, 8, 3, 3), ValueError, "3, 3"),
    ("pointwise_weight", lambda w: w[..., 0], ValueError, "dimensions"),
    ("pointwise_weight", HALF, TypeError, "float16"),
    ("pointwise_weight", META, ValueError, "meta"),
    ("pointwise_weight", lambda w: None, TypeError, "NoneType"),
    ("pointwise_bias", lambda b: b[:4], ValueError, "4"),
    ("pointwise_bias", DOUBLE, TypeError, "float64"),
    ("residual", lambda r: r[:, :4], ValueError, "4"),
    ("residual", lambda r: r[..., 1:], ValueError, "5"),
    ("residual", lambda r: r[:1], ValueError, "1"),
    ("residual", HALF, TypeError, "float16"),
    ("residual", META, ValueError, "meta"),
    ("residual", lambda r: 1, TypeError, "int"),
    ("fuse", lambda _: "sometimes", ValueError, "sometimes"),
    ("mid_activation", lambda _: "swish", ValueError, "swish"),
    ("mid_activation", lambda _: ("elu", None), TypeError, "elu"),
]


def depthwise_arguments():
    return {"x": torch.randn(X), "weight": torch.randn(W), "bias": torch.randn(B)}


def separable_arguments():
    weights = {"depthwise_weight": torch.randn(W), "pointwise_weight": torch.randn(P)}
    biases = {"depthwise_bias": torch.randn(B), "pointwise_bias": torch.randn(5)}
    return {"x": torch.randn(X), **weights, **biases, "residual": torch.randn(2, 5, 7, 6), "padding": 1}


def refuses(function, arguments, argument, error, got):
    with pytest.raises(error) as caught:
        function(**arguments)
    message = str(caught.value)
    pattern = rf"^{function.__name__}: {argument}: got (?s:.*)expected "
    assert type(caught.value) is error
    assert re.match(pattern, message), message
    assert re.search(got, message), message


@pytest.mark.parametrize(("argument", "value", "error", "got"), WHERE)
@pytest.mark.parametrize("function", [F.depthwise_conv2d, F.separable_conv2d], ids=lambda f: f.__name__)
def test_numbers_and_names(function, argument, value, error, got):
    arguments = depthwise_arguments() if function is F.depthwise_conv2d else separable_arguments()
    refuses(function, {**arguments, argument: value}, argument, error, got)


@pytest.mark.parametrize(("argument", "change", "error", "got"), DEPTHWISE)
def test_tensors_of_depthwise(argument, change, error, got):
    arguments = depthwise_arguments()
    refuses(F.depthwise_conv2d, {**arguments, argument: change(arguments[argument])}, argument, error, got)


@pytest.mark.parametrize(("argument", "change", "error", "got"), DEPTHWISE)
def test_shared_tensors_of_separable(argument, change, error, got):
    arguments = separable_arguments()
    arguments["padding"] = 0
    del arguments["residual"]
    argument = argument if argument == "x" else f"depthwise_{argument}"
    refuses(F.separable_conv2d, {**arguments, argument: change(arguments[argument])}, argument, error, got)


@pytest.mark.parametrize(("argument", "change", "error", "got"), SEPARABLE)
def test_other_arguments_of_separable(argument, change, error, got):
    arguments = separable_arguments()
    refuses(F.separable_conv2d, {**arguments, argument: change(arguments.get(argument))}, argument, error, got)


@pytest.mark.parametrize("padding", ["same"])
def test_same_padding_is_an_error_when_strided(padding):
    for function, arguments in (
        (F.depthwise_conv2d, depthwise_arguments()),
        (F.separable_conv2d, separable_arguments()),
    ):
        arguments.pop("residual", None)
        refuses(function, {**arguments, "padding": padding, "stride": 2}, "padding", ValueError, "stride")
        assert function(**{**arguments, "padding": padding}).shape[2:] == X[2:]


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_name_themselves(rank):
    function = {1: F.depthwise_conv1d, 3: F.depthwise_conv3d}[rank]
    tensors = {"x": torch.randn(2, 8, *(5,) * rank), "weight": torch.randn(8, 1, *(3,) * rank)}
    refuses(function, {**tensors, "x": torch.randn(2, 8, *(5,) * (rank + 1))}, "x", ValueError, "dimensions")
    refuses(function, {**tensors, "stride": (1,) * (rank + 1)}, "stride", ValueError, f"{rank} ints")


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_every_way_of_calling_is_checked(grad_mode, requires_grad):
    arguments = {**depthwise_arguments(), "weight": torch.randn(W).half()}
    arguments["x"].requires_grad_(requires_grad)
    with torch.set_grad_enabled(grad_mode):
        refuses(F.depthwise_conv2d, arguments, "weight", TypeError, "float16")
    with torch.inference_mode():
        refuses(F.depthwise_conv2d, {**arguments, "x": torch.randn(X)}, "weight", TypeError, "float16")


def test_errors_are_the_same_under_transforms_and_compile():
    x, weight = torch.randn(X), torch.randn(W).half()
    with pytest.raises((TypeError, RuntimeError), match="weight: got"):
        torch.func.grad(lambda x: F.depthwise_conv2d(x, weight).sum())(x)
    with pytest.raises(Exception, match="weight: got"):
        torch.compile(F.depthwise_conv2d, backend="eager", fullgraph=True)(x, weight)


OPERATOR_ERRORS = {
    "x": lambda a: {**a, "x": torch.randn(2, 8)},
    "weight": lambda a: {**a, "weight": torch.randn(8, 2, 3, 3)},
    "bias": lambda a: {**a, "bias": torch.randn(3)},
    "stride": lambda a: {**a, "stride": [1, 0]},
    "padding": lambda a: {**a, "padding": [0, 0, 0, -1]},
    "dilation": lambda a: {**a, "dilation": [0, 1]},
    "activation": lambda a: {**a, "activation": "swish"},
}


@pytest.mark.parametrize("argument", OPERATOR_ERRORS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_operators_check_too(argument, backward):
    """Called directly the operators raise as well, and name the argument."""
    where = dict(zip(("stride", "padding", "dilation"), operators.geometry(), strict=True))
    arguments = {**depthwise_arguments(), **where, "activation": "none", "activation_param": 0.0}
    arguments = OPERATOR_ERRORS[argument](arguments)
    if backward:
        needs = {"need_x": True, "need_weight": True, "need_bias": True}
        with pytest.raises((RuntimeError, ValueError, TypeError), match=f"{argument}: got .*expected"):
            operators.ops.depthwise_backward(grad=torch.randn(X), output=None, **arguments, **needs)
    else:
        with pytest.raises((RuntimeError, ValueError, TypeError), match=f"{argument}: got .*expected"):
            operators.ops.depthwise(**arguments, packed=None)


@pytest.mark.parametrize("wrong", ["grad", "output"])
def test_backward_checks_what_only_it_has(wrong):
    x, weight, bias = depthwise_arguments().values()
    y = operators.depthwise(x, weight, bias, "relu")
    given = {"grad": torch.randn_like(y), "output": y}
    for value in (given[wrong][:, :7], given[wrong].double(), *([None] if wrong == "output" else [])):
        arguments = {**given, wrong: value}
        with pytest.raises((RuntimeError, ValueError, TypeError), match=f"{wrong}: got .*expected"):
            operators.ops.depthwise_backward(
                arguments["grad"],
                x,
                weight,
                bias,
                arguments["output"],
                *operators.geometry(),
                "relu",
                0.0,
                True,
                True,
                True,
            )
