"""convert() on timm's families: values and gradients in eval and training mode, and that a wrong model is noticed.

Float64 shows whether the same is computed, float32 that nothing is lost on the way. The weights are random; norms,
LayerScale and logits are brought into a state in which the output depends on every layer (`make_sensitive`).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import dsconv_ext
from dsconv_ext import convert
from tolerance import error

timm = pytest.importorskip("timm")

# Name -> how many of its depthwise convolutions are fused with a pointwise one, of how many.
FAMILIES = {
    "mobilenetv1_100": (13, 13),
    "mobilenetv2_050": (17, 17),
    "mobilenetv3_small_050": (2, 11),
    "mobilenetv4_conv_small_050": (15, 15),
    "efficientnet_lite0": (16, 16),
    "efficientnet_b0": (0, 16),
    "tf_efficientnet_lite0": (16, 16),
    "tf_mobilenetv3_small_minimal_100": (11, 11),
    "mnasnet_small": (5, 15),
    "semnasnet_075": (8, 16),
    "fbnetc_100": (21, 21),
    "spnasnet_100": (21, 21),
    "tinynet_e": (0, 10),
    "hardcorenas_a": (3, 11),
    "lcnet_035": (11, 13),
    "mixnet_s": (1, 43),
    "ghostnet_050": (7, 41),
    "repghostnet_050": (7, 41),
    "rexnet_100": (3, 16),
    "mobileone_s0": (0, 105),
    "convnext_atto": (0, 12),
    "convnextv2_atto": (0, 12),
    "edgenext_xx_small": (0, 15),
    "inception_next_atto": (0, 36),
    "starnet_s1": (0, 30),
    "mobilenet_edgetpu_v2_xs": (12, 12),
    "mambaout_femto": (0, 18),
    "efficientvit_b0": (11, 15),
    "hgnetv2_b0": (0, 12),
    "pvt_v2_b0": (0, 8),
    "gernet_s": (3, 3),
    "legacy_xception": (34, 34),
    "xception41": (39, 39),
    "ghostnetv2_100": (7, 69),
    "tf_efficientnetv2_b0": (0, 16),
    "mobilenetv4_hybrid_medium": (39, 39),
    "mobilevit_xxs": (7, 7),
    "mobilevitv2_050": (6, 9),
    "efficientformerv2_s0": (14, 22),
    "fastvit_t8": (10, 40),
    "repvit_m0_9": (3, 49),
    "swiftformer_xs": (16, 16),
    "tiny_vit_5m_224": (5, 15),
    "xcit_nano_12_p16_224": (0, 24),
    "coatnet_nano_rw_224": (0, 7),
    "rdnet_tiny": (0, 21),
}
SLOW = {*list(FAMILIES)[31:], "mobileone_s0", "rexnet_100", "hgnetv2_b0", "repghostnet_050", "efficientvit_b0"}
FULL_SIZE = {
    "mobilevit_xxs",
    "mobilevitv2_050",
    "efficientformerv2_s0",
    "swiftformer_xs",
    "tiny_vit_5m_224",
    "xcit_nano_12_p16_224",
    "coatnet_nano_rw_224",
}
# Of one image with a permuted upstream gradient PyTorch computes a wrong gradient of a BatchNorm (torch 2.14.1, CPU).
NEVER_ALONE = {"xcit_nano_12_p16_224"}
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, timm.layers.GELU, timm.layers.GELUTanh)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
FLOAT64_LIMIT = 1e-10


@torch.no_grad()
def make_sensitive(model: nn.Module, images: Tensor) -> None:
    """Make the output depend on every layer.

    Weights that only scale or shift lose their constant start (LayerScale's is 1e-6, BatchNorm's the identity), the
    statistics become those of the images, and the logits get unit standard deviation.
    """
    for parameter in model.parameters():
        value = parameter.flatten()[0].item()
        if parameter.numel() > 1 and bool((parameter == value).all()):
            nn.init.normal_(parameter, 0.0, 0.3) if value == 0 else nn.init.uniform_(parameter, 0.5, 1.5)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the running statistics become those of the only batch
    model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    scale = 1 / model.eval()(images).std()
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):  # of those distilled from another model, the mean
        for parameter in head.parameters():
            parameter *= scale


@dataclass
class Results:
    """Output, gradients of the input and all parameters, and buffers after one call in each mode."""

    output: Tensor
    gradients: list[Tensor]
    statistics: list[Tensor]


def run(model: nn.Module, images: Tensor, training: bool, gradients: bool = True) -> Results:
    model = copy.deepcopy(model).to(images.dtype).train(training)
    torch.manual_seed(1)
    if not gradients:
        with torch.no_grad():
            return Results(model(images), [], [])
    images = images.clone().requires_grad_()
    output = model(images)
    upstream = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [images, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(output, inputs, upstream.to(output.dtype), allow_unused=True)
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    return Results(output.detach(), [g for g in found if g is not None], statistics)


def gradient_error(found: Results, reference: Results) -> float:
    """The largest relative error, as a norm, of any gradient; of one that is nearly zero, relative to the usual one."""
    assert len(found.gradients) == len(reference.gradients)
    norms = [g.double().norm().item() for g in reference.gradients]
    floor = 1e-2 * sum(norms) / len(norms)
    distances = [
        (ours.double() - theirs.double()).norm().item()
        for ours, theirs in zip(found.gradients, reference.gradients, strict=True)
    ]
    worst = max(d / max(n, floor) for d, n in zip(distances, norms, strict=True))
    return worst if all(d == d for d in distances) else float("inf")


@dataclass
class Family:
    """A model, the converted one, images in float64, and what the model makes of them."""

    name: str
    model: nn.Module
    converted: nn.Module
    images: Tensor
    output: Tensor
    output_float32: Tensor


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FAMILIES])
def family(request: pytest.FixtureRequest) -> Family:
    name = request.param
    torch.manual_seed(0)
    size = 64
    if name in FULL_SIZE:
        size = timm.get_pretrained_cfg(name).input_size[-1]
    model = timm.create_model(name, num_classes=10)
    images = torch.randn(4 if size == 64 else 2, 3, size, size)
    make_sensitive(model, images)
    outputs = [run(model, x, False, gradients=False).output for x in (images.double(), images)]
    return Family(name, model, convert(model), images.double(), *outputs)


def test_report(family: Family) -> None:
    depthwise = [row for row in family.converted.dsconv_report if row.kind.startswith("depthwise")]
    assert (sum(row.status == "fused" for row in depthwise), len(depthwise)) == FAMILIES[family.name]
    assert all(row.status in ("fused", "replaced") and row.reason for row in depthwise)
    explanation = dsconv_ext.explain(run, family.converted, family.images[:1].float(), False, gradients=False)
    operators = [call.op for call in explanation.calls if call.op != "pointwise"]
    assert operators.count("separable") == FAMILIES[family.name][0]
    assert len(operators) == len(depthwise)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_agrees_without_gradients(family: Family, layout: torch.memory_format) -> None:
    assert list(family.converted.state_dict()) == list(family.model.state_dict())
    images = family.images.contiguous(memory_format=layout)
    assert error(run(family.converted, images, False, gradients=False).output, family.output) < FLOAT64_LIMIT
    found = run(family.converted, images.float(), False, gradients=False).output
    assert error(found, family.output) <= float32_limit(family)


def float32_limit(family: Family) -> float:
    return 4 * error(family.output_float32, family.output) + 1e-6


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_agrees_with_gradients(family: Family, mode: str) -> None:
    """Float64 on one draw. In float32 a value at a kink of an activation may fall to either side, and then gradients
    differ by far more than rounding: what counts is the median of the draws, of three if that will do, of nine at most.
    """
    training = mode == "train"
    ratios: list[float] = []
    for i in range(9):
        images = family.images.roll(5 * i, -1)
        images = images if training or family.name in NEVER_ALONE else images[i % len(images)][None]
        reference = run(family.model, images, training)
        if i == 0:
            found = run(family.converted, images, training)
            assert error(found.output, reference.output) < FLOAT64_LIMIT
            assert gradient_error(found, reference) < FLOAT64_LIMIT
            for ours, theirs in zip(found.statistics, reference.statistics, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        single, found = (run(m, images.float(), training) for m in (family.model, family.converted))
        assert error(found.output, reference.output) <= 4 * error(single.output, reference.output) + 1e-6
        ratios.append(gradient_error(found, reference) / (4 * gradient_error(single, reference) + 1e-6))
        if i >= 2 and statistics.median(ratios) <= 1:
            return
    raise AssertionError(f"gradients in float32: four times PyTorch's error times {sorted(ratios)}")


def _middle(model: nn.Module, condition: Callable[[nn.Module], bool]) -> tuple[str, nn.Module]:
    found = [(path, module) for path, module in model.named_modules() if condition(module)]
    return found[len(found) // 2]


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def flip_kernel(model: nn.Module) -> None:
    conv = _middle(model, _is_depthwise)[1]
    conv.weight.copy_(conv.weight.flip(-1, -2))


def drop_mean(model: nn.Module) -> None:
    """The mean of a BatchNorm; where there is none, the bias of another norm."""
    batch_norm = any(isinstance(m, NORMS[0]) for m in model.modules())
    norm = _middle(model, lambda m: isinstance(m, NORMS[0] if batch_norm else NORMS[1]))[1]
    (norm.running_mean if batch_norm else norm.bias).zero_()


def change_slope(model: nn.Module) -> None:
    path, _ = _middle(model, lambda m: isinstance(m, ACTIVATIONS))
    model.set_submodule(path, nn.LeakyReLU(0.02))


def shift_padding(model: nn.Module) -> None:
    """One more zero before and one less behind, along the longer side of the kernel."""
    conv = _middle(model, _is_depthwise)[1]
    along_width = conv.kernel_size[1] >= conv.kernel_size[0]
    shift = (1, -1) if along_width else (0, 0, 1, -1)
    conv.register_forward_pre_hook(lambda module, args: (nn.functional.pad(args[0], shift),))


MUTANTS = {
    "flipped kernel": flip_kernel,
    "dropped BatchNorm mean": drop_mean,
    "wrong activation slope": change_slope,
    "padding off by one": shift_padding,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_notices_a_wrong_model(family: Family, mutant: str) -> None:
    """The limits are small enough: with one layer wrong the output exceeds those of both dtypes."""
    wrong = copy.deepcopy(family.converted)
    with torch.no_grad():
        MUTANTS[mutant](wrong)
    found = run(wrong, family.images, False, gradients=False).output
    assert error(found, family.output) > max(FLOAT64_LIMIT, float32_limit(family))
