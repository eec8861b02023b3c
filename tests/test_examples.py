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

# Convolutions that are fused, replaced, left.
COUNTS = {
    "mobilenetv1_100": (26, 0, 1),
    "mobilenetv2_100": (34, 17, 1),
    "mobilenetv4_conv_small": (30, 13, 3),
    "efficientnet_lite0": (32, 16, 1),
    "convnext_atto": (0, 36, 4),
    "legacy_xception": (68, 0, 6),
}


SLOW = ("efficientnet_lite0", "legacy_xception")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in demo.NETWORKS])
def network(request: pytest.FixtureRequest) -> tuple[str, list[demo.Variant], torch.Tensor]:
    torch.manual_seed(0)
    model = demo.timm.create_model(request.param).eval()
    images = demo.load_photographs(model)[:2]
    demo.make_sensitive(model, images)
    return request.param, demo.build_variants(model), images


def test_demo_converts_every_depthwise_convolution(network) -> None:
    name, variants, _ = network
    assert tuple(variants[-1].model.dsconv_report.counts().values()) == COUNTS[name]


def test_demo_folds_every_batch_norm_of_the_baseline(network) -> None:
    _, variants, _ = network
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in variant.model.modules()) for variant in variants]
    name = network[0]
    assert norms[0] == norms[1] == norms[3] and norms[2] == 0 and (norms[0] > 0) == (name != "convnext_atto")


def test_demo_networks_agree(network) -> None:
    _, variants, images = network
    for variant, agreement in zip(variants, demo.compare(variants, images), strict=True):
        assert agreement.passed, f"{variant.label}: {agreement}"


def middle(model: nn.Module, kinds: tuple[type, ...]) -> tuple[str, nn.Module]:
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]
    found = [(path, m) for path, m in found if not isinstance(m, nn.Conv2d) or m.groups == m.in_channels > 1]
    return found[len(found) // 2]


def drop_mean(model: nn.Module) -> None:
    batch_norm = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    norm = middle(model, (nn.BatchNorm2d if batch_norm else nn.LayerNorm,))[1]
    (norm.running_mean if batch_norm else norm.bias).zero_()


def change_weight(model: nn.Module, change) -> None:
    weight = middle(model, (nn.Conv2d,))[1].weight
    weight.copy_(change(weight))


MUTATIONS = {
    "flipped kernel": lambda model: change_weight(model, lambda w: w.flip(2, 3)),
    "padding off by one": lambda model: change_weight(model, lambda w: w.roll(1, 3)),
    "dropped BatchNorm mean": drop_mean,
    "one part in a thousand": lambda model: change_weight(model, lambda w: 1.001 * w),
    "wrong activation": lambda model: model.set_submodule(
        middle(model, (nn.ReLU, nn.ReLU6, nn.GELU, demo.timm.layers.GELU))[0], nn.LeakyReLU(0.02)
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@torch.no_grad()
def test_demo_notices_a_wrong_layer(network, mutation: str) -> None:
    _, variants, images = network
    mutant = copy.deepcopy(variants[-1])
    MUTATIONS[mutation](mutant.model)
    assert not demo.compare([variants[0], mutant], images)[1].passed


def test_demo_fails_when_a_network_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    disagree = demo.Agreement(error=float("nan"), same_top5=True, limit=1e-4)
    monkeypatch.setattr(demo, "compare", lambda variants, images: [disagree] * len(variants))
    monkeypatch.setattr(demo.train_digits, "run", lambda *args, **kwargs: True)
    assert demo.main(["--rounds", "1", "mobilenetv1_100"]) == 1


def test_demo_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--rounds", "1", "mobilenetv2_100", "convnext_atto"]) == 0
    printed = capsys.readouterr().out
    assert "demo passed" in printed and "34 fused, 17 replaced, 1 left" in printed


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
