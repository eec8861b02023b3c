"""The blocks of MobileNet: values, gradients and statistics of plain torch modules, copies, what runs, and errors."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as TF
from torch import nn as tnn

import choices
import dsconv_ext
import oracle
from dsconv_ext import functional as F
from dsconv_ext import nn
from test_nn import randomised

BLOCKS = {
    "plain": lambda **f: nn.DepthwiseSeparableBlock2d(8, 12, 3, padding=1, **f),
    "strided": lambda **f: nn.DepthwiseSeparableBlock2d(8, 12, 3, 2, 1, activation="none", **f),
    "dilated": lambda **f: nn.DepthwiseSeparableBlock2d(8, 8, 5, 1, 4, 2, 2, "silu", ("leaky_relu", 0.2), **f),
    "one-sided": lambda **f: nn.DepthwiseSeparableBlock2d(8, 12, (1, 3), (1, 2), (0, 1), mid_activation="elu", **f),
    "inverted": lambda **f: nn.InvertedResidual(8, 8, **f),
    "inverted-strided": lambda **f: nn.InvertedResidual(8, 12, 5, 2, activation="hardswish", **f),
    "inverted-dilated": lambda **f: nn.InvertedResidual(8, 8, 3, 1, 2, expand_ratio=3, activation="gelu", **f),
    "inverted-narrow": lambda **f: nn.InvertedResidual(8, 8, expand_ratio=1, **f),
}
blocks = pytest.mark.parametrize("name", BLOCKS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def image(dtype=torch.float64):
    return torch.randn(3, 8, 9, 10, dtype=dtype)


def made(name, dtype=torch.float64):
    """A block whose BatchNorms are not the identity, in eval mode."""
    block = BLOCKS[name](dtype=dtype)
    for child in block.modules():
        if isinstance(child, tnn.BatchNorm2d):
            randomised(child)
    return block.eval()


def spelled(activation):
    return activation if isinstance(activation, tuple) else (activation, oracle.DEFAULT_PARAM.get(activation, 0.0))


def plain(block):
    """The same layers in a module of torch's own, sharing nothing: (module, function of x and a residual)."""

    def conv(c):
        options = (c.kernel_size, c.stride, c.padding, c.dilation, c.groups)
        return tnn.Conv2d(c.in_channels, c.out_channels, *options, bias=False, dtype=c.weight.dtype)

    def norm(b):
        return tnn.BatchNorm2d(b.num_features, dtype=b.weight.dtype)

    inner = block.block if isinstance(block, nn.InvertedResidual) else block
    layers = tnn.ModuleDict({n: (norm if n.endswith("_bn") else conv)(c) for n, c in inner.named_children()})
    module = layers
    if inner is not block:
        module = tnn.ModuleDict({"block": layers})
        if block.expand is not None:
            module = tnn.ModuleDict({"expand": tnn.Sequential(conv(block.expand[0]), norm(block.expand[1])), **module})
    module.load_state_dict(block.state_dict(), strict=True)
    module.train(block.training)

    def forward(x, residual=None):
        if inner is not block:
            residual = x if block.has_residual else None
            if block.expand is not None:
                x = oracle.activate(module["expand"](x), spelled(block.activation))
        middle = oracle.activate(layers["depthwise_bn"](layers["depthwise"](x)), spelled(inner.mid_activation))
        y = layers["pointwise_bn"](layers["pointwise"](middle))
        return oracle.activate(y if residual is None else y + residual, spelled(inner.activation))

    return module, forward


@pytest.mark.parametrize("name", ["inverted", "inverted-strided", "inverted-dilated"])
def test_expansions_without_gradients(name, library):
    """channels_last, one operator computes the expansion; writes, other modes and settings show."""
    block = made(name).eval()
    module, truth = plain(block)
    x = image().contiguous(memory_format=torch.channels_last)

    def check(expected_calls):
        with torch.no_grad(), choices.recorded() as calls:
            y = block(x)
        torch.testing.assert_close(y, truth(x), rtol=1e-9, atol=1e-10)
        assert [c["op"] for c in calls].count("pointwise") == expected_calls

    check(1)
    check(1)
    with torch.no_grad():
        for m in (block, module):
            m.expand[0].weight.mul_(1.5)
            m.expand[1].running_mean.add_(0.3)
    check(1)
    handle = block.expand[1].register_forward_hook(lambda *_: None)
    check(0)
    handle.remove()
    check(1)
    with torch.no_grad(), choices.recorded() as calls:
        block(image())
    assert "pointwise" not in [c["op"] for c in calls]  # contiguous: PyTorch is faster


def gradients(function, module, *inputs):
    """Output and gradients of the inputs and of every parameter, for a random upstream gradient."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    names = ["x", "residual"][: len(leaves)] + [name for name, _ in module.named_parameters()]
    found = torch.autograd.grad(y, (*leaves, *module.parameters()), g)
    return {"y": y.detach(), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("name", "residual"), [*((n, False) for n in BLOCKS), *((n, True) for n in BLOCKS if "inverted" not in n)]
)
def test_values_gradients_and_statistics(name, training, residual):
    block = made(name).train(training)
    inputs = [image()]
    if residual:
        inputs.append(torch.randn_like(block(inputs[0])))
    module, truth = plain(block)
    torch.testing.assert_close(
        gradients(block, block, *inputs), gradients(truth, module, *inputs), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(dict(block.named_buffers()), dict(module.named_buffers()))


@blocks
def test_values_without_grad_mode(name):
    """Where the children of the block could use packed weights; in float32 too, and channels_last."""
    block = made(name)
    truth = plain(block)[1]
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(block(x), truth(x), rtol=1e-9, atol=1e-10)
        expected = truth(x)
        single = block.float()
        y = single(x.float().to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@blocks
def test_state_dicts(name):
    """Keys are those of plain modules; loading changes what is computed, also after a forward in eval mode."""
    block, other = made(name), made(name)
    module, _ = plain(block)
    assert list(block.state_dict()) == list(module.state_dict())
    x = image()
    with torch.no_grad():
        before = block(x)
        block.load_state_dict(other.state_dict(), strict=True)
        after = block(x)
    assert torch.equal(after, other(x)) and not torch.equal(after, before)


@blocks
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "save"])
def test_copies(name, duplicate):
    """A copy computes the same and does not follow the original."""
    block, x = made(name), image()
    with torch.no_grad():
        before = block(x)
        if duplicate == "save":
            buffer = io.BytesIO()
            torch.save(block, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        else:
            twin = copy.deepcopy(block) if duplicate == "deepcopy" else pickle.loads(pickle.dumps(block))
        assert torch.equal(twin(x), before)
        for p in block.parameters():
            p.mul_(1.5)
        assert torch.equal(twin(x), before) and not torch.equal(block(x), before)


@blocks
@pytest.mark.parametrize("what", ["weights", "statistics", "data"])
def test_eval_mode_follows_every_change(name, what):
    """Nothing folded or packed outlives the weights and statistics it was made from."""
    block, x = made(name), image()
    with torch.no_grad():
        before = block(x)
        for key, t in block.named_parameters() if what != "statistics" else block.named_buffers():
            if t.is_floating_point():
                (t.data if what == "data" else t).mul_(1.25 if "running_var" not in key else 2)
        if what == "data":  # leaves no trace
            block.eval()
        after = block(x)
        torch.testing.assert_close(after, plain(block)[1](x), rtol=1e-9, atol=1e-10)
    assert not torch.equal(after, before)


@blocks
def test_an_epsilon_shows(name):
    """It is no tensor, so only a comparison finds it."""
    block, x = made(name).eval(), image().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for norm in [m for m in block.modules() if isinstance(m, tnn.BatchNorm2d)]:
            before = block(x)
            norm.eps = 0.5
            after = block(x)
            assert not torch.equal(after, before)
            assert torch.equal(after, copy.deepcopy(block)(x))  # a copy keeps nothing packed


@blocks
def test_a_fused_optimizer_step_shows_in_eval_mode(name):
    block, x = made(name).train(), image()
    with torch.no_grad():
        before = block.eval()(x)
    block.train()
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1, fused=True)
    y = block(x)
    y.backward(torch.randn_like(y))
    optimizer.step()
    with torch.no_grad():
        after = block.eval()(x)
        torch.testing.assert_close(after, plain(block)[1](x), rtol=1e-9, atol=1e-10)
    assert not torch.equal(after, before)


def operators_of(block, x):
    return [call.op for call in dsconv_ext.explain(block, x).calls]


@blocks
def test_one_operator_computes_the_block_in_eval_mode(name, library):
    block, x = made(name), image()
    assert operators_of(block, x) == ["separable"]
    assert operators_of(block.train(), x) == ["depthwise"]


def replace_norm(block):
    block.pointwise_bn = tnn.Identity()


CHANGES = {
    "hook": lambda b: b.depthwise_bn.register_forward_hook(lambda m, i, y: y.clamp(max=0.5)),
    "replaced": replace_norm,
    "no-statistics": lambda b: setattr(b, "pointwise_bn", tnn.BatchNorm2d(12, track_running_stats=False).double()),
    "not-affine": lambda b: setattr(b, "depthwise_bn", tnn.BatchNorm2d(8, affine=False).double().eval()),
    "bias": lambda b: setattr(b.pointwise, "bias", tnn.Parameter(torch.randn(12).double())),
    "one-in-training": lambda b: b.depthwise_bn.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_folded_runs_through_the_children(change):
    """Each gives what the children give one after the other."""
    block, x = made("plain"), image()
    CHANGES[change](block)
    with torch.no_grad():
        middle = TF.relu6(block.depthwise_bn(block.depthwise(x)))
        expected = TF.relu6(block.pointwise_bn(block.pointwise(middle)))
        before = made("plain")(x)
        torch.testing.assert_close(block(x), expected)
    assert not torch.allclose(expected, before)


def test_a_global_hook_sees_the_children():
    block, x, seen = made("plain"), image(), []
    handle = tnn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(type(m).__name__))
    try:
        block(x)
    finally:
        handle.remove()
    assert seen == ["DepthwiseConv2d", "BatchNorm2d", "Conv2d", "BatchNorm2d", "DepthwiseSeparableBlock2d"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.DepthwiseSeparableBlock2d(8, 12, 3, mid_activation="swish"),
            "Block2d: mid_activation: got 'swish'",
        ),
        (lambda: nn.DepthwiseSeparableBlock2d(8, 12, 3, activation=("elu", None)), "Block2d: activation: got .*None"),
        (lambda: nn.InvertedResidual(8, 8, activation="swish"), "InvertedResidual: activation: got 'swish'"),
        (
            lambda: made("plain")(torch.randn(1, 7, 5, 5).double()),
            "depthwise_weight: got shape .8, 1, 3, 3., expected .*C = 7",
        ),
        (lambda: made("plain")(image().float()), "depthwise_weight: got dtype torch.float64"),
        (lambda: made("plain")(image(), image()), r"residual: got shape \[3, 8, 9, 10\], expected \[3, 12"),
        (lambda: made("inverted-narrow")(torch.randn(1, 7, 5, 5).double()), "depthwise_weight: got"),
        (lambda: nn.InvertedResidual(8, 8, kernel_size=2).eval()(image(torch.float32)), "residual: got shape"),
    ],
    ids=["mid", "last", "inverted", "channels", "dtype", "residual", "narrow", "even-kernel"],
)
def test_errors(make, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        make()
    assert ", expected " in str(caught.value)


@blocks
@pytest.mark.parametrize("training", [False, True])
def test_compile_without_graph_breaks(name, training):
    torch._dynamo.reset()
    block = made(name).train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    x = image()
    ours, theirs = gradients(compiled, compiled, x), gradients(block, block, x)
    torch.testing.assert_close(list(ours.values()), list(theirs.values()))


@blocks
def test_export(name):
    """The exported program holds one operator of ours, and computes what the block computes."""
    block = made(name)
    x = image()
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    targets = [str(node.target) for node in program.graph.nodes if "dsconv" in str(node.target)]
    assert targets == ["dsconv.separable.default"]
    for batch in (x, x[:1]):
        torch.testing.assert_close(program.module()(batch), block(batch))


GEOMETRIES = (
    {"padding": 1},
    {"padding": ((2, 0), (1, 3)), "dilation": 2},
    {"stride": (2, 1), "padding": (0, 1)},
    {"padding": "same", "dilation": (1, 2)},
)
ACTIVATIONS = (
    {},
    {"expand_activation": "silu", "mid_activation": ("leaky_relu", 0.3), "activation": "relu"},
    {"expand_activation": ("elu", 0.5), "mid_activation": "none", "activation": "gelu"},
)


def inverted_tensors(expand=True, multiplier=1, dtype=torch.float64):
    c, e, k = 5, 12 if expand else 5, 7
    shapes = {
        "x": (2, c, 9, 8),
        "expand_weight": (e, c, 1, 1),
        "depthwise_weight": (e * multiplier, 1, 3, 3),
        "project_weight": (k, e * multiplier, 1, 1),
        "expand_bias": (e,),
        "depthwise_bias": (e * multiplier,),
        "project_bias": (k,),
    }
    return {n: torch.randn(s, dtype=dtype) for n, s in shapes.items() if expand or not n.startswith("expand")}


def inverted_truth(tensors, geometry, activations):
    """The three convolutions of PyTorch, one after the other."""
    names = {"expand_activation": "relu6", "mid_activation": "relu6", "activation": "none", **activations}
    first, mid, last = (spelled(names[n]) for n in ("expand_activation", "mid_activation", "activation"))
    x, get = tensors["x"], tensors.get
    if "expand_weight" in tensors:
        x = oracle.activate(TF.conv2d(x, tensors["expand_weight"], get("expand_bias")), first)
    padding = geometry.get("padding", 0)
    if isinstance(padding, tuple) and isinstance(padding[0], tuple):
        x, padding = oracle.pad(x, padding), 0
    where = {**geometry, "padding": padding, "groups": x.size(1)}
    middle = oracle.activate(TF.conv2d(x, tensors["depthwise_weight"], get("depthwise_bias"), **where), mid)
    y = TF.conv2d(middle, tensors["project_weight"], get("project_bias"))
    return oracle.activate(y if "residual" not in tensors else y + tensors["residual"], last)


@pytest.mark.parametrize("activations", ACTIVATIONS, ids=lambda a: "-".join(map(str, a.values())) or "defaults")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("expand", "multiplier", "biases", "residual"), [(1, 1, 1, 1), (1, 2, 0, 0), (0, 1, 1, 1)])
def test_inverted_residual(geometry, activations, expand, multiplier, biases, residual):
    tensors = inverted_tensors(expand, multiplier)
    if not biases:
        tensors = {n: t for n, t in tensors.items() if not n.endswith("bias")}
    if residual:
        tensors["residual"] = torch.randn_like(inverted_truth(tensors, geometry, activations))
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    ours = F.inverted_residual(**{"expand_weight": None, **leaves}, **geometry, **activations)
    theirs = inverted_truth(leaves, geometry, activations)
    g = torch.randn_like(theirs)
    results = [(y, *torch.autograd.grad(y, tuple(leaves.values()), g)) for y in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


def test_inverted_residual_unbatched_and_under_autocast():
    tensors = inverted_tensors(dtype=torch.float32)
    expected = F.inverted_residual(**tensors, padding=1)
    one = F.inverted_residual(**{**tensors, "x": tensors["x"][0]}, padding=1)
    torch.testing.assert_close(one, expected[0], rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.inverted_residual(**tensors, padding=1)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    ("argument", "value", "got"),
    [
        ("x", [1.0], "list"),
        ("x", torch.randn(2, 5), "2 dimensions"),
        ("expand_weight", torch.randn(12, 5, 3, 3), "3, 3"),
        ("expand_weight", torch.randn(12, 4, 1, 1), "12, 4"),
        ("expand_weight", torch.randn(12, 5, 1, 1).half(), "float16"),
        ("expand_weight", None, "Tensor"),  # named is expand_bias
        ("expand_bias", torch.randn(11), "11"),
        ("depthwise_weight", torch.randn(13, 1, 3, 3), "13"),
        ("depthwise_bias", torch.randn(5), "5"),
        ("project_weight", torch.randn(7, 5, 1, 1), "7, 5"),
        ("project_bias", torch.randn(6), "6"),
        ("residual", torch.randn(2, 7, 9, 8), "9, 8"),
        ("stride", 0, "0"),
        ("padding", -1, "-1"),
        ("expand_activation", "swish", "swish"),
        ("mid_activation", "swish", "swish"),
        ("activation", ("relu", 1.0), "relu"),
    ],
)
def test_inverted_residual_names_what_is_wrong(argument, value, got):
    tensors = inverted_tensors(dtype=torch.float32)
    named = "expand_bias" if value is None else argument
    with pytest.raises((TypeError, ValueError), match=rf"^inverted_residual: {named}: got .*{got}.*expected "):
        F.inverted_residual(**{**tensors, argument: value})
