"""Write the shape files of timm's models: ``python -m bench.extract_shapes [NAME ...]``.

A model with random weights runs once on zeros; hooks note every depthwise Conv2d, and every pair of one with a 1x1
Conv2d that only a BatchNorm and an activation separate. Needs timm (in the extra `demo`); nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .problems import SHAPES, Case

# File name -> model of timm, input size.
MODELS = {
    "mobilenet_v1": ("mobilenetv1_100", 224),
    "mobilenet_v2": ("mobilenetv2_100", 224),
    "mobilenet_v4_conv_small": ("mobilenetv4_conv_small", 224),
    "efficientnet_lite0": ("efficientnet_lite0", 224),
    "convnext_atto": ("convnext_atto", 224),
    "xception": ("legacy_xception", 299),
}
ACTIVATIONS = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
}
NORMS = (nn.BatchNorm2d,)  # timm's BatchNormAct2d, whose activation is the submodule `act`, is a subclass of it


@dataclass
class Found:
    """A convolution, and what follows it up to the next one."""

    conv: nn.Conv2d
    size: tuple[int, int]
    activation: str = "none"
    bias: bool = False
    pointwise: list[Found] = field(default_factory=list)


class Recorder:
    """Follows the output of each convolution through norms and activations: `origins` maps tensors to convolutions.

    A tensor that was written since (a residual added in place) has another version, and no origin any more.
    """

    def __init__(self) -> None:
        self.origins: dict[tuple[int, int], Found] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.depthwise: list[Found] = []

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
            return
        # What works in place has written its input before this is called, and returns the same tensor.
        x, in_place = inputs[0], output is inputs[0]
        origin = self.origins.get((id(x), x._version - in_place))
        if isinstance(module, nn.Conv2d):
            origin = self.convolution(module, x, origin)
        elif isinstance(module, NORMS) and origin is not None:
            origin.bias = True  # folded into the convolution, a norm is a bias
            origin.activation = ACTIVATIONS[type(getattr(module, "act", nn.Identity()))]
        elif isinstance(module, nn.Identity):
            return  # the same tensor
        elif type(module) in ACTIVATIONS and origin is not None:
            origin.activation = ACTIVATIONS[type(module)]
        else:
            return
        self.alive += [x, output]
        if origin is not None:
            self.origins[id(output), output._version] = origin

    def convolution(self, conv: nn.Conv2d, x: Tensor, origin: Found | None) -> Found:
        found = Found(conv, (x.size(2), x.size(3)), bias=conv.bias is not None)
        if conv.groups == conv.in_channels > 1:
            self.depthwise.append(found)
        elif origin is not None and origin in self.depthwise and is_pointwise(conv):
            origin.pointwise.append(found)
        return found


def is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def problem(found: Found, pointwise: Found | None = None) -> str:
    """The line of a shape file."""
    conv = found.conv
    biases = {(True, True): "both", (True, False): "dw", (False, True): "pw", (False, False): "none"}
    case = Case(
        "dw" if pointwise is None else "sep",
        1,
        conv.in_channels,
        found.size,
        conv.kernel_size,
        conv.stride,
        conv.dilation,
        tuple((p, p) for p in conv.padding),
        conv.out_channels // conv.in_channels,
        pointwise.conv.out_channels if pointwise else 0,
        activation=(pointwise.activation if pointwise else "none", 0.0),
        mid=(found.activation if pointwise else "none", 0.0),
        bias=biases[found.bias, pointwise.bias] if pointwise else "both" if found.bias else "none",
    )
    words = str(case).split()
    return " ".join([*words[:2], *words[4:]])


@torch.no_grad()
def extract(model_name: str, size: int) -> Counter[str]:
    """The problems of a model and how often it has each, depthwise convolutions first."""
    model, recorder = timm.create_model(model_name, pretrained=False).eval(), Recorder()
    for module in model.modules():
        module.register_forward_hook(recorder)
    model(torch.zeros(1, 3, size, size))
    alone = [problem(found) for found in recorder.depthwise]
    pairs = [problem(found, pointwise) for found in recorder.depthwise for pointwise in found.pointwise]
    return Counter([*alone, *pairs])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.extract_shapes", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(MODELS)}; default: all")
    for name in parser.parse_args().names or MODELS:
        model_name, size = MODELS[name]
        lines = [f"{line}  # {count}x" for line, count in extract(model_name, size).items()]
        head = [
            f"# Model: {model_name} of timm {timm.__version__}, input 3x{size}x{size}; by bench/extract_shapes.py.",
            "# The depthwise convolutions, then the pairs with the 1x1 convolution that follows; BatchNorm is a bias.",
        ]
        (SHAPES / f"{name}.txt").write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")
        print(f"{name}: {len(lines)} problems")


if __name__ == "__main__":
    main()
