"""What a converted model keeps: hooks, settings, state dicts, copies, transforms; and that nothing is ever stale."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import dsconv_ext
from convertible import Block, Residual, assert_same, chain_runs, eval_block, image, reason, status
from dsconv_ext import chains, convert, revert
from dsconv_ext.__main__ import main


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


HOOKS = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward pre": lambda m, f: m.register_forward_pre_hook(f),
    "backward": lambda m, f: m.register_full_backward_hook(f),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["dw", "bn1", "act", "pw", "bn2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_children_see_their_calls(kind, name, when):
    model = eval_block(Residual)
    calls = []
    converted = convert(model)
    if when == "before":
        converted = copy.deepcopy(model)
        HOOKS[kind](converted.get_submodule(name), lambda *_: calls.append(name))
        converted = convert(converted, inplace=True)
    else:
        assert status(converted)["dw"] == "fused"
        with torch.no_grad():
            converted(image())
        HOOKS[kind](converted.get_submodule(name), lambda *_: calls.append(name))
    assert status(converted)["dw"] == "replaced"
    assert f"{name} has hooks" in reason(converted)
    assert_same(converted, model, image(), fused=0)
    assert calls


def test_a_hook_that_changes_the_value():
    model = eval_block()
    converted = convert(model)
    for m in (model, converted):
        m.bn1.register_forward_hook(lambda module, args, y: 2 * y)
    assert_same(converted, model, image(), fused=0)


def test_global_hooks():
    model = eval_block()
    converted = convert(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        converted(image())
    finally:
        handle.remove()
    assert {converted.dw, converted.bn1, converted.act, converted.pw, converted.bn2} <= set(seen)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": nn.utils.weight_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("name", ["dw", "pw"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations_are_respected(kind, name, when):
    model = eval_block()
    converted = convert(model) if when == "after" else copy.deepcopy(model)
    with torch.no_grad():
        converted(image())
    for m in (model, converted):
        torch.manual_seed(1)
        PARAMETRIZATIONS[kind](m.get_submodule(name))
        m.eval()
    if when == "before":
        converted = convert(converted, inplace=True)
    converted.load_state_dict(model.state_dict())
    assert status(converted)["dw"] == "replaced"
    assert_same(converted, model, image(), fused=0)


def test_an_exchanged_child_is_used():
    model = eval_block(Residual)
    converted = convert(model)
    for m in (model, converted):
        m.act = nn.Tanh()
    assert "has other attributes, hooks or children now" in reason(converted)
    assert_same(converted, model, image(), fused=0)
    assert_same(convert(converted), model, image(), fused=1)


def test_changed_settings_of_children_are_used():
    model = eval_block(Block, lambda: nn.LeakyReLU(0.1))
    converted = convert(model)
    assert_same(converted, model, image(), fused=1)
    for m in (model, converted):
        m.act.negative_slope, m.bn1.eps, m.dw.padding, m.dw.stride = 0.5, 0.1, (2, 0), (2, 1)
    assert_same(converted, model, image(), fused=1)

    model = eval_block(Block, lambda: nn.Hardtanh(0, 6))
    converted = convert(model)
    for m in (model, converted):
        m.act.max_val = 5
    assert reason(converted) == "an activation was changed"
    assert_same(converted, model, image(), fused=0)


def test_changed_settings_of_the_owner_are_used():
    class Flagged(Block):
        twice = False

        def __init__(self):
            super().__init__()
            self.scale = 1.0

        def forward(self, x):
            y = super().forward(x) * self.scale
            return y + y if self.training else y

    model = eval_block(Flagged)
    converted = convert(model)
    assert_same(converted, model, image(), fused=1)
    for m in (model, converted):
        m.scale = 3.0
    assert_same(converted, model, image(), fused=0)
    converted = convert(model)
    for m in (model, converted):
        m.train()
        m.bn1.eval(), m.bn2.eval()
    assert_same(converted, model, image(), fused=1)  # the graph of the other mode


UNTRACEABLE = {
    "control flow": lambda self, x: Block.forward(self, x) if x.sum() > 1e9 else Block.forward(self, x) * 2,
    "isinstance": lambda self, x: Block.forward(self, x) if isinstance(x, list) else Block.forward(self, x) * 2,
    "grad mode": lambda self, x: Block.forward(self, x) * (1 + torch.is_grad_enabled()),
    "a constant tensor": lambda self, x: Block.forward(self, x) * torch.tensor(2.0),
}


def _without_grad(self, x):
    with torch.no_grad():
        return Block.forward(self, x) * 2


def _autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return Block.forward(self, x)


def _attribute(self, x):
    self.seen = Block.forward(self, x)
    return self.seen


def _list(self, x):
    self.all_seen.append(Block.forward(self, x))
    return self.all_seen[-1]


UNTRACEABLE |= {"no_grad": _without_grad, "autocast": _autocast, "an attribute": _attribute, "a list": _list}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_a_forward_no_graph_tells_the_truth_about(name):
    cls = type("Untraceable", (Block,), {"forward": UNTRACEABLE[name], "__module__": __name__})
    model = eval_block(cls)
    model.all_seen = []
    converted = convert(model)
    assert status(converted) == {"dw": "replaced", "pw": "replaced"}
    assert reason(converted).startswith("Untraceable cannot be traced: ")
    assert converted.__dict__.keys() - model.__dict__.keys() <= {"train", "forward", "dsconv_report"}
    assert_same(converted, model, image(), fused=0)
    if name == "an attribute":
        assert converted.seen.shape == model.seen.shape
    model = eval_block(cls)
    model.all_seen = []
    nested = nn.Sequential(model, eval_block(), nn.Sequential(model, eval_block()))
    assert_same(convert(nested), nested, image(), fused=2)


def test_parts_of_an_untraceable_model_are_fused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), nn.Sequential(Block(), nn.ReLU()), nn.Conv2d(8, 8, 3, groups=8)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x) if x.shape[0] > 1 and float(x.detach().sum()) < 1e9 else x
            return x

    model = eval_block(Model)
    converted = convert(model)
    assert list(status(converted).values()) == ["fused"] * 4 + ["replaced"]
    assert_same(converted, model, image(), fused=2)


def test_a_module_that_forward_does_not_call_is_replaced():
    model = eval_block()
    model.extra = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)).double()
    converted = convert(model)
    assert status(converted) == {"dw": "fused", "pw": "fused", "extra.0": "replaced", "extra.1": "replaced"}
    assert reason(converted, "extra.0") == "tracing met no call of it"
    assert_same(converted.extra, model.extra, image(), fused=0)


def test_other_arguments_than_traced_run_the_own_forward():
    class Options(Block):
        def forward(self, x, residual=None, *, twice=False):
            y = super().forward(x)
            y = y if residual is None else y + residual
            return 2 * y if twice else y

    model = eval_block(Options)
    converted, x = convert(model), image()
    assert_same(converted, model, x, fused=1)
    for args, kwargs in [((x, x), {}), ((x,), {"residual": x}), ((x,), {"twice": True}), ((), {"x": x})]:
        torch.testing.assert_close(converted(*args, **kwargs), model(*args, **kwargs))


def test_class_methods_paths_and_state_dict_stay():
    model = nn.Sequential(eval_block(Residual), nn.Sequential(eval_block(), nn.ReLU())).double().eval()
    converted = convert(model)
    assert converted is not model and converted.dsconv_report is not None
    assert "dsconv_report" not in model.__dict__ and "forward" not in model[0].__dict__
    for (ours, a), (theirs, b) in zip(converted.named_modules(), model.named_modules(), strict=True):
        assert ours == theirs and type(a) is type(b)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in model.named_parameters()]
    fresh = nn.Sequential(Residual(), nn.Sequential(Block(), nn.ReLU())).double().eval()
    fresh.load_state_dict(converted.state_dict(), strict=True)
    assert_same(converted, fresh, image(), fused=2)
    other = nn.Sequential(eval_block(Residual), nn.Sequential(eval_block(), nn.ReLU())).eval()
    converted.load_state_dict(other.state_dict(), strict=True)
    assert_same(converted, other, image(), fused=2)


def _train_step(model, optimizer):
    model.train()
    model(image()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _step_without_forward(model):
    """A fused optimizer leaves no trace on the parameters; nor is there a forward after its last one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _data(model):
    for p in model.parameters():
        p.data.mul_(1.5)
    model.eval()


def _to_half_and_back(model):
    model.half().double()


def _buffers(model):
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.5)


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict(eval_block(Residual).state_dict()),
    "load_state_dict assign": lambda m: m.load_state_dict(eval_block(Residual).state_dict(), assign=True),
    "SGD": lambda m: _train_step(m, torch.optim.SGD(m.parameters(), lr=0.1)),
    "fused AdamW": lambda m: _train_step(m, torch.optim.AdamW(m.parameters(), lr=0.1, fused=True)),
    "fused AdamW alone": _step_without_forward,
    "in place": lambda m: [p.mul_(1.5) for p in m.parameters()],
    "data and eval()": _data,
    "a new parameter": lambda m: setattr(m.pw, "weight", nn.Parameter(2 * m.pw.weight)),
    "new data": lambda m: setattr(m.pw.weight, "data", 2 * m.pw.weight.data),
    "to half and back": _to_half_and_back,
    "statistics": _buffers,
    "a forward in training mode": lambda m: m.train()(image()) is m.eval(),
    "apply": lambda m: m.apply(lambda c: nn.init.normal_(c.weight) if isinstance(c, nn.Conv2d) else None),
    "bias": lambda m: setattr(m.dw, "bias", nn.Parameter(torch.ones(8, dtype=torch.float64))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_stale(change, mode):
    converted = convert(eval_block(Residual))
    x = image()
    with mode():
        before = converted(x)
        torch.testing.assert_close(converted(x), before, rtol=0, atol=0)
    with torch.set_grad_enabled("AdamW" in change or "SGD" in change):
        CHANGES[change](converted)
    fresh = revert(copy.deepcopy(converted))
    with mode():
        after = converted(x)
        torch.testing.assert_close(after, fresh(x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(after, before, rtol=1e-6, atol=1e-6)
    assert status(converted)["dw"] == "fused"


@pytest.mark.parametrize("kernel_size", [3, 1])
def test_a_lone_convolution_is_not_stale_either(kernel_size):
    converted = convert(nn.Conv2d(8, 8, kernel_size, groups=8 if kernel_size > 1 else 1).eval())
    x = image(torch.float32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        converted(x)
        converted.weight.data.mul_(2)
        converted.eval()
        torch.testing.assert_close(converted(x), type(converted).forward(converted, x), rtol=1e-4, atol=1e-5)
        converted.weight.mul_(2)
        torch.testing.assert_close(converted(x), type(converted).forward(converted, x), rtol=1e-4, atol=1e-5)
        converted.bias = nn.Parameter(torch.ones(8))
        torch.testing.assert_close(converted(x), type(converted).forward(converted, x), rtol=1e-4, atol=1e-5)


def test_revert_is_bit_identical():
    model = nn.Sequential(eval_block(Residual), eval_block(), nn.Conv2d(8, 8, 3, groups=8)).float()
    reverted = revert(convert(model))
    x = image(torch.float32)
    assert torch.equal(reverted(x), model(x))
    for a, b in zip(reverted.modules(), model.modules(), strict=True):
        assert a.__dict__.keys() == b.__dict__.keys()
    assert revert(model) is model
    converted = convert(model, inplace=True)
    assert converted is model and "dsconv_report" in model.__dict__
    torch.testing.assert_close(model(x), reverted(x), rtol=1e-4, atol=1e-4)


def test_converting_twice_is_converting_once():
    model = eval_block(Residual)
    once = convert(model)
    twice = convert(once)
    assert str(twice.dsconv_report) == str(once.dsconv_report)
    assert_same(twice, model, image(), fused=1)
    part = convert(nn.Sequential(once, nn.ReLU()))
    assert "dsconv_report" not in part[0].__dict__
    assert torch.equal(revert(part)(image().abs()), part(image().abs())) is False  # other numbers, but it runs


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "save"])
def test_copies_own_their_weights(duplicate):
    converted = convert(eval_block(Residual))
    x = image()
    with torch.no_grad():
        before = converted(x)
        if duplicate == "deepcopy":
            twin = copy.deepcopy(converted)
        elif duplicate == "pickle":
            twin = pickle.loads(pickle.dumps(converted))
        else:
            buffer = io.BytesIO()
            torch.save(converted, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        assert status(twin) == {"dw": "fused", "pw": "fused"}
        assert torch.equal(twin(x), before)
        for p in twin.parameters():
            p.mul_(2)
        with chain_runs() as runs:
            torch.testing.assert_close(twin(x), revert(copy.deepcopy(twin))(x), rtol=1e-10, atol=1e-10)
        assert runs == [2]
        assert torch.equal(converted(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_to(dtype, layout):
    model = eval_block(Residual)
    converted = convert(model)
    x = image()
    with torch.no_grad():
        expected = converted(x)
        converted.to(dtype=dtype, memory_format=layout)
        y = converted(x.to(dtype).contiguous(memory_format=layout))
    assert y.dtype == dtype and y.is_contiguous(memory_format=layout)
    error = {torch.float16: 0.02, torch.bfloat16: 0.2, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=error, atol=error)


@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
def test_compile(mode):
    model = eval_block(Residual).float()
    converted = convert(model)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    if mode == "train":
        model.train(), converted.train()
    x = image(torch.float32)
    with torch.set_grad_enabled(mode != "eval"):
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
        if mode == "eval":
            for m in (model, converted):
                m.bn1.weight.mul_(2)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
            return
    g = torch.randn_like(expected)
    ours = torch.autograd.grad(compiled(x), list(converted.parameters()), g)
    theirs = torch.autograd.grad(model(x), list(model.parameters()), g)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_export_functional_call_and_jit_trace():
    model = eval_block(Residual)
    converted, x = convert(model), image()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.export.export(converted, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.jit.trace(converted, x)(x), expected)
        doubled = {name: 2 * value for name, value in converted.named_parameters()}
        for m in (model, converted, converted):
            y = torch.func.functional_call(m, doubled, (x,))
            expected = y if m is model else expected
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(converted))(x), model(x))


def test_functorch():
    model = eval_block(Residual)
    x, found = image(), []
    for m in (model, convert(model)):
        parameters = {n: p.detach() for n, p in m.named_parameters()}
        found.append(torch.func.grad(lambda p, m=m: torch.func.functional_call(m, p, (x,)).square().mean())(parameters))
    torch.testing.assert_close(*found)


def test_unusual_input_is_answered_as_before():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)).double().eval()
    converted = convert(model)
    x = image()
    with torch.no_grad():
        torch.testing.assert_close(converted(x[0]), model(x[0]))  # unbatched
        torch.testing.assert_close(converted(x[:0]), model(x[:0]))
        with pytest.raises((RuntimeError, ValueError)):
            converted(x[:, :5])


def test_convolutions_with_a_forward_of_their_own_are_left():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), None, 1, 1, 1, self.groups)

    block = eval_block()
    block.dw = Standardised(8, 8, 3, groups=8).double()
    converted = convert(block)
    assert status(converted) == {"dw": "left", "pw": "replaced"}
    assert reason(converted) == "Standardised has a forward of its own"
    assert_same(converted, block, image(), fused=0)
    patched = eval_block()
    patched.dw.forward = lambda x: torch.zeros_like(x)
    assert status(convert(patched))["dw"] == "left"


@pytest.mark.parametrize("fuse", ["auto", "always", "never"])
def test_fuse_reaches_the_operator(fuse):
    model = eval_block().float()
    x = image(torch.float32, size=32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        converted = convert(model, fuse=fuse)
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)
        chosen = dsconv_ext.explain(converted, x).chosen
    if fuse != "auto":
        assert any("fused" in name for name in chosen) == (fuse == "always")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"model": 3}, TypeError, "convert: model: got int, expected an nn.Module"),
        ({"inplace": 1}, TypeError, "convert: inplace: got 1, expected True or False"),
        ({"fold_batchnorm": "no"}, TypeError, "convert: fold_batchnorm: got 'no', expected True, False or None"),
        ({"fuse": "sometimes"}, ValueError, "convert: fuse: got 'sometimes', expected"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    arguments = {"model": nn.Identity(), **arguments}
    with pytest.raises(error, match=match):
        convert(arguments.pop("model"), **arguments)
    with pytest.raises(TypeError, match="revert: model: got str, expected"):
        revert("model")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(TypeError, match="convert: model: got a scripted Conv2d, expected a model in Python"):
        convert(torch.jit.script(nn.Conv2d(8, 8, 3, groups=8)))


def test_report_lists_every_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Conv2d(8, 8, 5, groups=8, dilation=(2, 1)),
        nn.Conv2d(8, 8, 1),
        nn.ConvTranspose2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=2),
    )
    report = convert(model).dsconv_report
    assert [(row.path, row.kind, row.status) for row in report] == [
        ("0", "dense 3x3 stride 2", "left"),
        ("1", "depthwise 5x5 dilation 2x1", "fused"),
        ("2", "pointwise 1x1", "fused"),
        ("3", "transposed 3x3", "left"),
        ("4", "grouped 3x3", "left"),
    ]
    assert report.counts() == {"fused": 2, "replaced": 0, "left": 3} and len(report) == 5
    assert str(report).splitlines()[1].split() == ["1", "depthwise", "5x5", "dilation", "2x1", "fused", "with", "2"]


def test_convert_report_on_the_command_line(capsys, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setenv("COLUMNS", "160")
    main(["convert-report", "torchvision.models:mobilenet_v2"])
    printed = capsys.readouterr().out
    assert "torchvision.models:mobilenet_v2 in eval mode: 34 fused, 17 replaced, 1 left" in printed
    assert re.search(r"features\.2\.conv\.2 .* pointwise 1x1 .* fused .* with features\.2\.conv\.1\.0", printed)
    main(["convert-report", "torchvision.models:mobilenet_v2", "--train"])
    assert "in training mode: 0 fused, 51 replaced, 1 left" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cannot make torchvision.models:nothing: AttributeError"):
        main(["convert-report", "torchvision.models:nothing"])
    with pytest.raises(SystemExit):
        main(["convert-report", "mobilenet_v2"])
    assert "model: got 'mobilenet_v2', expected timm:NAME or MODULE:NAME" in capsys.readouterr().err


def test_an_epsilon_shows():
    model = eval_block()
    converted, x = convert(model), image()
    with torch.no_grad():
        for name in ("bn1", "bn2"):
            torch.testing.assert_close(converted(x), model(x))
            before = converted(x)
            for network in (converted, model):
                getattr(network, name).eps = 0.5
            assert not torch.equal(converted(x), before)
            torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_mode_of_convert_does_not_matter(mode):
    model = eval_block()
    with mode():
        converted = convert(model)
        assert status(converted) == {"dw": "fused", "pw": "fused"}
    assert_same(convert(model), model, image(), fused=1)


def test_networks_made_in_inference_mode_keep_their_weights(monkeypatch):
    """And renew them after the statistics of a part were taken anew."""
    with torch.inference_mode():
        inner = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        model = nn.Sequential(nn.Sequential(inner)).eval()
        converted, x = convert(model), torch.randn(2, 8, 7, 7)
        assert status(converted) == {"0.0.0": "fused", "0.0.3": "fused"}
        torch.testing.assert_close(converted(x), model(x))
        with monkeypatch.context() as kept:
            kept.delattr(chains.Weights, "_fold")
            converted(x)
        for network in (model, converted):
            part = network[0][0]
            part.train()
            network(x)
            part.eval()
        torch.testing.assert_close(converted(x), model(x))
