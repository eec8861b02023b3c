"""Packed layers: the same bits as the operators that take weights as they are, used where they can be, refused else."""

import pytest
import torch
from torch import nn as tnn

import choices
from cases import sample
from dsconv_ext import functional, nn, packing
from dsconv_ext.activations import parse
from dsconv_ext.geometry import normalise
from judges import spelled, subject

pytestmark = pytest.mark.usefixtures("library")
NOTHING = ("none", 0.0)
PLAIN = ([1, 1], [1, 1, 1, 1], [1, 1])


def packed_output(case, tensors):
    pair = case.op == "sep"
    prefix = "depthwise_" if pair else ""
    weight = tensors[f"{prefix}weight"]
    where = normalise(case.spatial, *case.geometry, weight.shape)
    layer = packing.PackedLayer.of(
        (weight, tensors.get(f"{prefix}bias")),
        (tensors.get("pointwise_weight"), tensors.get("pointwise_bias")),
        tensors["x"].size(1),
        where,
        parse(spelled(case.mid)) if pair else NOTHING,
        parse(spelled(case.activation)),
        case.fuse if pair else "auto",
    )
    return layer(tensors["x"], tensors.get("residual"))


@pytest.mark.parametrize("case", sample("dw", 60, seed=11) + sample("sep", 60, seed=11), ids=str)
def test_the_same_bits(case):
    tensors = case.inputs(integer=False)
    with torch.no_grad():
        expected = subject(case, tensors)
        y = packed_output(case, tensors)
    assert torch.equal(y, expected) and y.stride() == expected.stride()


@pytest.mark.parametrize("taps", [(1, 2), (3, 3), (2, 4), (5, 5), (7, 7), (3, 9), (1, 31)], ids=str)
@pytest.mark.parametrize(("channels", "multiplier"), [(40, 1), (9, 1), (20, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_rows_of_taps_that_are_multiplied_in_pairs(taps, channels, multiplier, stride):
    """Packed bfloat16 weights hold rows of taps in two forms, for two kinds of kernels."""
    x = torch.randn(2, channels, 9, 40).bfloat16()
    weight = torch.randn(channels * multiplier, 1, *taps).bfloat16()
    where = normalise(2, stride, (taps[0] // 2, taps[1] // 2), 1, weight.shape)
    layer = packing.PackedLayer.of((weight, None), (None, None), channels, where, NOTHING, NOTHING)
    for layout in (torch.channels_last, torch.contiguous_format):
        given = x.to(memory_format=layout)
        expected = functional.depthwise_conv2d(given, weight, stride=stride, padding=(taps[0] // 2, taps[1] // 2))
        assert torch.equal(layer(given), expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("fuse", ["always", "never"])
@pytest.mark.parametrize("size", [(5, 7), (30, 40)])
def test_taps_that_cancel(layout, fuse, size):
    """Each kernel gets the taps in its form: a tap with bits of its neighbour would leave something."""
    x = torch.ones(1, 24, *size).bfloat16().to(memory_format=layout)
    weight = torch.tensor([1.0, -1.0] * 12).view(1, 1, 4, 6).expand(24, 1, 4, 6).bfloat16().contiguous()
    identity = torch.eye(24).view(24, 24, 1, 1).bfloat16()
    where = normalise(2, 1, 0, 1, weight.shape)
    layer = packing.PackedLayer.of((weight, None), (identity, None), 24, where, NOTHING, NOTHING, fuse)
    assert not functional.separable_conv2d(x, weight, identity, fuse=fuse).any()
    assert not layer(x).any()


@pytest.mark.parametrize("fuse", ["always", "never"])
def test_explanations_name_the_same_rows(fuse):
    x, dw, pw = torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1)
    with choices.recorded() as as_they_are:
        functional.separable_conv2d(x, dw, pw, padding=1, fuse=fuse)
    with choices.recorded() as packed:
        packing.PackedLayer.of((dw, None), (pw, None), 8, PLAIN, NOTHING, NOTHING, fuse)(x)
    assert choices.chosen(packed) == choices.chosen(as_they_are)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "outputs"), [(8, 24), (3, 1), (40, 70), (24, 8)])
@pytest.mark.parametrize("size", [(9,), (5, 7), (2, 3, 4), (1, 1)], ids=["1d", "2d", "3d", "1x1"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_pointwise_convolution_alone(dtype, channels, outputs, size, channels_last):
    """Against a product in float64; the rows that run are those of the second stage of a separable one."""
    x = torch.randn(2, channels, *size, dtype=dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weight = torch.randn(outputs, channels, *[1] * len(size), dtype=dtype) / channels**0.5
    bias = torch.randn(outputs, dtype=dtype)
    residual = torch.randn(2, outputs, *size, dtype=dtype)
    for b, r, (name, param) in [(bias, residual, ("leaky_relu", 0.1)), (None, None, ("none", 0.0))]:
        packed = torch.ops.dsconv.pack_pointwise(weight, b, name, param)
        with choices.recorded() as made:
            y = torch.ops.dsconv.run_packed(x, packed, r)
        z = torch.einsum("nc...,kc->nk...", x.double(), weight.flatten(1).double())
        z = z if b is None else z + b.double().reshape(-1, *[1] * len(size))
        z = z if r is None else z + r.double()
        z = torch.nn.functional.leaky_relu(z, param) if name == "leaky_relu" else z
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), z, rtol=tolerance, atol=tolerance * z.abs().max().item())
        assert (y.stride(1) == 1) == (x.stride(1) == 1) and {c["op"] for c in made} == {"pointwise"}
        assert all(row.startswith("pointwise_fwd") for row in choices.chosen(made))
    assert torch.ops.dsconv.run_packed(x[:0], packed, None).shape == (0, outputs, *size)


def test_rows_that_read_weights_as_they_are_say_so():
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 1, 3, 3)
    layer = packing.PackedLayer.of((weight, None), (None, None), 8, PLAIN, NOTHING, NOTHING)
    with choices.forced("depthwise_fwd_reference"), choices.recorded() as made:
        layer(x)
    assert choices.refusals(made, "depthwise_fwd_reference") == ["the weights are packed, and not for it"]
    assert choices.chosen(made) and "depthwise_fwd_reference" not in choices.chosen(made)


def modules():
    return {
        "dw": nn.DepthwiseConv2d(8, 16, 3, padding=1),
        "sep": nn.DepthwiseSeparableConv2d(8, 12, 3, padding=1, mid_activation="relu6", activation="silu"),
    }


kinds = pytest.mark.parametrize("kind", ["dw", "sep"])


def refuse(*_, **__):
    raise AssertionError("the operator that takes weights as they are was called")


@kinds
def test_modules_use_them_in_inference(kind, monkeypatch):
    module, x = modules()[kind].eval(), torch.randn(2, 8, 9, 9)
    expected = module(x).detach()
    monkeypatch.setattr(functional, "_depthwise", refuse)
    monkeypatch.setattr(functional, "_separable", refuse)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(module(x), expected)
    with pytest.raises(AssertionError):
        module(x)


@kinds
def test_modules_made_in_inference_mode_use_them_too(kind, monkeypatch):
    x = torch.randn(2, 8, 9, 9)
    with torch.inference_mode():
        module, other = modules()[kind].eval(), modules()[kind].eval()
        with monkeypatch.context() as unpacked:
            unpacked.setattr(packing, "is_plain", lambda *_: False)
            expected = [m(x) for m in (module, other)]
        monkeypatch.setattr(functional, "_depthwise", refuse)
        monkeypatch.setattr(functional, "_separable", refuse)
        torch.testing.assert_close(module(x), expected[0])
        module.load_state_dict(other.state_dict())
        torch.testing.assert_close(module(x), expected[1])
        for parameter in module.parameters():
            parameter.zero_()  # nothing shows that
        module.repack()
        assert not module(x).any()


@kinds
@pytest.mark.parametrize(
    "change",
    [
        lambda conv, module: setattr(conv, "stride", (2, 1)),
        lambda conv, module: setattr(conv, "padding", (2, 0)),
        lambda conv, module: setattr(conv, "padding", "same"),
        lambda conv, module: setattr(conv, "dilation", (2, 2)),
        lambda conv, module: setattr(conv, "padding_mode", "reflect"),
        lambda conv, module: conv.bias.add_(1),
        lambda conv, module: setattr(conv, "bias", None),
        lambda conv, module: setattr(module, "mid_activation", "tanh"),
        lambda conv, module: setattr(module, "activation", ("leaky_relu", 0.3)),
    ],
    ids=["stride", "padding", "same", "dilation", "mode", "bias", "no bias", "mid", "activation"],
)
def test_a_changed_setting_shows(kind, change):
    module, x = modules()[kind].eval(), torch.randn(2, 8, 9, 9)
    conv = module if kind == "dw" else module.depthwise
    with torch.no_grad():
        module(x)
        change(conv, module)
        after = module(x)
    torch.testing.assert_close(after, module(x).detach())


@kinds
def test_what_they_cannot_compute_is_computed(kind):
    module, x = modules()[kind].eval(), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(module(x[0]), expected[0])
        torch.testing.assert_close(torch.vmap(module)(x[:, None])[:, 0], expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x).dtype is torch.bfloat16
        if kind == "sep":
            residual = torch.randn_like(expected)
            torch.testing.assert_close(module(x[0], residual[0]), module(x, residual)[0])


@kinds
def test_a_tangent_passes_through_in_no_grad_mode(kind):
    module, x = modules()[kind].eval(), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        module(x)
        _, tangent = torch.func.jvp(module, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, x))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    assert tangent.abs().sum() > 0


@kinds
def test_errors_are_those_of_the_functions(kind):
    module = modules()[kind].eval()
    module(torch.randn(2, 8, 9, 9))
    shapes = (2, 4, 9, 9), (9, 9), (2, 8, 0, 9)
    for wrong in (torch.randn(2, 8, 9, 9).double(), *map(torch.randn, shapes)):
        messages = set()
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled), pytest.raises((TypeError, ValueError), match=": got") as raised:
                module(wrong)
            messages.add(str(raised.value))
        assert len(messages) == 1


@kinds
def test_an_input_of_fewer_channels_is_refused(kind):
    """Its filters are a multiple of them: the weight alone would not say that they are too few."""
    module = {"dw": nn.DepthwiseConv2d(8, 8, 3), "sep": nn.DepthwiseSeparableConv2d(8, 4, 3)}[kind]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(ValueError, match="x: got 4 channels, expected 8"):
            module(torch.randn(1, 4, 5, 5))


def test_traces_hold_the_parameters():
    """A trace must not freeze what was packed when it was made."""
    module, x = modules()["sep"].eval(), torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        module(x)
        traced = torch.fx.experimental.proxy_tensor.make_fx(module)(x)
    assert "run_packed" not in traced.code and "separable" in traced.code


class TestProvenance:
    x = torch.randn(1, 8, 5, 5)

    def packed(self, channels=8):
        weight = torch.randn(channels, 1, 3, 3)
        return torch.ops.dsconv.pack(weight, None, None, None, channels, *PLAIN, *NOTHING, *NOTHING, "auto")

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda p: p[: p.numel() // 2].clone(),
            lambda p: p[:8].clone(),
            lambda p: p[:0],
            torch.zeros_like,
            lambda p: p.float(),
            lambda p: torch.cat([p, p]),
            lambda p: torch.stack([p, p], 1)[:, 0],
        ],
        ids=["half", "magic", "nothing", "zeros", "float", "twice", "strided"],
    )
    def test_other_bytes_are_refused(self, spoil):
        with pytest.raises(RuntimeError, match="packed: got .*expected"):
            torch.ops.dsconv.run_packed(self.x, spoil(self.packed()), None)

    @pytest.mark.parametrize(
        ("x", "residual", "argument"),
        [
            (x[:, :4], None, "x"),
            (x.double(), None, "x"),
            (x[0], None, "x"),
            (x[..., 0], None, "x"),
            (x, x, "residual"),
        ],
        ids=["channels", "dtype", "unbatched", "rank", "residual"],
    )
    def test_other_inputs_are_refused(self, x, residual, argument):
        with pytest.raises(RuntimeError, match=f"{argument}: got .*expected"):
            torch.ops.dsconv.run_packed(x, self.packed(), residual)

    @pytest.mark.parametrize(
        ("changed", "value"),
        [(0, torch.ones(8, 2, 3, 3)), (1, torch.ones(7)), (2, torch.ones(4, 7, 1, 1)), (4, 3), (5, [0, 1]), (12, "x")],
        ids=["weight", "bias", "pointwise", "groups", "stride", "fuse"],
    )
    def test_pack_checks(self, changed, value):
        arguments = [torch.randn(8, 1, 3, 3), None, None, None, 8, *PLAIN, *NOTHING, *NOTHING, "auto"]
        arguments[changed] = value
        with pytest.raises(RuntimeError, match=": got .*expected"):
            torch.ops.dsconv.pack(*arguments)


class TestPackedPointwiseOperators:
    x = torch.randn(1, 8, 5, 5)

    @pytest.mark.parametrize(
        ("x", "residual", "argument"),
        [
            (x[:, :4], None, "x"),
            (x.double(), None, "x"),
            (torch.randn(8, 8, 5), None, "x"),
            (x[..., :0], None, "x"),
            (x, x, "residual"),
            (x, torch.randn(1, 6, 5, 5).double(), "residual"),
        ],
        ids=["channels", "dtype", "unbatched", "empty", "residual", "residual-dtype"],
    )
    def test_other_inputs_are_refused(self, x, residual, argument):
        packed = torch.ops.dsconv.pack_pointwise(torch.randn(6, 8, 1, 1), None, "none", 0.0)
        with pytest.raises(RuntimeError, match=f"{argument}: got .*expected"):
            torch.ops.dsconv.run_packed(x, packed, residual)

    @pytest.mark.parametrize(
        ("weight", "bias", "activation"),
        [
            (torch.randn(6, 8), None, "none"),
            (torch.randn(6, 8, 3, 3), None, "none"),
            (torch.randn(0, 8, 1, 1), None, "none"),
            (torch.randn(6, 8, 1, 1), torch.randn(5), "none"),
            (torch.randn(6, 8, 1, 1), torch.randn(6).double(), "none"),
            (torch.randn(6, 8, 1, 1), None, "swish"),
            (torch.ones(6, 8, 1, 1, dtype=torch.int32), None, "none"),
        ],
        ids=["rank", "taps", "filters", "bias", "bias-dtype", "activation", "dtype"],
    )
    def test_pack_checks(self, weight, bias, activation):
        with pytest.raises(RuntimeError, match=": got .*expected"):
            torch.ops.dsconv.pack_pointwise(weight, bias, activation, 0.0)


def test_nothing_is_packed_for_subclasses():
    class Other(tnn.Parameter):
        pass

    module = modules()["dw"].eval()
    module.weight = Other(module.weight.detach())
    with torch.no_grad():
        module(torch.randn(1, 8, 5, 5))
    assert module._packed is None
