"""Put dsconv_ext into two real networks, compare them with the originals on photographs, then train a small one.

    python examples/demo.py [--quick] [--pretrained] [--rounds N] [--batch N]

The exit code is 1 when a network with our modules disagrees with the original, or when the trained one is not good
enough.
"""

import argparse
import copy
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from resource import RUSAGE_SELF, getrusage

import timm
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from skimage import data
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.efficientnet import EfficientNet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import dsconv_ext
import train_digits
from dsconv_ext.nn import DepthwiseConv2d, DepthwiseSeparableConv2d

NETWORKS = ("mobilenetv1_100", "mobilenetv2_100")
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # inside scikit-image's package: nothing is downloaded

# Each convolution and the norm (with its activation inside) that follows it, as timm's classes name them. The last two
# rows of a block are its depthwise and its pointwise stage.
CONV_NORM = {
    EfficientNet: [("conv_stem", "bn1"), ("conv_head", "bn2")],
    DepthwiseSeparableConv: [("conv_dw", "bn1"), ("conv_pw", "bn2")],
    InvertedResidual: [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")],
}
ACTIVATIONS = {nn.Identity: "none", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish", nn.SiLU: "silu"}


def load_network(name: str, pretrained: bool, console: Console) -> tuple[nn.Module, bool]:
    """The timm network in eval mode, and whether its weights are pretrained ones."""
    if pretrained:
        try:
            return timm.create_model(name, pretrained=True).eval(), True
        except Exception as error:  # the hub client, its cache and the network fail in many ways
            reason = str(error).strip().splitlines() or [""]
            console.print(
                f"[yellow]{name}: no pretrained weights ({type(error).__name__}: {reason[0]}); random weights are used"
            )
    return timm.create_model(name, pretrained=False).eval(), False


def load_photographs(model: nn.Module) -> torch.Tensor:
    """Four photographs, prepared as the network's own configuration says: ``[4, 3, 224, 224]``."""
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    return torch.stack([transform(Image.fromarray(getattr(data, name)())) for name in PHOTOGRAPHS])


@torch.no_grad()
def make_sensitive(model: nn.Module, images: torch.Tensor) -> None:
    """Make the output of a network with random weights depend on every layer.

    As timm initialises them, BatchNorm is nearly the identity and the logits nearly constant, so that even a flipped
    kernel would hardly be seen. Here BatchNorm gets random weights and biases and the statistics of the photographs,
    and the logits get unit standard deviation.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0.0, 0.5)
        norm.momentum = None  # the running statistics become those of the only batch
    model.train()(images)
    scale = 1 / model.eval()(images).std()
    model.classifier.weight *= scale
    model.classifier.bias *= scale


def is_depthwise(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.groups == module.in_channels > 1


def use_depthwise(model: nn.Module) -> int:
    """Replace every depthwise convolution by our module, in place; how many."""
    found = [(name, module) for name, module in model.named_modules() if is_depthwise(module)]
    for name, conv in found:
        model.set_submodule(name, DepthwiseConv2d.from_conv(conv))
    return len(found)


def use_separable(model: nn.Module) -> int:
    """Replace depthwise, norm, pointwise, norm by one module in every block, in place, in eval mode; how many."""
    replaced = 0
    for block in model.modules():
        if not isinstance(block, (DepthwiseSeparableConv, InvertedResidual)):
            continue
        names = [name for pair in CONV_NORM[type(block)][-2:] for name in pair]
        depthwise, depthwise_norm, pointwise, pointwise_norm = (getattr(block, name) for name in names)
        between = [block.aa, block.se]  # anti-aliasing and squeeze-excite need the whole depthwise map
        if is_depthwise(depthwise) and all(isinstance(module, nn.Identity) for module in between):
            fused = DepthwiseSeparableConv2d.from_convs(
                depthwise,
                pointwise,
                depthwise_bn=depthwise_norm,
                pointwise_bn=pointwise_norm,
                mid_activation=ACTIVATIONS[type(depthwise_norm.act)],
                activation=ACTIVATIONS[type(pointwise_norm.act)],
            )
            for name, module in zip(names, (fused, nn.Identity(), nn.Identity(), nn.Identity()), strict=True):
                setattr(block, name, module)
            replaced += 1
    return replaced


def fold_batchnorm(model: nn.Module) -> None:
    """Fold every BatchNorm of an eval-mode network into the convolution before it, in place; its activation stays."""
    for module in list(model.modules()):
        for conv_name, norm_name in CONV_NORM.get(type(module), ()):
            conv, norm = getattr(module, conv_name), getattr(module, norm_name)
            if isinstance(conv, nn.Conv2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, norm.act)


@dataclass
class Variant:
    """One form of a network, and the number of the form with which it is fair to compare its speed."""

    label: str
    model: nn.Module
    channels_last: bool
    baseline: int
    replaced: int = 0  # convolutions, or pairs of them, that our modules took over

    def arrange(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)


def build_variants(original: nn.Module) -> list[Variant]:
    channels_last = copy.deepcopy(original).to(memory_format=torch.channels_last)
    folded, depthwise, separable = (copy.deepcopy(channels_last) for _ in range(3))
    replaced_depthwise, replaced_separable = use_depthwise(depthwise), use_separable(separable)
    fold_batchnorm(folded)
    fold_batchnorm(separable)  # what is left: the stem, the expansions, the head
    return [
        Variant("eager", original, False, baseline=0),
        Variant("channels_last", channels_last, True, baseline=0),
        Variant("channels_last, BN folded", folded, True, baseline=0),
        Variant("DepthwiseConv2d", depthwise, True, baseline=1, replaced=replaced_depthwise),
        Variant("DepthwiseSeparableConv2d", separable, True, baseline=2, replaced=replaced_separable),
    ]


@dataclass
class Agreement:
    error: float  # max |y - reference| / rms(reference), the reference in float64
    same_top5: bool
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit and self.same_top5  # a NaN fails the first comparison


@torch.inference_mode()
def compare(variants: list[Variant], images: torch.Tensor) -> list[Agreement]:
    """Judge every variant by a float64 run of the first; the first one's own float32 error sets what is allowed."""
    reference = copy.deepcopy(variants[0].model).double()(images.double())
    top5 = reference.topk(5).indices
    outputs = [variant.model(variant.arrange(images)) for variant in variants]
    errors = [((output - reference).abs().max() / reference.square().mean().sqrt()).item() for output in outputs]
    limit = 4 * errors[0] + 1e-6
    return [
        Agreement(error, torch.equal(output.topk(5).indices, top5), limit)
        for output, error in zip(outputs, errors, strict=True)
    ]


@dataclass
class Timing:
    """Samples of one variant in milliseconds, sorted, without those during which the system took a core away."""

    samples: list[float]
    disturbed: bool  # there were too few quiet samples, so all are kept

    def quantile(self, fraction: float) -> float:
        return self.samples[round(fraction * (len(self.samples) - 1))]


@torch.inference_mode()
def measure(
    variants: list[Variant], images: torch.Tensor, rounds: int, seconds: float, on_round: Callable[[], None]
) -> list[Timing]:
    """Time all variants in turn in every round, the order alternating, until the rounds or the seconds are used up."""
    inputs = [variant.arrange(images) for variant in variants]
    series: list[list[tuple[float, bool]]] = [[] for _ in variants]
    order = list(range(len(variants)))
    end = time.perf_counter() + seconds
    for round_number in range(-2, rounds):  # the first two warm up
        if round_number > 0 and time.perf_counter() > end:
            break
        for index in order:
            switches, start = getrusage(RUSAGE_SELF).ru_nivcsw, time.perf_counter()
            variants[index].model(inputs[index])
            duration = (time.perf_counter() - start) * 1e3
            if round_number >= 0:
                series[index].append((duration, getrusage(RUSAGE_SELF).ru_nivcsw > switches))
        order.reverse()
        on_round()
    quiet = [sorted(duration for duration, disturbed in samples if not disturbed) for samples in series]
    return [
        Timing(kept, False) if 3 * len(kept) > len(samples) else Timing(sorted(d for d, _ in samples), True)
        for kept, samples in zip(quiet, series, strict=True)
    ]


@torch.inference_mode()
def kernels_of(variant: Variant, images: torch.Tensor) -> str:
    """The kernels one call of the network takes, and how often each."""
    explanation = dsconv_ext.explain(variant.model, variant.arrange(images))
    return ", ".join(f"{count} x {name}" for name, count in Counter(explanation.chosen).items())


def check_network(name: str, options: argparse.Namespace, console: Console) -> bool:
    torch.manual_seed(0)
    model, pretrained = load_network(name, options.pretrained, console)
    images = load_photographs(model)
    if not pretrained:
        make_sensitive(model, images)
    variants = build_variants(model)
    agreements = compare(variants, images)
    timed = images[:1].expand(options.batch, -1, -1, -1)
    with Progress(console=console) as progress:
        task = progress.add_task(f"timing {name}", total=options.rounds + 2)
        timings = measure(variants, timed, options.rounds, options.seconds, lambda: progress.advance(task))
        progress.update(task, completed=options.rounds + 2)

    weights = "pretrained" if pretrained else "random"
    table = Table(title=f"{name}, {weights} weights, batch {options.batch}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("form", no_wrap=True)
    for heading in ("put in", "error", "ms", "p20-p80", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (variant, agreement, timing) in enumerate(zip(variants, agreements, timings, strict=True)):
        speedup = timings[variant.baseline].quantile(0.5) / timing.quantile(0.5)
        table.add_row(
            f"{number} {variant.label}",
            str(variant.replaced or ""),
            f"{'' if agreement.passed else '[red]'}{agreement.error:.1e}{'' if agreement.same_top5 else ' top-5'}",
            f"{timing.quantile(0.5):.1f}",
            f"{timing.quantile(0.2):.1f}-{timing.quantile(0.8):.1f}",
            f"{speedup:.2f}x vs {variant.baseline}" if number else "",
        )
    console.print(table)
    if any(timing.disturbed for timing in timings):
        console.print("[yellow]other programs held the cores during most calls: these times mean little")
    passed = all(agreement.passed for agreement in agreements)
    for number, variant in enumerate(variants):
        if variant.replaced:
            console.print(f"kernels of form {number}: {kernels_of(variant, timed)}", highlight=False)
    console.print(
        f"against float64 on {len(images)} photographs, error at most {agreements[0].limit:.1e} and the same top-5: "
        + ("[green]all agree" if passed else "[red]FAILED")
    )
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and epochs: a check, not numbers")
    parser.add_argument("--pretrained", action="store_true", help="fetch pretrained weights, if that is possible")
    parser.add_argument("--rounds", type=int, help="timing rounds (default 40, with --quick 4)")
    parser.add_argument("--batch", type=int, default=1, help="images per timed call")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (4 if options.quick else 40)
    options.seconds = 10 if options.quick else 60

    console = Console()
    console.print(
        f"dsconv_ext {dsconv_ext.__version__}, torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads"
    )
    passed = [check_network(name, options, console) for name in NETWORKS]
    passed.append(train_digits.run(console, epochs=6 if options.quick else 12))
    console.print("[bold green]demo passed" if all(passed) else "[bold red]demo FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
