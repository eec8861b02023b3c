"""Fake kernels, torch.compile, torch.export and the meta device."""

import pytest
import torch

import cases
import operators
from cases import Case
from dsconv_ext import functional as F
from dsconv_ext import nn
from judges import subject

FULL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
LAYOUTS = ("nchw", "nhwc", "sliced", "nhwc_sliced", "transposed", "permuted")


def arranged(tensors, layout):
    """The first tensor in ``layout``, the others as they are."""
    x = cases.arrange(tensors[0].detach(), layout).requires_grad_(tensors[0].requires_grad)
    return [x, *tensors[1:]]


def forward_arguments(op, layout, activation, requires_grad=True):
    where, param = operators.geometry(), 0.0
    if op == "dw":
        tensors = arranged(operators.depthwise_tensors(torch.float32, requires_grad), layout)
        return operators.ops.depthwise.default, (*tensors, *where, activation, param)
    tensors = arranged(operators.separable_tensors(torch.float32, requires_grad), layout)
    return operators.ops.separable.default, (*tensors, *where, "silu", 0.0, activation, param, "auto")


def backward_arguments(op, layout, activation):
    forward, arguments = forward_arguments(op, layout, activation, requires_grad=False)
    y = forward(*arguments)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    output = y if activation == "relu" else None
    count = 3 if op == "dw" else 6
    settings = arguments[count:] if op == "dw" else arguments[count:-1]  # without fuse
    return (g, *arguments[:count], output, *settings, *(True,) * count)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["dw", "sep"])
def test_opcheck_forward(op, layout, activation):
    torch.library.opcheck(*forward_arguments(op, layout, activation), test_utils=FULL)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["dw", "sep"])
def test_opcheck_backward(op, layout, activation):
    function = operators.ops.depthwise_backward.default if op == "dw" else operators.ops.separable_backward.default
    torch.library.opcheck(
        function, backward_arguments(op, layout, activation), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    "line",
    [
        "dw n2c8w9k3s2d1p1 {} bf16",
        "dw n2c8h1w6k3s1d1p1 {} fp32",
        "dw n2c1h5w6k3s1d1p1m3 {} fp32",
        "dw n2c8t4h5w6k3s1d1p0:1 {} fp16",
        "sep n2c8h5w6k3s1d1p1o1 {} fp64 res",
        "sep n1c8w1k1s1d1p0o5 {} fp32",
        "dw n0c8h5w6k3s1d1p1 {} fp32",
    ],
)
def test_fake_strides_are_the_real_ones(line, layout):
    """Shape, dtype and strides of output and gradients are known without computing them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = Case.parse(line.format(layout))
    tensors = {n: t.requires_grad_() for n, t in case.inputs(integer=True).items()}

    def everything(tensors):
        y = subject(case, tensors)
        return [y, *torch.autograd.grad(y, tuple(tensors.values()), torch.empty_like(y))]

    real = everything(tensors)
    with FakeTensorMode() as mode:
        fake = everything({n: mode.from_tensor(t) for n, t in tensors.items()})
    for r, f in zip(real, fake, strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


class Model(torch.nn.Module):
    """Both modules, with every optional part."""

    def __init__(self):
        super().__init__()
        self.first = nn.DepthwiseConv2d(8, 8, 3, padding=1)
        self.second = nn.DepthwiseSeparableConv2d(
            8, 12, 3, stride=2, padding=1, mid_activation="relu6", activation="silu"
        )

    def forward(self, x):
        return self.second(self.first(x) + x)


def compiled_equals_eager(backend, **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=backend, **options)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 8, 9, 9).to(memory_format=memory_format)
        results = []
        for f in (model, compiled):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            y = f(leaf)
            parameters = (leaf, *model.parameters())
            results.append([y, *torch.autograd.grad(y, parameters, torch.cos(torch.arange(y.numel())).view(y.shape))])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        assert results[1][0].stride() == results[0][0].stride()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


def test_compile_without_graph_breaks():
    compiled_equals_eager("aot_eager")


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (7, 9, 12):
        x = torch.randn(2, 8, size, size + 1)
        torch.testing.assert_close(compiled(x), model(x))


def test_compile_with_inductor():
    compiled_equals_eager("inductor")


def test_the_compiled_graph_holds_the_operators():
    """While compiling, the plain operator is taken: two operators of ours and no convolution of PyTorch's."""
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    torch.compile(Model(), fullgraph=True, backend=backend)(torch.randn(1, 8, 5, 5))
    assert [t for t in targets if "dsconv" in t] == ["dsconv.depthwise.default", "dsconv.separable.default"]
    assert not [t for t in targets if "conv" in t and "dsconv" not in t]


def test_export():
    model = Model().eval()
    x = torch.randn(2, 8, 9, 9)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "dsconv.depthwise.default" in targets and "dsconv.separable.default" in targets
    for n in (1, 5):
        x = torch.randn(n, 8, 9, 9)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_device(layout):
    """A model on the meta device computes shapes and strides, and its state can be materialised."""
    x = cases.arrange(torch.randn(2, 8, 9, 9), layout)
    with torch.device("meta"):
        model = Model()
    y = model(torch.empty_strided(x.shape, x.stride(), device="meta"))
    assert y.device.type == "meta"
    real = Model()
    assert (y.shape, y.stride()) == (real(x).shape, real(x).stride())
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    torch.testing.assert_close(model(x), real(x))


def test_make_fx_traces_backward():
    from torch.fx.experimental.proxy_tensor import make_fx

    tensors = operators.depthwise_tensors(torch.float32)

    def step(x, weight, bias):
        y = F.depthwise_conv2d(x, weight, bias, padding=1, activation="silu")
        return torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))

    graph = make_fx(step)(*tensors)
    assert "dsconv.depthwise_backward.default" in [str(node.target) for node in graph.graph.nodes]
    torch.testing.assert_close(graph(*tensors), step(*tensors))
