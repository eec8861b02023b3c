"""Train a small depthwise-separable network on scikit-learn's 8x8 handwritten digits.

    python examples/train_digits.py [--epochs 12] [--seed 0]

The exit code is 1 when the accuracy on the held-out quarter of the digits stays at or below 97 %.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from dsconv_ext.nn import DepthwiseSeparableConv2d

REQUIRED_ACCURACY = 0.97


@dataclass
class Result:
    losses: list[float]  # mean training loss of each epoch
    accuracy: float  # on the test set, after the last epoch
    seconds: float


def separable_block(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Depthwise and pointwise convolution in one pass: a BatchNorm after the pair does not hinder the fusion."""
    return nn.Sequential(
        DepthwiseSeparableConv2d(
            in_channels, out_channels, 3, stride=stride, padding=1, bias=False, mid_activation="relu"
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def build_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(inplace=True),
        separable_block(24, 48),
        separable_block(48, 96, stride=2),
        separable_block(96, 96),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def load_data() -> list[torch.Tensor]:
    """Training images, test images, training labels, test labels; the same split every time."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=digits.target)
    return [images[train], images[test], labels[train], labels[test]]


def train(
    epochs: int = 12, batch_size: int = 64, seed: int = 0, on_epoch: Callable[[int, float], None] = lambda *_: None
) -> Result:
    """Train from scratch and test once; ``on_epoch(number, loss)`` is called after every epoch."""
    train_images, test_images, train_labels, test_labels = load_data()
    torch.manual_seed(seed)
    model = build_network()
    steps = epochs * -(-len(train_labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)

    start = time.perf_counter()
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(train_labels)).split(batch_size):
            loss = nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        losses.append(total / len(train_labels))
        on_epoch(epoch + 1, losses[-1])

    model.eval()
    with torch.inference_mode():
        accuracy = (model(test_images).argmax(1) == test_labels).double().mean().item()
    return Result(losses, accuracy, time.perf_counter() - start)


def run(console: Console, epochs: int, seed: int = 0) -> bool:
    """Train with a progress bar, print the loss curve and the accuracy; whether the accuracy is high enough."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training on digits", total=epochs)
        result = train(
            epochs,
            seed=seed,
            on_epoch=lambda _, loss: progress.update(task, advance=1, description=f"training, loss {loss:.3f}"),
        )
    passed = result.accuracy > REQUIRED_ACCURACY

    table = Table("epoch", "training loss", "", title="Digits: depthwise-separable network trained from scratch")
    for epoch, loss in enumerate(result.losses, start=1):
        table.add_row(str(epoch), f"{loss:.3f}", "#" * round(40 * loss / max(result.losses)))
    console.print(table)
    console.print(
        f"test accuracy {result.accuracy:.2%} after {result.seconds:.1f} s; "
        f"required: more than {REQUIRED_ACCURACY:.0%}: " + ("[green]passed" if passed else "[red]FAILED")
    )
    return passed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    return 0 if run(Console(), options.epochs, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
