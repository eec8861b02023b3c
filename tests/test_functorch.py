"""torch.func and forward-mode AD: every transform agrees with the composition of PyTorch's convolutions."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.autograd import gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import operators
from dsconv_ext import functional as F
from dsconv_ext import nn

ACTIVATIONS = ("none", "relu", "silu", "gelu", "hardswish", "elu", "leaky_relu")


def pair(op, activation):
    """Our function, the truth, and the tensors of a small problem."""
    if op == "dw":
        return (
            lambda x, w, b: F.depthwise_conv2d(x, w, b, padding=1, activation=activation),
            lambda x, w, b: operators.depthwise_truth(x, w, b, activation),
            operators.depthwise_tensors(requires_grad=False),
        )
    return (
        lambda x, dw, pw, db, pb, r: F.separable_conv2d(
            x, dw, pw, db, pb, padding=1, mid_activation="silu", activation=activation, residual=r
        ),
        lambda *t: operators.separable_truth(*t, "silu", activation),
        operators.separable_tensors(requires_grad=False),
    )


GEOMETRIES = (
    {"stride": 2, "padding": (1, 0)},
    {"stride": (1, 2), "padding": 2, "dilation": (2, 1)},
    {"padding": "same", "dilation": 2},
)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("op", ["dw", "sep"])
def test_every_transform_agrees_with_conv2d(op, geometry):
    """F.conv2d itself, not the oracle: strided, dilated, and every transform in turn."""
    tensors = operators.random((2, 3, 7, 6), (6, 1, 3, 2), (6,), requires_grad=False)
    if op == "sep":
        tensors += operators.random((4, 6, 1, 1), (4,), seed=1, requires_grad=False)

    def ours(x, w, b, *pointwise):
        if op == "dw":
            return F.depthwise_conv2d(x, w, b, **geometry)
        return F.separable_conv2d(x, w, pointwise[0], b, pointwise[1], **geometry, mid_activation="tanh")

    def theirs(x, w, b, *pointwise):
        y = torch.nn.functional.conv2d(x, w, b, **geometry, groups=x.size(-3))
        return y if op == "dw" else torch.nn.functional.conv2d(torch.tanh(y), *pointwise)

    tangents = tuple(torch.randn_like(t) for t in tensors)
    argnums = tuple(range(len(tensors)))
    varied, in_dims = batched(tensors, (0,))

    def forward_mode(function):
        with fwAD.dual_level():
            duals = [fwAD.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
            return tuple(fwAD.unpack_dual(function(*duals)))

    transforms = {
        "jvp": lambda f: jvp(f, tuple(tensors), tangents),
        "grad": lambda f: grad(scalar(f), argnums)(*tensors),
        "vmap(grad)": lambda f: vmap(grad(scalar(f), argnums), in_dims)(*varied),
        "forward-mode AD": forward_mode,
        "grad of grad": lambda f: grad(lambda *t: grad(scalar(f), 1)(*t).square().sum(), argnums)(*tensors),
        "jvp of grad": lambda f: jvp(grad(scalar(f), argnums), tuple(tensors), tangents),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(transform(ours), transform(theirs), msg=lambda m, name=name: f"{name}: {m}")
    leaves = tuple(t.requires_grad_() for t in tensors)
    assert gradgradcheck(ours, leaves, fast_mode=True)


def scalar(function):
    """A scalar function that is not linear in the output."""
    return lambda *tensors: function(*tensors).cos().sum()


everything = pytest.mark.parametrize("op", ["dw", "sep"])
activations = pytest.mark.parametrize("activation", ACTIVATIONS)


@everything
@activations
def test_jvp(op, activation):
    ours, truth, tensors = pair(op, activation)
    tangents = [torch.randn_like(t) for t in tensors]
    torch.testing.assert_close(jvp(ours, tuple(tensors), tuple(tangents)), jvp(truth, tuple(tensors), tuple(tangents)))


@everything
@activations
def test_jvp_of_one_input(op, activation):
    """The other tangents are zero."""
    ours, truth, tensors = pair(op, activation)
    for i, t in enumerate(tensors):
        tangent = torch.randn_like(t)

        def at(f, i=i):
            return lambda u: f(*tensors[:i], u, *tensors[i + 1 :])

        torch.testing.assert_close(jvp(at(ours), (t,), (tangent,)), jvp(at(truth), (t,), (tangent,)))


@everything
@activations
def test_grad_and_vjp(op, activation):
    ours, truth, tensors = pair(op, activation)
    argnums = tuple(range(len(tensors)))
    torch.testing.assert_close(grad(scalar(ours), argnums)(*tensors), grad(scalar(truth), argnums)(*tensors))
    g = torch.randn_like(truth(*tensors))
    torch.testing.assert_close(vjp(ours, *tensors)[1](g), vjp(truth, *tensors)[1](g))


@everything
@activations
def test_forward_mode_ad(op, activation):
    ours, truth, tensors = pair(op, activation)
    tangents = [torch.randn_like(t) for t in tensors]
    with fwAD.dual_level():
        duals = [fwAD.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        results = [tuple(fwAD.unpack_dual(f(*duals))) for f in (ours, truth)]
    torch.testing.assert_close(*results)


@everything
def test_forward_over_reverse_ad(op):
    """A Hessian-vector product by forward-mode AD through backward."""
    ours, truth, tensors = pair(op, "silu")
    tangent = torch.randn_like(tensors[0])

    def product(function):
        with fwAD.dual_level():
            x = fwAD.make_dual(tensors[0].clone().requires_grad_(), tangent)
            (g,) = torch.autograd.grad(scalar(function)(x, *tensors[1:]), x, create_graph=True)
            return fwAD.unpack_dual(g).tangent

    torch.testing.assert_close(product(ours), product(truth))


@everything
@pytest.mark.parametrize("mode", [jacfwd, jacrev])
def test_jacobians(op, mode):
    ours, truth, tensors = pair(op, "silu")
    argnums = tuple(range(len(tensors)))
    torch.testing.assert_close(mode(ours, argnums)(*tensors), mode(truth, argnums)(*tensors))


@everything
def test_hessian(op):
    ours, truth, tensors = pair(op, "tanh")
    torch.testing.assert_close(hessian(scalar(ours), (0, 1))(*tensors), hessian(scalar(truth), (0, 1))(*tensors))


def batched(tensors, which, size=3):
    """The tensors with ``size`` variants along a leading dimension of those in ``which``, and their ``in_dims``."""
    scale = torch.linspace(0.5, 1.5, size, dtype=tensors[0].dtype)
    varied = [scale.view(-1, *[1] * t.dim()) * t if i in which else t for i, t in enumerate(tensors)]
    return varied, tuple(0 if i in which else None for i in range(len(tensors)))


@pytest.mark.parametrize(
    ("op", "which"),
    [("dw", (0,)), ("dw", (1,)), ("dw", (2,)), ("dw", (0, 1)), ("dw", (0, 1, 2)), ("dw", (1, 2))]
    + [("sep", (0,)), ("sep", (1,)), ("sep", (2,)), ("sep", (0, 5)), ("sep", (3, 4)), ("sep", tuple(range(6)))],
)
def test_vmap(op, which):
    """Over each subset of the arguments, also of the gradient, of the tangent, and nested."""
    ours, truth, tensors = pair(op, "silu")
    varied, in_dims = batched(tensors, which)
    torch.testing.assert_close(vmap(ours, in_dims)(*varied), vmap(truth, in_dims)(*varied))
    argnums = tuple(range(len(tensors)))
    gradients = [vmap(grad(scalar(f), argnums), in_dims)(*varied) for f in (ours, truth)]
    torch.testing.assert_close(*gradients)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    pushed = [vmap(lambda *t, f=f: jvp(f, t, tangents), in_dims)(*varied) for f in (ours, truth)]
    torch.testing.assert_close(*pushed)
    twice = [t.expand(2, *t.shape) if d == 0 else t for t, d in zip(varied, in_dims, strict=True)]
    torch.testing.assert_close(vmap(vmap(ours, in_dims), in_dims)(*twice), vmap(vmap(truth, in_dims), in_dims)(*twice))


@everything
def test_vmap_over_another_dimension(op):
    ours, truth, tensors = pair(op, "relu")
    varied, in_dims = batched(tensors, (0, 1))
    moved = [t.movedim(0, -1) if d == 0 else t for t, d in zip(varied, in_dims, strict=True)]
    in_dims = tuple(-1 if d == 0 else None for d in in_dims)
    torch.testing.assert_close(vmap(ours, in_dims, out_dims=1)(*moved), vmap(truth, in_dims, out_dims=1)(*moved))


@everything
def test_vmap_of_the_operator(op):
    """Operators have a batching rule of their own."""
    _, truth, tensors = pair(op, "none")
    ours = operators.depthwise if op == "dw" else lambda *t: operators.separable(*t, "silu")
    varied, in_dims = batched(tensors, (0, 1))
    torch.testing.assert_close(vmap(ours, in_dims)(*varied), vmap(truth, in_dims)(*varied))


@everything
def test_grad_of_grad_and_vmap_of_hessian(op):
    ours, truth, tensors = pair(op, "tanh")
    tensors = [t[..., :2, :2] if t.dim() == 4 and t.shape[-1] == 3 and t.shape[1] > 1 else t for t in tensors]

    def second(function):
        return grad(lambda x: grad(scalar(function))(x, *tensors[1:]).square().sum())(tensors[0])

    torch.testing.assert_close(second(ours), second(truth))
    xs = torch.stack([tensors[0], 2 * tensors[0]])
    results = [vmap(lambda x, f=f: hessian(scalar(f))(x, *tensors[1:]))(xs) for f in (ours, truth)]
    torch.testing.assert_close(*results)


def test_per_sample_gradients_of_a_module():
    """vmap(grad(functional_call)), as differential privacy uses it."""
    module = nn.DepthwiseSeparableConv2d(4, 6, 3, padding=1, mid_activation="silu").double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)

    def loss(parameters, sample):
        return functional_call(module, parameters, (sample.unsqueeze(0),)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        one = grad(loss)(parameters, sample)
        torch.testing.assert_close({name: g[i] for name, g in per_sample.items()}, one)


@everything
def test_a_direct_operator_call_under_forward_ad_raises(op):
    """The registered formula knows no tangents; instead of dropping them the operator refuses."""
    _, _, tensors = pair(op, "none")
    ours = operators.depthwise if op == "dw" else operators.separable
    with fwAD.dual_level():
        dual = fwAD.make_dual(tensors[0], torch.randn_like(tensors[0]))
        with pytest.raises((RuntimeError, NotImplementedError)):
            ours(dual, *tensors[1:])
    with pytest.raises((RuntimeError, NotImplementedError)):
        jvp(lambda x: ours(x, *tensors[1:]), (tensors[0],), (torch.randn_like(tensors[0]),))
