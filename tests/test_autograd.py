"""Derivatives of every operator by numerical differentiation, what is computed and saved, and double backward."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import operators
from cases import parse_activation
from dsconv_ext import functional as F
from judges import spelled

ACTIVATIONS = [
    *("none", "relu", "relu6", "hardswish", "hardsigmoid", "silu", "gelu", "gelu_tanh", "leaky_relu", "sigmoid"),
    *("tanh", "elu", "leaky_relu:0.3", "leaky_relu:-0.2", "elu:0.4", "elu:-0.4"),
]


def depthwise_function(activation):
    chosen = spelled(parse_activation(activation))
    return lambda x, weight, bias: F.depthwise_conv2d(x, weight, bias, 1, 1, 1, activation=chosen)


def separable_function(mid, activation):
    options = {"mid_activation": spelled(parse_activation(mid)), "activation": spelled(parse_activation(activation))}
    return lambda x, dw, pw, db, pb, r: F.separable_conv2d(x, dw, pw, db, pb, 1, 1, 1, residual=r, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
class TestDepthwise:
    def test_gradcheck_of_the_function(self, activation):
        assert gradcheck(depthwise_function(activation), operators.depthwise_tensors(), check_forward_ad=True)

    def test_gradgradcheck_of_the_function(self, activation):
        assert gradgradcheck(depthwise_function(activation), operators.depthwise_tensors(), fast_mode=True)

    def test_gradcheck_of_the_operator(self, activation):
        assert gradcheck(lambda *t: operators.depthwise(*t, activation), operators.depthwise_tensors())

    def test_gradgradcheck_of_the_operator(self, activation):
        assert gradgradcheck(
            lambda *t: operators.depthwise(*t, activation), operators.depthwise_tensors(), fast_mode=True
        )

    def test_gradcheck_of_the_backward_operator(self, activation):
        tensors = operators.random((2, 4, 4, 3), seed=1) + operators.depthwise_tensors()
        assert gradcheck(lambda *t: operators.depthwise_backward(*t, activation), tensors, fast_mode=True)

    def test_gradgradcheck_of_the_backward_operator(self, activation):
        tensors = operators.random((2, 4, 4, 3), seed=1) + operators.depthwise_tensors()
        assert gradgradcheck(lambda *t: operators.depthwise_backward(*t, activation), tensors, fast_mode=True)


PLACES = [*((a, "none") for a in ACTIVATIONS), *(("silu", a) for a in ACTIVATIONS[1:])]


@pytest.mark.parametrize(("mid", "activation"), PLACES)
class TestSeparable:
    def test_gradcheck_of_the_function(self, mid, activation):
        tensors = operators.separable_tensors()
        assert gradcheck(separable_function(mid, activation), tensors, check_forward_ad=True, fast_mode=True)

    def test_gradgradcheck_of_the_function(self, mid, activation):
        assert gradgradcheck(separable_function(mid, activation), operators.separable_tensors(), fast_mode=True)

    def test_gradcheck_of_the_operator(self, mid, activation):
        tensors = operators.separable_tensors()
        assert gradcheck(lambda *t: operators.separable(*t, mid, activation), tensors, fast_mode=True)

    def test_gradgradcheck_of_the_operator(self, mid, activation):
        tensors = operators.separable_tensors()
        assert gradgradcheck(lambda *t: operators.separable(*t, mid, activation), tensors, fast_mode=True)

    def test_gradcheck_of_the_backward_operator(self, mid, activation):
        tensors = operators.random((2, 3, 4, 3), seed=1) + operators.separable_tensors()
        assert gradcheck(lambda *t: operators.separable_backward(*t, mid, activation), tensors, fast_mode=True)

    def test_gradgradcheck_of_the_backward_operator(self, mid, activation):
        tensors = operators.random((2, 3, 4, 3), seed=1) + operators.separable_tensors()
        assert gradgradcheck(lambda *t: operators.separable_backward(*t, mid, activation), tensors, fast_mode=True)


@pytest.mark.parametrize(
    "convolve", [F.depthwise_conv1d, F.depthwise_conv3d, F.separable_conv1d], ids=lambda f: f.__name__
)
def test_gradgradcheck_of_other_ranks(convolve):
    """Stride, dilation and asymmetric padding, in one and three dimensions."""
    rank = 3 if convolve is F.depthwise_conv3d else 1
    x, dw, pw = operators.random((1, 2, *(5, 4, 3)[:rank]), (2, 1, *(2,) * rank), (2, 2, *(1,) * rank))
    where = {"stride": 2, "padding": ((1, 2),) * rank, "dilation": 2}
    tensors = (x, dw, pw) if convolve is F.separable_conv1d else (x, dw)
    assert gradcheck(lambda *t: convolve(*t, **where), tensors)
    assert gradgradcheck(lambda *t: convolve(*t, **where), tensors, fast_mode=True)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_are_computed_as_asked_depthwise(activation, layout, create_graph):
    """Each subset of inputs gets its gradient, equal to the one computed together with all others."""
    tensors = operators.depthwise_tensors(torch.float32, requires_grad=False)
    tensors[0] = tensors[0].to(memory_format=layout)
    check_subsets(depthwise_function(activation), tensors, create_graph)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_gradients_are_computed_as_asked_separable(activation):
    check_subsets(separable_function("relu6", activation), operators.separable_tensors(torch.float32, False), False)


def check_subsets(function, tensors, create_graph):
    everything = [t.clone().requires_grad_() for t in tensors]
    y = function(*everything)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    full = torch.autograd.grad(y, everything, g)
    for wanted in itertools.product((False, True), repeat=len(tensors)):
        inputs = [t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        y = function(*inputs)
        assert y.requires_grad == any(wanted)
        chosen = [t for t in inputs if t.requires_grad]
        if not chosen:
            continue
        gradients = torch.autograd.grad(y, chosen, g, create_graph=create_graph)
        for gradient, reference in zip(gradients, itertools.compress(full, wanted), strict=True):
            torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("with_bias", [True, False])
def test_masked_results_of_depthwise_backward(needs, with_bias):
    """What was not asked for, and the gradient of an absent bias, is an undefined tensor."""
    x, weight, bias = operators.depthwise_tensors(torch.float32, requires_grad=False)
    g = torch.randn(2, 4, 4, 3)
    results = operators.depthwise_backward(g, x, weight, bias if with_bias else None, "relu", needs=needs)
    assert [r is None for r in results] == [not needs[0], not needs[1], not (needs[2] and with_bias)]


def test_absent_biases_have_no_gradient():
    x, dw, pw, _, _, residual = operators.separable_tensors(torch.float32, requires_grad=False)
    results = operators.separable_backward(torch.randn(2, 3, 4, 3), x, dw, pw, None, None, residual, "relu6", "silu")
    assert [r is None for r in results] == [False, False, False, True, True, False]


@pytest.mark.parametrize("masked", range(6))
def test_masked_results_of_separable_backward(masked):
    tensors = operators.separable_tensors(torch.float32, requires_grad=False)
    needs = [i != masked for i in range(6)]
    results = operators.separable_backward(torch.randn(2, 3, 4, 3), *tensors, "relu6", "silu", needs=needs)
    assert [r is None for r in results] == [i == masked for i in range(6)]
    alone = operators.separable_backward(
        torch.randn(2, 3, 4, 3), *tensors, "relu6", "silu", needs=[not n for n in needs]
    )
    assert [r is None for r in alone] == [i != masked for i in range(6)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_and_strides_of_the_parameters(dtype):
    """As DDP's buckets want them, for parameters of any memory format."""
    x = torch.randn(2, 8, 5, 5, dtype=dtype)
    dw = torch.randn(8, 1, 3, 3, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    pw = torch.randn(8, 6, 1, 1, dtype=dtype).transpose(0, 1).requires_grad_()
    F.separable_conv2d(x, dw, pw).backward(torch.randn(2, 6, 3, 3, dtype=dtype))
    for parameter in (dw, pw):
        assert parameter.grad.dtype == dtype
        assert parameter.grad.stride() == torch.empty_like(parameter).stride()


def test_double_backward_equals_that_of_pytorch():
    """A gradient penalty: the gradient of the squared norm of a gradient."""

    def penalty(convolve):
        x, weight, bias = operators.depthwise_tensors()
        y = convolve(x, weight, bias)
        (gx,) = torch.autograd.grad(y, x, torch.cos(y.detach()), create_graph=True)
        gx.square().sum().backward()
        return x.grad, weight.grad

    for activation in ("silu", "gelu", "tanh", "elu"):
        ours = penalty(depthwise_function(activation))
        theirs = penalty(lambda x, w, b, a=activation: operators.depthwise_truth(x, w, b, a))
        torch.testing.assert_close(ours, theirs)


def test_third_derivatives():
    x, weight, bias = operators.depthwise_tensors()

    def third(function):
        y = function(x, weight, bias)
        g = torch.ones_like(y)
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        return torch.autograd.grad(second.square().sum(), (x, weight))

    ours, theirs = third(depthwise_function("tanh")), third(lambda *t: operators.depthwise_truth(*t, "tanh"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_saved_tensors_are_checked_for_writes(activation):
    """Writing a saved input before backward is an error, as with PyTorch's operators."""
    x, weight, bias = operators.depthwise_tensors()
    x = x.detach().requires_grad_() * 1
    y = F.depthwise_conv2d(x, weight, bias, padding=1, activation=activation)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.ones_like(y))


def test_what_is_saved_for_backward():
    """The input and the weight; the output only where the derivative is read off it; never a depthwise map."""

    def saved(function, tensors):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
            function(*tensors)
        return sizes

    tensors = operators.separable_tensors(torch.float32)
    middle, output = (2, 4, 4, 3), (2, 3, 4, 3)
    for activation in ("none", "relu", "silu"):
        sizes = saved(
            lambda *t, a=activation: F.separable_conv2d(*t, padding=1, mid_activation="relu6", activation=a),
            tensors[:5],
        )
        assert middle not in sizes
        assert (output in sizes) == (activation == "relu")


def test_no_graph_without_need():
    """With grad mode off, or without an input that needs it, nothing is recorded."""
    x, weight, bias = operators.depthwise_tensors()
    with torch.no_grad():
        assert F.depthwise_conv2d(x, weight, bias).grad_fn is None
    with torch.inference_mode():
        assert F.depthwise_conv2d(x, weight, bias).is_inference()
    assert F.depthwise_conv2d(x.detach(), weight.detach(), bias.detach()).grad_fn is None


def test_the_fast_function_is_chosen_in_grad_mode():
    """In plain grad mode the public functions record their own node, not the one of the registered formula."""
    tensors = operators.depthwise_tensors()
    public = type(F.depthwise_conv2d(*tensors, padding=1).grad_fn)
    registered = type(operators.depthwise(*tensors).grad_fn)
    assert public is not registered
    assert issubclass(public, torch.autograd.function.BackwardCFunction)


def test_gradients_accumulate_and_graphs_can_be_kept():
    x, weight, bias = operators.depthwise_tensors()
    y = F.depthwise_conv2d(x, weight, bias, padding=1, activation="silu")
    g = torch.randn_like(y)
    y.backward(g, retain_graph=True)
    once = weight.grad.clone()
    y.backward(g)
    torch.testing.assert_close(weight.grad, 2 * once)


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    tensors = operators.separable_tensors()
    function = separable_function("silu", "relu")
    y = checkpoint(function, *tensors, use_reentrant=False)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, tensors, g)
    torch.testing.assert_close(ours, torch.autograd.grad(function(*tensors), tensors, g))
