"""Convert six real networks, compare them with the originals on photographs, then train a small one.

    python examples/demo.py [--quick] [--pretrained] [--rounds N] [--batch N] [NETWORK ...]

The exit code is 1 when a converted network disagrees with the original, or when the trained one is not good enough.
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
from timm.layers import BatchNormAct2d
from torch import nn
from torch.fx.experimental import optimization

import dsconv_ext
import train_digits

NETWORKS = (
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
    "convnext_atto",
    "legacy_xception",
)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # inside scikit-image's package: nothing is downloaded


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
    """Four photographs, prepared as the network's own configuration says: ``[4, 3, H, W]``."""
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    return torch.stack([transform(Image.fromarray(getattr(data, name)())) for name in PHOTOGRAPHS])


@torch.no_grad()
def make_sensitive(model: nn.Module, images: torch.Tensor) -> None:
    """Make the output of a network with random weights depend on every layer.

    As timm initialises them, norms are nearly the identity, LayerScale is 1e-6 and the logits are nearly constant, so
    that even a flipped kernel would hardly be seen. Here everything that starts constant becomes random, BatchNorm gets
    the statistics of the photographs, and the logits get unit standard deviation.
    """
    for parameter in model.parameters():
        value = parameter.flatten()[0].item()
        if parameter.numel() > 1 and bool((parameter == value).all()):
            nn.init.normal_(parameter, 0.0, 0.3) if value == 0 else nn.init.uniform_(parameter, 0.5, 1.5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the running statistics become those of the only batch
    model.train()(images)
    scale = 1 / model.eval()(images).std()
    for parameter in model.get_classifier().parameters():
        parameter *= scale


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Fold every BatchNorm of an eval-mode network into the convolution before it, in place, with torch's own tool."""
    for path, norm in list(model.named_modules()):
        if isinstance(norm, BatchNormAct2d):  # which the tool does not know
            plain = nn.BatchNorm2d(norm.num_features, norm.eps)
            plain.load_state_dict(norm.state_dict())
            model.set_submodule(path, nn.Sequential(plain.eval(), norm.act))
    return optimization.fuse(model, inplace=True)


@dataclass
class Variant:
    """One form of a network."""

    label: str
    model: nn.Module
    channels_last: bool

    def arrange(self, images: torch.Tensor) -> torch.Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.contiguous(memory_format=layout)


def build_variants(original: nn.Module) -> list[Variant]:
    channels_last = copy.deepcopy(original).to(memory_format=torch.channels_last)
    return [
        Variant("eager", original, False),
        Variant("eager, channels_last", channels_last, True),
        Variant("eager, channels_last, BN folded", fold_batchnorm(copy.deepcopy(channels_last)), True),
        Variant("converted, channels_last", dsconv_ext.convert(channels_last), True),
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


@dataclass
class Result:
    """What was found about one network."""

    name: str
    passed: bool
    report: str
    agreements: list[Agreement]
    timings: list[Timing]

    def speedup(self, baseline: int) -> str:
        """How many times as long the form `baseline` takes as the converted one, which is the last."""
        return f"{self.timings[baseline].quantile(0.5) / self.timings[-1].quantile(0.5):.2f}x"


def check_network(name: str, options: argparse.Namespace, console: Console) -> Result:
    torch.manual_seed(0)
    model, pretrained = load_network(name, options.pretrained, console)
    images = load_photographs(model)
    if not pretrained:
        make_sensitive(model, images)
    variants = build_variants(model)
    agreements = compare(variants, images)
    timed = images[:1].expand(options.batch, -1, -1, -1)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"timing {name}", total=options.rounds + 2)
        timings = measure(variants, timed, options.rounds, options.seconds, lambda: progress.advance(task))
        progress.update(task, completed=options.rounds + 2)

    counts = variants[-1].model.dsconv_report.counts()
    report = ", ".join(f"{count} {status}" for status, count in counts.items())
    result = Result(name, all(agreement.passed for agreement in agreements), report, agreements, timings)
    weights = "pretrained" if pretrained else "random"
    size = "x".join(map(str, images.shape[2:]))
    table = Table(
        title=f"{name}, {weights} weights, batch {options.batch}, {size}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("form", no_wrap=True)
    for heading in ("error", "top-5", "ms", "p20-p80", "speed-up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (variant, agreement, timing) in enumerate(zip(variants, agreements, timings, strict=True)):
        table.add_row(
            variant.label,
            f"{'' if agreement.passed else '[red]'}{agreement.error:.1e}",
            "same" if agreement.same_top5 else "[red]differs",
            f"{timing.quantile(0.5):.1f}",
            f"{timing.quantile(0.2):.1f}-{timing.quantile(0.8):.1f}",
            result.speedup(number) if variant is not variants[-1] else "",
        )
    console.print(table)
    if any(timing.disturbed for timing in timings):
        console.print("[yellow]other programs held the cores during most calls: these times mean little")
    console.print(f"convolutions: {report}", highlight=False)
    console.print(f"kernels: {kernels_of(variants[-1], timed)}", highlight=False)
    console.print(
        f"against float64 on {len(images)} photographs, error at most {agreements[0].limit:.1e} and the same top-5: "
        + ("[green]all agree" if result.passed else "[red]FAILED")
    )
    return result


def summarise(results: list[Result], console: Console) -> None:
    table = Table(title="speed-up of the converted networks over ...", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("network", no_wrap=True)
    for heading in ("eager", "channels_last", "BN folded", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("convolutions")
    for result in results:
        speedups = [result.speedup(baseline) for baseline in range(3)]
        table.add_row(result.name, *speedups, f"{result.agreements[-1].error:.1e}", result.report)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds and epochs: a check, not numbers")
    parser.add_argument("--pretrained", action="store_true", help="fetch pretrained weights, if that is possible")
    parser.add_argument("--rounds", type=int, help="timing rounds (default 40, with --quick 4)")
    parser.add_argument("--batch", type=int, default=1, help="images per timed call")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"timm's names (default {' '.join(NETWORKS)})")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (4 if options.quick else 40)
    options.seconds = 10 if options.quick else 60

    console = Console()
    console.print(
        f"dsconv_ext {dsconv_ext.__version__}, torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}, {torch.get_num_threads()} threads"
    )
    results = [check_network(name, options, console) for name in options.networks or NETWORKS]
    summarise(results, console)
    passed = [result.passed for result in results]
    passed.append(train_digits.run(console, epochs=6 if options.quick else 12))
    console.print("[bold green]demo passed" if all(passed) else "[bold red]demo FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
