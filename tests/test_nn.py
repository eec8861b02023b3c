"""The modules: drop-in state dicts, copies, padding modes, construction from convolutions, hooks, packed weights."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn as tnn

import dsconv_ext
import oracle
from cases import parse_activation
from dsconv_ext import nn
from judges import spelled

PLAIN = {1: tnn.Conv1d, 2: tnn.Conv2d, 3: tnn.Conv3d}
DEPTHWISE = {1: nn.DepthwiseConv1d, 2: nn.DepthwiseConv2d, 3: nn.DepthwiseConv3d}
SEPARABLE = {1: nn.DepthwiseSeparableConv1d, 2: nn.DepthwiseSeparableConv2d}
NORM = {1: tnn.BatchNorm1d, 2: tnn.BatchNorm2d}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def image(rank=2, channels=8, size=9, **options):
    return torch.randn(2, channels, *range(size, size + rank), **options)


def pair(rank=2, **options):
    """A separable module and the same two plain convolutions."""
    module = SEPARABLE[rank](8, 12, 3, **{"padding": 1, **options})
    options = {
        k: v for k, v in options.items() if k in ("stride", "padding", "dilation", "bias", "padding_mode", "dtype")
    }
    middle = module.pointwise.in_channels
    common = {k: options[k] for k in ("bias", "dtype") if k in options}
    first = PLAIN[rank](8, middle, 3, groups=8, **{"padding": 1, **options})
    second = PLAIN[rank](middle, 12, 1, **common)
    first.load_state_dict(module.depthwise.state_dict())
    second.load_state_dict(module.pointwise.state_dict())
    return module, first, second


def randomised(norm):
    """A BatchNorm that is not the identity."""
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return norm.eval()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "replicate", "stride": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": "same", "padding_mode": "replicate", "dilation": 2},
        {"dtype": torch.float64},
    ],
    ids=str,
)
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_is_a_drop_in(rank, options, multiplier):
    """Same attributes, same state dict both ways (strictly), same values and gradients, same text."""
    ours = DEPTHWISE[rank](8, 8 * multiplier, 3, **options)
    theirs = PLAIN[rank](8, 8 * multiplier, 3, groups=8, **options)
    assert isinstance(ours, PLAIN[rank])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]
    x = image(rank, dtype=options.get("dtype", torch.float32))
    y, reference = ours(x), theirs(x)
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(reference)
    ours_g = torch.autograd.grad(y, tuple(ours.parameters()), g)
    torch.testing.assert_close(
        ours_g, torch.autograd.grad(reference, tuple(theirs.parameters()), g), rtol=1e-3, atol=1e-4
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(x[0]), theirs(x[0]), rtol=1e-4, atol=1e-5)


def test_initialisation_is_that_of_pytorch():
    torch.manual_seed(1)
    ours = nn.DepthwiseConv2d(8, 16, 5)
    torch.manual_seed(1)
    theirs = tnn.Conv2d(8, 16, 5, groups=8)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups", [1, 2, 4, 0])
def test_groups_must_be_the_input_channels(groups):
    with pytest.raises(ValueError, match=f"groups: got {groups}, expected .*8"):
        nn.DepthwiseConv2d(8, 8, 3, groups=groups)
    assert nn.DepthwiseConv2d(8, 8, 3, groups=8).groups == nn.DepthwiseConv2d(8, 8, 3).groups == 8


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "bias": False},
        {"padding": 2, "dilation": 2},
        {"padding": "same", "padding_mode": "circular"},
        {"padding": 2, "padding_mode": "reflect"},
        {"padding": 2, "padding_mode": "replicate"},
        {"dtype": torch.float64},
    ],
    ids=str,
)
@pytest.mark.parametrize("activations", [("none", "none"), ("relu6", "hardswish"), ("leaky_relu:0.2", "elu:0.5")])
def test_separable_is_two_convolutions(rank, multiplier, options, activations):
    mid, out = map(parse_activation, activations)
    module, first, second = pair(
        rank, depth_multiplier=multiplier, mid_activation=spelled(mid), activation=spelled(out), **options
    )
    x = image(rank, dtype=options.get("dtype", torch.float32))
    middle = oracle.activate(first(x), mid)
    residual = torch.randn_like(second(middle))
    torch.testing.assert_close(module(x), oracle.activate(second(middle), out), rtol=1e-4, atol=1e-4)
    expected = oracle.activate(second(middle) + residual, out)
    y = module(x, residual)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    g = torch.randn_like(y)
    theirs = torch.autograd.grad(expected, (*first.parameters(), *second.parameters()), g)
    torch.testing.assert_close(torch.autograd.grad(y, tuple(module.parameters()), g), theirs, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(module(x, residual), expected, rtol=1e-4, atol=1e-4)


def test_the_state_dict_of_separable_is_that_of_two_convolutions():
    module, first, second = pair()
    plain = tnn.ModuleDict({"depthwise": first, "pointwise": second})
    assert list(module.state_dict()) == list(plain.state_dict())
    module.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(module.state_dict(), strict=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_modules_follow_to(dtype, layout):
    """``to`` and ``half`` after a packed forward: nothing of the old dtype stays."""
    module = pair(mid_activation="relu6")[0].eval()
    x = image()
    with torch.no_grad():
        expected = module(x)
        module.to(dtype=dtype, memory_format=layout)
        y = module(x.to(dtype).to(memory_format=layout))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(module.float()(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("duplicate", ["deepcopy", "copy", "pickle", "save"])
@pytest.mark.parametrize(
    "make", [lambda: nn.DepthwiseConv2d(8, 8, 3, padding=1), lambda: pair(activation=("elu", 0.5))[0]]
)
def test_copies(make, duplicate):
    """A copy computes the same; one that owns its weights does not follow the original."""
    module, x = make().eval(), image()
    with torch.no_grad():
        before = module(x)
        if duplicate == "save":
            buffer = io.BytesIO()
            torch.save(module, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        else:
            twin = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[
                duplicate
            ](module)
        assert torch.equal(twin(x), before)
        for p in twin.parameters():
            p.mul_(2)
        torch.testing.assert_close(module(x), before if duplicate != "copy" else twin(x))
        assert not torch.equal(twin(x), before)


def test_pickles_and_state_dicts_hold_no_packed_weights():
    module = pair()[0].eval()
    with torch.no_grad():
        module(image())
    fresh = pair()[0].eval()
    assert len(pickle.dumps(module)) <= len(pickle.dumps(fresh)) + 64
    assert list(module.state_dict()) == list(fresh.state_dict())
    assert list(module.buffers()) == []


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False, "stride": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=str
)
def test_from_conv_shares_the_parameters(rank, options):
    conv = PLAIN[rank](8, 16, 3, groups=8, **options).eval()
    module = DEPTHWISE[rank].from_conv(conv)
    assert module.weight is conv.weight and module.bias is conv.bias
    assert module.training is False
    x = image(rank)
    torch.testing.assert_close(module(x), conv(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        module(x)
        conv.weight.mul_(-2)
        torch.testing.assert_close(module(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("conv", "error"),
    [
        (tnn.Conv2d(8, 8, 3), ValueError),
        (tnn.Conv2d(8, 8, 3, groups=4), ValueError),
        (tnn.Conv1d(8, 8, 3, groups=8), TypeError),
        (tnn.Linear(8, 8), TypeError),
        (torch.nn.utils.parametrizations.weight_norm(tnn.Conv2d(8, 8, 3, groups=8)), ValueError),
    ],
    ids=["dense", "grouped", "1d", "linear", "parametrized"],
)
def test_from_conv_refuses_the_rest(conv, error):
    with pytest.raises(error, match="DepthwiseConv2d: .*got .*expected"):
        nn.DepthwiseConv2d.from_conv(conv)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "folded", [(), ("depthwise_bn",), ("pointwise_bn",), ("depthwise_bn", "pointwise_bn")], ids=str
)
def test_from_convs_folds_batch_norm(rank, bias, folded):
    first = PLAIN[rank](8, 8, 3, padding=1, groups=8, bias=bias).eval()
    second = PLAIN[rank](8, 12, 1, bias=bias).eval()
    norms = {"depthwise_bn": randomised(NORM[rank](8)), "pointwise_bn": randomised(NORM[rank](12))}
    norms = {name: norms[name] for name in folded}
    module = SEPARABLE[rank].from_convs(first, second, mid_activation="relu6", activation="silu", **norms)
    x = image(rank)
    nothing = tnn.Identity()
    middle = torch.nn.functional.relu6(norms.get("depthwise_bn", nothing)(first(x)))
    expected = torch.nn.functional.silu(norms.get("pointwise_bn", nothing)(second(middle)))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert (module.depthwise.weight is first.weight) == ("depthwise_bn" not in folded)
    assert (module.pointwise.weight is second.weight) == ("pointwise_bn" not in folded)


@pytest.mark.parametrize(
    ("replaced", "argument"),
    [
        ({"depthwise": tnn.Conv2d(8, 8, 3)}, "groups"),
        ({"pointwise": tnn.Conv2d(8, 12, 3)}, "pointwise"),
        ({"pointwise": tnn.Conv2d(8, 12, 1, stride=2)}, "pointwise"),
        ({"pointwise": tnn.Conv2d(8, 12, 1, padding=1)}, "pointwise"),
        ({"pointwise": tnn.Conv2d(8, 12, 1, groups=4)}, "pointwise"),
        ({"pointwise": tnn.Conv2d(6, 12, 1)}, "pointwise"),
        ({"pointwise": tnn.Linear(8, 12)}, "pointwise"),
        ({"depthwise_bn": tnn.BatchNorm2d(8)}, "depthwise_bn"),
        ({"pointwise_bn": tnn.BatchNorm2d(8).eval()}, "pointwise_bn"),
        ({"pointwise_bn": tnn.BatchNorm2d(12, track_running_stats=False).eval()}, "pointwise_bn"),
    ],
    ids=["dense", "3x3", "strided", "padded", "grouped", "channels", "linear", "training", "features", "no-statistics"],
)
def test_from_convs_refuses_what_does_not_fit(replaced, argument):
    arguments = {"depthwise": tnn.Conv2d(8, 8, 3, groups=8), "pointwise": tnn.Conv2d(8, 12, 1), **replaced}
    with pytest.raises((TypeError, ValueError), match=f"{argument}: got .*expected"):
        nn.DepthwiseSeparableConv2d.from_convs(**arguments)


@pytest.mark.parametrize(
    "options", [{"mid_activation": "swish"}, {"activation": ("relu", 1.0)}, {"activation": ("elu", "x")}]
)
def test_wrong_activations_are_refused_at_construction(options):
    with pytest.raises(
        (TypeError, ValueError), match=f"DepthwiseSeparableConv2d: {next(iter(options))}: got .*expected"
    ):
        nn.DepthwiseSeparableConv2d(8, 12, 3, **options)


@pytest.mark.parametrize("child", ["depthwise", "pointwise"])
@pytest.mark.parametrize("register", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_hooks_of_a_child_run(child, register):
    """A hook on a child sees its call: the pair then runs unfused through the children, and gives the same values."""
    module = pair(mid_activation="silu", activation="relu")[0]
    x = image().requires_grad_()
    expected = module(x)
    seen = []
    handle = getattr(getattr(module, child), f"register_{register}_hook")(lambda *arguments: seen.append(child))
    y = module(x)
    y.backward(torch.randn_like(y))
    assert seen == [child]
    torch.testing.assert_close(y, expected)
    handle.remove()
    module(image())
    assert seen == [child]


def test_a_hook_may_change_the_intermediate_value():
    module, first, second = pair(mid_activation="relu")
    module.depthwise.register_forward_hook(lambda _, __, y: y * 2)
    x = image()
    expected = second(torch.relu(first(x) * 2))
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


def test_a_parametrization_of_a_child_is_applied():
    class Double(tnn.Module):
        def forward(self, weight):
            return 2 * weight

    for child in ("depthwise", "pointwise"):
        module, first, second = pair()
        torch.nn.utils.parametrize.register_parametrization(getattr(module, child), "weight", Double())
        with torch.no_grad():
            {"depthwise": first, "pointwise": second}[child].weight.mul_(2)
            x = image()
            torch.testing.assert_close(module(x), second(first(x)), rtol=1e-4, atol=1e-5)
        module(x).sum().backward()
        assert getattr(module, child).parametrizations.weight.original.grad.abs().sum() > 0


class TestPackedWeights:
    """Packed weights are never stale: each change of the weights shows in the next output."""

    makers = pytest.mark.parametrize(
        "make",
        [lambda: nn.DepthwiseConv2d(8, 8, 3, padding=1), lambda: pair(mid_activation="relu6")[0]],
        ids=["dw", "sep"],
    )

    @staticmethod
    def output(module, x):
        with torch.no_grad():
            return module(x)

    @staticmethod
    def of_fresh(make, module, x):
        fresh = make()
        fresh.load_state_dict(module.state_dict())
        with torch.no_grad():
            return fresh.eval()(x)

    @makers
    @pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adam"])
    @pytest.mark.parametrize("switch", [True, False])
    @pytest.mark.parametrize("packed_before_step", [True, False])
    def test_after_an_optimizer_step(self, make, optimizer, switch, packed_before_step):
        """A fused optimizer leaves no trace on ``_version``."""
        module, x = make().eval(), image()
        steps = getattr(torch.optim, optimizer)(module.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            before = self.output(module, x)
            if switch:
                module.train()
            y = module(x)
            y.backward(torch.randn_like(y))
            if packed_before_step:
                self.output(module, x)
            steps.step()
            if switch:
                module.eval()
            after = self.output(module, x)
            assert torch.equal(after, self.of_fresh(make, module, x))
            assert not torch.equal(after, before)

    @makers
    @pytest.mark.parametrize(
        "change",
        [
            lambda m: [p.mul_(2) for p in m.parameters()],
            lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
            lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
            lambda m: m._apply(lambda t: t * 2),
            lambda m: torch.nn.utils.vector_to_parameters(
                2 * torch.nn.utils.parameters_to_vector(m.parameters()), m.parameters()
            ),
            lambda m: [setattr(p, "data", p.data * 2) for p in m.parameters()],
            lambda m: [([p.data.mul_(2) for p in m.parameters()], m.eval())],
            lambda m: [([p.data.mul_(2) for p in m.parameters()], m.repack())],
        ],
        ids=["inplace", "load", "assign", "apply", "vector", "set-data", "data+eval", "data+repack"],
    )
    def test_after_a_change(self, make, change):
        module, x = make().eval(), image()
        before = self.output(module, x)
        with torch.no_grad():
            change(module)
        after = self.output(module, x)
        assert torch.equal(after, self.of_fresh(make, module, x))
        assert not torch.equal(after, before)

    @makers
    def test_of_a_replaced_parameter(self, make):
        module, x = make().eval(), image()
        before = self.output(module, x)
        child = getattr(module, "depthwise", module)
        child.weight = tnn.Parameter(child.weight.detach() * 2)
        after = self.output(module, x)
        assert torch.equal(after, self.of_fresh(make, module, x)) and not torch.equal(after, before)

    @makers
    def test_under_functional_call(self, make):
        module, x = make().eval(), image()
        self.output(module, x)
        doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
        with torch.no_grad():
            called = torch.func.functional_call(module, doubled, (x,))
        module.load_state_dict(doubled)
        assert torch.equal(called, self.output(module, x))

    @makers
    def test_agree_with_grad_mode_and_inference_mode(self, make):
        module, x = make().eval(), image()
        with torch.inference_mode():
            inferred = module(x)
        assert torch.equal(self.output(module, x), inferred)
        torch.testing.assert_close(module(x), inferred, rtol=1e-5, atol=1e-6)


def test_training_reduces_the_loss():
    """A few steps of SGD fit a small teacher: gradients, optimizer and modules belong together."""
    module = nn.DepthwiseSeparableConv2d(4, 6, 3, padding=1, mid_activation="silu")
    teacher = nn.DepthwiseSeparableConv2d(4, 6, 3, padding=1, mid_activation="silu")
    x = image(channels=4)
    target = teacher(x).detach()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_public_names():
    assert set(dsconv_ext.__all__) >= {"explain", "functional", "nn", "__version__"}
    for rank in (1, 2, 3):
        assert issubclass(DEPTHWISE[rank], PLAIN[rank])
