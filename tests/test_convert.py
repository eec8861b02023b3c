"""convert() on small modules written by hand: what is fused, and what is not and why."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import choices
from convertible import Block, Residual, assert_same, chain_runs, eval_block, image, randomised, reason, status
from dsconv_ext import convert


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


ACTIVATIONS = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh 0 6": lambda: nn.Hardtanh(0, 6),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "leaky_relu": lambda: nn.LeakyReLU(0.3),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": lambda: nn.ELU(0.7),
}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_modules(act):
    model = eval_block(Block, ACTIVATIONS[act])
    converted = convert(model)
    assert status(converted) == {"dw": "fused", "pw": "fused"}
    assert_same(converted, model, image(), fused=1, rtol=gradient_tolerance(act))


def gradient_tolerance(act):
    """PyTorch's derivative of hardsigmoid is 1 / 6 in single precision even for float64."""
    return 1e-7 if "hardsigmoid" in act else 1e-9


@pytest.mark.parametrize("act", [nn.Mish, lambda: nn.Hardtanh(-1, 1), nn.Softplus, lambda: nn.PReLU(8)])
def test_an_activation_without_a_kernel_keeps_the_pair_apart(act):
    model = eval_block(Block, act)
    converted = convert(model)
    assert status(converted) == {"dw": "replaced", "pw": "replaced"}
    assert reason(converted).startswith(type(model.act).__name__ + " act follows")
    assert_same(converted, model, image(), fused=0)


FUNCTIONS = {
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "method relu": lambda x: x.relu(),
    "method relu_": lambda x: x.relu_(),
    "F.relu6": F.relu6,
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": F.hardsigmoid,
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "F.leaky_relu named": lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
    "F.elu": lambda x: F.elu(x, 0.6),
    "torch.sigmoid": torch.sigmoid,
    "method sigmoid": lambda x: x.sigmoid(),
    "torch.tanh": torch.tanh,
}


class Functional(Block):
    function = staticmethod(F.relu)

    def forward(self, x):
        return self.bn2(self.pw(self.function(self.bn1(self.dw(x)))))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activation_functions(name):
    cls = type("Functional", (Functional,), {"function": staticmethod(FUNCTIONS[name]), "__module__": __name__})
    model = eval_block(cls)
    converted = convert(model)
    assert status(converted) == {"dw": "fused", "pw": "fused"}
    assert_same(converted, model, image(), fused=1, rtol=gradient_tolerance(name))


def test_an_activation_function_with_a_computed_argument_is_not_one_of_ours():
    class Slope(Block):
        def forward(self, x):
            return self.pw(F.leaky_relu(self.dw(x), x.mean()))

    model = eval_block(Slope)
    assert status(convert(model)) == {"dw": "replaced", "pw": "replaced"}


RESIDUALS = {
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "torch.add": torch.add,
    "method add": lambda y, x: y.add(x),
    "y += x": operator.iadd,
    "relu(y + x)": lambda y, x: F.relu(y + x),
    "a broadcast residual": lambda y, x: F.relu(y + x.mean((2, 3), keepdim=True)),
}
NOT_RESIDUALS = {
    "y - x": lambda y, x: y - x,
    "y * x": lambda y, x: y * x,
    "y + y": lambda y, x: y + y,
    "y + 1": lambda y, x: y + 1,
    "alpha": lambda y, x: torch.add(y, x, alpha=2),
    "x += y": lambda y, x: operator.iadd(x * 1, y),
    "relu(y) + x": lambda y, x: F.relu(y) + x,
}


@pytest.mark.parametrize("name", [*RESIDUALS, *NOT_RESIDUALS])
def test_residuals(name):
    combine = {**RESIDUALS, **NOT_RESIDUALS}[name]
    cls = type("Residual", (Residual,), {"combine": staticmethod(combine), "__module__": __name__})
    model = eval_block(cls)
    converted = convert(model)
    assert ("residual added" in reason(converted, "pw")) == (name in RESIDUALS)
    assert_same(converted, model, image(), fused=1)


def test_a_residual_of_another_dtype_promotes_as_before():
    class Promoted(Block):
        def forward(self, x, other):
            return F.relu(super().forward(x) + other)

    model = randomised(Promoted()).eval()
    converted = convert(model)
    x, other = image(torch.float32), image(torch.float64)
    with torch.no_grad():
        assert converted(x, other).dtype == model(x, other).dtype == torch.float64
        torch.testing.assert_close(converted(x, other), model(x, other), rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = converted(x, x), model(x, x)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.2)


GEOMETRIES = [
    {"stride": 2},
    {"dilation": 2, "padding": 2},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": (0, 2), "bias": True},
]


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_geometries(options):
    model = eval_block(Block, **options)
    assert_same(convert(model), model, image(), fused=1)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_ranks_and_multipliers(rank, multiplier):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1]
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][rank - 1]
    model = nn.Sequential(
        conv(4, 4 * multiplier, 3, groups=4), norm(4 * multiplier), nn.ReLU(), conv(4 * multiplier, 6, 1)
    )
    model = randomised(model).double().eval()
    converted = convert(model)
    assert status(converted)["0"] == ("fused" if rank < 3 else "replaced")
    assert_same(converted, model, torch.randn(2, 4, *[6] * rank, dtype=torch.float64), fused=int(rank < 3))


def test_conv_same_of_timm_pads_by_the_size_of_the_input():
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        layers.Conv2dSame(3, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        layers.Conv2dSame(8, 8, 3, stride=2, groups=8),
        layers.BatchNormAct2d(8, act_layer=nn.SiLU),
        nn.Conv2d(8, 6, 1),
        layers.BatchNormAct2d(6, act_layer=nn.LeakyReLU, act_kwargs={"negative_slope": 0.3}),
    )
    model = randomised(model).double().eval()
    converted = convert(model)
    assert status(converted) == {"0": "left", "2": "fused", "4": "fused"}
    for size in (9, 12, 13, 15):
        assert_same(converted, model, image(channels=3, size=size), fused=1)


@pytest.mark.parametrize("fused", [True, False])
def test_frozen_batch_norms(fused):
    """Frozen by eval() in a training model, or by class; then dropout between keeps the pair apart, as it should."""
    misc = pytest.importorskip("torchvision.ops.misc")
    model = nn.Sequential(*eval_block().children(), nn.Dropout(0.0))
    if not fused:
        model.insert(3, nn.Dropout(0.5))
    frozen = misc.FrozenBatchNorm2d(8)
    frozen.load_state_dict(model[1].state_dict(), strict=False)
    model[1] = frozen.double()
    model.train()
    model[5 - fused].eval()
    converted = convert(model)
    assert status(converted)["0"] == ("fused" if fused else "replaced")
    if fused:
        assert_same(converted, model, image(), fused=1)
    else:
        assert reason(converted, "0") == "3 drops values in training mode"


def test_training_mode_runs_the_modules_and_the_statistics_advance():
    model = eval_block(Residual).train()
    converted = convert(model)
    assert status(converted) == {"dw": "replaced", "pw": "replaced"}
    assert "statistics of the batch" in reason(converted)
    for _ in range(2):
        x = image()
        torch.testing.assert_close(converted(x), model(x), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(converted.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_same(converted, model, image(), fused=0)
    model.eval(), converted.eval()
    assert status(converted) == {"dw": "fused", "pw": "fused"}
    assert_same(converted, model, image(), fused=1)


def test_fold_batchnorm():
    model = eval_block()
    never = convert(model, fold_batchnorm=False)
    assert status(never) == {"dw": "replaced", "pw": "replaced"}
    assert reason(never) == "BatchNorm2d bn1 follows"
    assert_same(never, model, image(), fused=0)
    assert status(convert(model, fold_batchnorm=True))["dw"] == "fused"
    with pytest.raises(ValueError, match="fold_batchnorm: got True .*'bn1'.* expected a model in eval mode"):
        convert(model.train(), fold_batchnorm=True)


def test_a_pair_without_norms_is_fused_in_training_mode():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)).double().train()
    converted = convert(model, fold_batchnorm=False)
    assert status(converted) == {"0": "fused", "2": "fused"}
    assert_same(converted, model, image(), fused=1)


class SqueezeExcite(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.reduce(x.mean((2, 3), keepdim=True)))


def test_squeeze_excite_is_a_barrier():
    """The depthwise convolution, its norm and activation are still one operator."""
    block = eval_block()
    model = nn.Sequential(block.dw, block.bn1, block.act, SqueezeExcite().double(), block.pw, block.bn2)
    converted = convert(model)
    assert status(converted) == {"0": "replaced", "3.reduce": "replaced", "4": "replaced"}
    assert reason(converted, "0") == "SqueezeExcite 3 follows; BatchNorm folded"
    with chain_runs() as runs, torch.no_grad():
        converted(image())
    assert runs == [1, 1, 1]
    assert_same(converted, model, image(), fused=0)


class Alone(nn.Module):
    """A 1x1 convolution that no depthwise one precedes, and what may follow it; something else comes first."""

    def __init__(self, after=lambda y, x: y, norm=nn.BatchNorm2d, act=nn.ReLU6):
        super().__init__()
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pw = nn.Conv2d(8, 8, 1)
        self.bn = norm(8)
        self.act = act()
        self.after = after

    def forward(self, x):
        x = torch.sin(self.dw(x))
        return self.act(self.after(self.bn(self.pw(x)), x))


def pointwise_calls(function, *args):
    """How often the operator computes a pointwise convolution alone."""
    with choices.recorded() as made:
        function(*args)
    return [choice["op"] for choice in made].count("pointwise")


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (lambda: Alone(), 1),
        (lambda: Alone(norm=nn.Identity), 1),
        (lambda: Alone(act=nn.Identity), 1),
        (lambda: Alone(act=lambda: nn.LeakyReLU(0.2)), 1),
        (lambda: Alone(act=lambda: nn.ReLU(inplace=True)), 1),
        (lambda: Alone(act=nn.Mish), 1),
        (lambda: Alone(norm=nn.Identity, act=nn.Identity), 1),
        (lambda: Alone(operator.add), 1),
        (lambda: Alone(lambda y, x: x + y, act=nn.Identity), 1),
        (lambda: Alone(lambda y, x: y.add_(x)), 1),
        (lambda: Alone(lambda y, x: y + x.mean((2, 3), keepdim=True)), 0),
        (lambda: Alone(lambda y, x: y * x), 1),
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Tanhshrink(), nn.Conv2d(8, 16, 1), nn.SiLU()), 1),
    ],
)
def test_a_pointwise_convolution_alone(model, calls, library):
    model = randomised(model()).double().eval()
    converted = convert(model)
    assert status(converted)["pw" if isinstance(model, Alone) else "2"] == "replaced"
    x = image().contiguous(memory_format=torch.channels_last)
    assert_same(converted, model, x)
    assert_same(converted, model, image())
    with torch.no_grad():
        assert pointwise_calls(converted, x) == calls
        assert pointwise_calls(converted, image()) == 0  # contiguous: PyTorch is faster
    assert pointwise_calls(converted, x) == 0  # gradients
    assert_same(converted.train(), model.train(), x, gradients=False)


def test_a_pointwise_convolution_alone_where_nothing_can_be_traced(library):
    class Untraceable(Alone):
        def forward(self, x):
            return self.pw(x) if x.sum() < 1e9 else x

    model = randomised(Untraceable()).double().eval()
    converted = convert(model)
    assert status(converted)["pw"] == "replaced"
    assert reason(converted, "pw") == "no depthwise convolution directly before it; alone, on a CPU without gradients"
    x = image().contiguous(memory_format=torch.channels_last)
    assert_same(converted, model, x)
    with torch.no_grad():
        assert pointwise_calls(converted, x) == 1
        assert pointwise_calls(converted, image()) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert pointwise_calls(converted, x) == 0


def test_a_chain_through_several_modules():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU())
            self.second = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

        def forward(self, x, *, scale=1.0):
            return (x + self.second(self.first(x))) * scale

    model = eval_block(Outer)
    converted = convert(model)
    assert status(converted) == {"first.0": "fused", "second.1": "fused"}
    assert_same(converted, model, image(), fused=1)
    x = image()
    with torch.no_grad(), chain_runs() as runs:
        torch.testing.assert_close(converted(x, scale=2.0), model(x, scale=2.0))
        torch.testing.assert_close(converted.first(x), model.first(x))  # a part alone is what it was
    assert runs == []
    seen = []
    handle = converted.first.register_forward_hook(lambda m, args, y: seen.append(y))
    assert status(converted) == {"first.0": "replaced", "second.1": "replaced"}
    assert_same(converted, model, x, fused=0)
    torch.testing.assert_close(seen[0], model.first(x))
    handle.remove()
    assert_same(converted, model, x, fused=1)


def test_a_value_with_two_uses_is_no_chain():
    class Two(Block):
        def forward(self, x):
            y = self.bn1(self.dw(x))
            return self.pw(self.act(y)) + y

    model = eval_block(Two)
    assert status(convert(model)) == {"dw": "replaced", "pw": "replaced"}
    assert_same(convert(model), model, image(), fused=0)


def test_an_operation_in_place_in_between():
    """What the depthwise convolution reads must not change before the fused operator reads it."""

    class InPlace(Block):
        def forward(self, x):
            x = x * 1
            y = self.act(self.bn1(self.dw(x)))
            x.add_(1)
            return self.bn2(self.pw(y)) + x

    model = eval_block(InPlace)
    converted = convert(model)
    assert reason(converted).startswith("add_ works in place in between")
    assert_same(converted, model, image(), fused=0, gradients=False)

    class Late(Block):
        def forward(self, x):
            x = x * 1
            y = super().forward(x)
            F.relu(x, inplace=True)
            return y + x

    model = eval_block(Late)
    converted = convert(model)
    assert "residual" not in reason(converted, "pw")
    assert_same(converted, model, image(), fused=1, gradients=False)

    class Augmented(Block):
        def forward(self, x):
            x = x * 1
            y = z = x
            z += 1
            return super().forward(y) + x

    model = eval_block(Augmented)
    assert_same(convert(model), model, image(), fused=1)


def test_shared_modules():
    class Shared(nn.Module):
        """One depthwise convolution with two partners, one block called twice."""

        def __init__(self):
            super().__init__()
            self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
            self.pws = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
            self.block = Block()

        def forward(self, x):
            a = self.pws[0](self.norms[0](self.dw(x)))
            b = self.pws[1](F.relu(self.norms[1](self.dw(x))))
            return self.block(self.block(a)) + b

    model = eval_block(Shared)
    converted = convert(model)
    assert set(status(converted).values()) == {"fused"}
    assert_same(converted, model, image(), fused=4)


def test_one_pair_twice_and_a_module_under_two_names():
    block = eval_block()
    model = nn.Sequential(block, nn.ReLU(), block).double()
    model.again = block.pw
    converted = convert(model)
    assert_same(converted, model, image(), fused=None)
    assert converted.state_dict().keys() == model.state_dict().keys()
