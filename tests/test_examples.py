"""The examples in their short form; and that the demo's comparison notices every kind of wrong network."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
for package in ("rich", "skimage", "sklearn", "timm"):
    pytest.importorskip(package)
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402
import train_digits  # noqa: E402
from dsconv_ext.nn import DepthwiseConv2d, DepthwiseSeparableConv2d  # noqa: E402

DEPTHWISE_LAYERS = {"mobilenetv1_100": 13, "mobilenetv2_100": 17}


@pytest.fixture(scope="module", params=demo.NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[str, list[demo.Variant], torch.Tensor]:
    torch.manual_seed(0)
    model = demo.timm.create_model(request.param).eval()
    images = demo.load_photographs(model)
    demo.make_sensitive(model, images)
    return request.param, demo.build_variants(model), images


def test_demo_replaces_every_depthwise_convolution(network) -> None:
    name, variants, _ = network
    layers = DEPTHWISE_LAYERS[name]
    assert [variant.replaced for variant in variants] == [0, 0, 0, layers, layers]
    for variant, kind in zip(variants[-2:], (DepthwiseConv2d, DepthwiseSeparableConv2d), strict=True):
        assert sum(isinstance(module, kind) for module in variant.model.modules()) == layers


def test_demo_networks_agree(network) -> None:
    _, variants, images = network
    for variant, agreement in zip(variants, demo.compare(variants, images), strict=True):
        assert agreement.passed, f"{variant.label}: {agreement}"


MUTATIONS = {
    "flipped kernel": lambda pair: pair.depthwise.weight.copy_(pair.depthwise.weight.flip(2, 3)),
    "padding off by one": lambda pair: pair.depthwise.weight.copy_(pair.depthwise.weight.roll(1, 3)),
    "dropped BatchNorm mean": lambda pair: pair.depthwise.bias.zero_(),
    "pointwise off by one part in a thousand": lambda pair: pair.pointwise.weight.mul_(1.001),
    "wrong activation": lambda pair: setattr(pair, "mid_activation", "relu"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@torch.no_grad()
def test_demo_notices_a_wrong_layer(network, mutation: str) -> None:
    _, variants, images = network
    mutant = copy.deepcopy(variants[-1])
    pairs = [module for module in mutant.model.modules() if isinstance(module, DepthwiseSeparableConv2d)]
    MUTATIONS[mutation](pairs[len(pairs) // 2])
    assert not demo.compare([variants[0], mutant], images)[1].passed


def test_demo_fails_when_a_network_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    disagree = demo.Agreement(error=float("nan"), same_top5=True, limit=1e-4)
    monkeypatch.setattr(demo, "compare", lambda variants, images: [disagree] * len(variants))
    monkeypatch.setattr(demo.train_digits, "run", lambda *args, **kwargs: True)
    assert demo.main(["--rounds", "1"]) == 1


def test_demo_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--rounds", "1"]) == 0
    assert "demo passed" in capsys.readouterr().out


def test_demo_pretrained_falls_back(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    create_model = demo.timm.create_model

    def offline(name: str, pretrained: bool) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return create_model(name)

    monkeypatch.setattr(demo.timm, "create_model", offline)
    model, pretrained = demo.load_network("mobilenetv1_100", True, demo.Console())
    assert not pretrained and not model.training
    assert "no pretrained weights (OSError: no network)" in capsys.readouterr().out


def test_train_digits_reports_low_accuracy() -> None:
    assert train_digits.main(["--epochs", "1"]) == 1


README_EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(README_EXAMPLES)))
def test_readme_example(number: int) -> None:
    exec(README_EXAMPLES[number], {})
