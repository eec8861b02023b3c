"""dsconv_ext.reference, the definitions with loops: they are PyTorch's convolutions in float64."""

import pytest
import torch
import torch.nn.functional as TF

import oracle
from cases import sample
from dsconv_ext import reference

CONV = {1: TF.conv1d, 2: TF.conv2d, 3: TF.conv3d}
PROBLEMS = [c for c in [*sample("dw", 12, seed=11), *sample("sep", 12, seed=11)] if c.multiplications < 2_000_000]


def flat(padding):
    return [side for pair in padding for side in pair]


def definition(case, tensors):
    where = (case.stride, flat(case.padding), case.dilation)
    if case.op == "dw":
        return reference.depthwise(*map(tensors.get, ("x", "weight", "bias")), *where, *case.activation)
    names = ("x", "depthwise_weight", "pointwise_weight", "depthwise_bias", "pointwise_bias", "residual")
    return reference.separable(*map(tensors.get, names), *where, *case.mid, *case.activation)


def convolutions(case, tensors):
    """The same by F.conv*d in float64; the oracle has another way there."""
    t = {name: value.double() for name, value in tensors.items()}
    conv, prefix = CONV[case.spatial], "" if case.op == "dw" else "depthwise_"
    x = oracle.pad(t["x"], case.padding)
    where = {"stride": case.stride, "dilation": case.dilation, "groups": case.channels}
    y = conv(x, t[f"{prefix}weight"], t.get(f"{prefix}bias"), **where)
    if case.op == "sep":
        y = conv(oracle.activate(y, case.mid), t["pointwise_weight"], t.get("pointwise_bias"))
        y = y + t["residual"] if "residual" in t else y
    return oracle.activate(y, case.activation)


@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_values_and_gradients(case):
    """Whatever the dtype of the inputs, output and arithmetic are float64; gradients come from autograd."""
    leaves = {name: t.requires_grad_() for name, t in case.inputs(integer=False).items()}
    ours, theirs = definition(case, leaves), convolutions(case, leaves)
    assert ours.dtype == torch.float64
    g = torch.randn_like(theirs)
    results = [(y, *torch.autograd.grad(y, tuple(leaves.values()), g)) for y in (ours, theirs)]
    half = case.dtype_name in ("bf16", "fp16")
    for first, second in zip(*results, strict=True):
        rtol = 1e-9 if first.dtype == torch.float64 else 4 * torch.finfo(first.dtype).eps
        torch.testing.assert_close(first, second, rtol=rtol, atol=1e-9 if not half else 1e-6)


def test_the_problems_are_of_every_kind():
    assert {(c.op, c.spatial) for c in PROBLEMS} == {("dw", 1), ("dw", 2), ("dw", 3), ("sep", 1), ("sep", 2)}
    assert any(c.multiplier > 1 for c in PROBLEMS) and any(max(c.stride) > 1 < max(c.dilation) for c in PROBLEMS)


@pytest.mark.parametrize("activation", [*oracle.ACTIVATIONS, "leaky_relu:0.3", "elu:0.4"])
def test_activations(activation):
    name, _, parameter = activation.partition(":")
    parameter = float(parameter) if parameter else oracle.DEFAULT_PARAM.get(name, 0.0)
    z = torch.linspace(-8, 8, 101)
    y = reference.activation(z, name, parameter)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, oracle.activate(z.double(), (name, parameter)), rtol=1e-12, atol=1e-12)
