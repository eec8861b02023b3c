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


@pytest.mark.parametrize("grad_mode", [True, False])
def test_an_input_on_another_device_than_its_weights(grad_mode):
    """The dispatcher sees two devices; the message is the same as the other way round."""
    with torch.set_grad_enabled(grad_mode):
        arguments = {**depthwise_arguments(), "x": torch.randn(X, device="meta")}
        refuses(F.depthwise_conv2d, arguments, "weight", ValueError, "cpu, expected meta")
        arguments = {**separable_arguments(), "x": torch.randn(X, device="meta")}
        refuses(F.separable_conv2d, arguments, "depthwise_weight", ValueError, "cpu, expected meta")


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


WHERE_OF_OPERATORS = [
    ("stride", [1, 0]),
    ("stride", [1]),
    ("padding", [0, 0, 0, -1]),
    ("padding", [1, 1]),
    ("dilation", [0, 1]),
    ("dilation", [1, 1, 1]),
    ("activation", "swish"),
]
OPERATOR_ERRORS = [
    *(("dw", *error) for error in WHERE_OF_OPERATORS),
    ("dw", "x", torch.randn(2, 8)),
    ("dw", "weight", torch.randn(8, 2, 3, 3)),
    ("dw", "bias", torch.randn(3)),
    *(("sep", *error) for error in WHERE_OF_OPERATORS),
    ("sep", "mid_activation", "swish"),
    ("sep", "pointwise_weight", torch.randn(5, 7, 1, 1)),
    ("sep", "pointwise_weight", torch.randn(0, 8, 1, 1)),
    ("sep", "pointwise_bias", torch.randn(4)),
    ("sep", "residual", torch.randn(2, 5, 7, 5)),
]


def operator_arguments(op, activation="none"):
    where = dict(zip(("stride", "padding", "dilation"), operators.geometry(), strict=True))
    last = {"activation": activation, "activation_param": 0.0}
    if op == "dw":
        return {**depthwise_arguments(), **where, **last}
    return {**separable_arguments(), **where, "mid_activation": "none", "mid_param": 0.0, **last}


def call_backward(op, grad, output, arguments):
    names = ["x", "weight", "bias"]
    if op == "sep":
        names = ["x", "depthwise_weight", "pointwise_weight", "depthwise_bias", "pointwise_bias", "residual"]
    operator = operators.ops.depthwise_backward if op == "dw" else operators.ops.separable_backward
    return operator(grad=grad, output=output, **arguments, **{f"need_{name}": True for name in names})


def names_in_operators(argument):
    return pytest.raises((RuntimeError, ValueError, TypeError), match=f"{argument}: got .*expected")


@pytest.mark.parametrize(("op", "argument", "value"), OPERATOR_ERRORS)
def test_the_operators_check_too(op, argument, value):
    """Called directly the operators raise as well, and name the argument."""
    arguments = {**operator_arguments(op), argument: value}
    with names_in_operators(argument):
        call_backward(op, torch.randn(2, 8 if op == "dw" else 5, 7, 6), None, arguments)
    forward = {"dw": operators.ops.depthwise, "sep": operators.ops.separable}[op]
    with names_in_operators(argument):
        forward(**arguments, **({} if op == "dw" else {"fuse": "auto"}))


def test_the_operator_checks_fuse():
    with names_in_operators("fuse"):
        operators.ops.separable(**operator_arguments("sep"), fuse="sometimes")


@pytest.mark.parametrize("op", ["dw", "sep"])
@pytest.mark.parametrize("wrong", ["grad", "output"])
def test_backward_checks_what_only_it_has(op, wrong):
    arguments = operator_arguments(op, "relu")
    y = torch.rand(2, 8 if op == "dw" else 5, 7, 6)
    given = {"grad": torch.randn_like(y), "output": y}
    for value in (given[wrong][:, :4], given[wrong].double(), *([None] if wrong == "output" else [])):
        with names_in_operators(wrong):
            call_backward(op, arguments=arguments, **{**given, wrong: value})


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", ["dw", "sep"])
def test_an_output_that_is_not_needed_is_not_read(op, requires_grad):
    """silu's derivative is not read off its output: what is passed as one changes nothing, nor its derivative."""
    arguments = operator_arguments(op, "silu")
    arguments["x"].requires_grad_(requires_grad)
    g = torch.randn(2, 8 if op == "dw" else 5, 7, 6)
    results = [call_backward(op, g, output, arguments)[:2] for output in (None, torch.full_like(g, 7))]
    torch.testing.assert_close(*results)
    if requires_grad:
        seconds = [torch.autograd.grad(weight_grad.square().sum(), arguments["x"]) for _, weight_grad in results]
        torch.testing.assert_close(*seconds)
