"""python -m dsconv_ext info | explain | convert-report: what is inside, what a problem or a model would run on."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import dsconv_ext
from dsconv_ext import _loader


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, with rich where it is installed."""
    rows = [tuple(map(str, row)) for row in rows]
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        print(title)
        for row in (columns, *rows):
            print("  " + "  ".join(f"{cell:24}" for cell in row).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def info(_: argparse.Namespace) -> None:
    """Print the versions, the instruction sets, the CUDA architectures inside and the kernels compiled."""
    facts = {
        "dsconv_ext": dsconv_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "library": _loader.LIBRARY if _loader.error is None else f"not used: {_loader.error}",
        **json.loads(torch.ops.dsconv.build_info()),
        "threads": torch.get_num_threads(),
    }
    _table("dsconv_ext", ("what", "value"), ((name, _text(value)) for name, value in facts.items()))
    kernels = json.loads(torch.ops.dsconv.kernels())
    columns = list(dict.fromkeys(key for kernel in kernels for key in kernel))
    _table(f"{len(kernels)} kernels", columns, ([_text(k.get(c)) for c in columns] for k in kernels))


def explain(args: argparse.Namespace) -> None:
    """Run one convolution on random numbers and print which kernels it ran on and why."""
    dtype = getattr(torch, args.dtype)
    n, channels, *spatial = args.shape
    nd = len(spatial)
    layout = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d}[nd]
    x = torch.randn(args.shape, dtype=dtype, device=args.device)
    x = x.contiguous(memory_format=layout) if args.channels_last else x
    factory = {"dtype": dtype, "device": args.device}
    weight = torch.randn(channels * args.multiplier, 1, *[args.kernel] * nd, **factory)
    settings = {"stride": args.stride, "padding": args.padding, "dilation": args.dilation}
    if args.outputs:
        pointwise = torch.randn(args.outputs, weight.size(0), *[1] * nd, **factory)
        function, weights = getattr(dsconv_ext.functional, f"separable_conv{nd}d"), [weight, pointwise]
    else:
        function, weights = getattr(dsconv_ext.functional, f"depthwise_conv{nd}d"), [weight]

    def run() -> None:
        inputs = [t.requires_grad_(args.backward) for t in (x, *weights)]
        y = function(*inputs, **settings)
        if args.backward:
            y.backward(torch.randn_like(y))

    explanation = dsconv_ext.explain(run)
    for call in explanation.calls:
        rows = [
            (
                f"{c.name} <-" if c.name == call.chosen else c.name,
                "" if c.estimate_us is None else f"{c.estimate_us:.1f}",
                c.reason or "",
            )
            for c in call.candidates
        ]
        _table(f"{call.op} {call.direction}  {call.problem}", ("kernel", "estimate (us)", "cannot run because"), rows)


def convert_report(args: argparse.Namespace) -> None:
    """Convert a model with random weights and print what became of each of its convolutions."""
    origin, name = args.model.split(":", 1)
    try:
        module = importlib.import_module(origin)
        make = functools.partial(module.create_model, name) if origin == "timm" else getattr(module, name)
        model = make()
    except Exception as error:  # whatever another package raises for a name it does not know
        raise SystemExit(f"convert-report: cannot make {args.model}: {type(error).__name__}: {error}") from error
    report: Any = dsconv_ext.convert(model.train(args.train), inplace=True).dsconv_report
    mode = "training" if args.train else "eval"
    counts = ", ".join(f"{count} {status}" for status, count in report.counts().items())
    rows = [(row.path, row.kind, row.status, row.reason) for row in report]
    _table(f"{args.model} in {mode} mode: {counts}", ("path", "kind", "status", "reason"), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m dsconv_ext", description=__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("info", help=info.__doc__).set_defaults(run=info)
    command = commands.add_parser("explain", help=explain.__doc__)
    command.add_argument("shape", type=int, nargs="+", help="shape of the input: N C and 1 to 3 spatial sizes")
    command.add_argument("--outputs", type=int, help="channels after the 1x1 convolution; without it: depthwise alone")
    command.add_argument("--kernel", type=int, default=3)
    command.add_argument("--multiplier", type=int, default=1)
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        command.add_argument(f"--{name}", type=int, default=default)
    command.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    command.add_argument("--device", default="cpu")
    command.add_argument("--channels-last", action="store_true")
    command.add_argument("--backward", action="store_true")
    command.set_defaults(run=explain)
    command = commands.add_parser("convert-report", help=convert_report.__doc__)
    command.add_argument("model", help="timm:NAME, or MODULE:NAME of a function that takes no arguments")
    command.add_argument("--train", action="store_true", help="in training mode instead of eval mode")
    command.set_defaults(run=convert_report)
    args = parser.parse_args(argv)
    if args.run is convert_report and ":" not in args.model:
        parser.error(f"model: got {args.model!r}, expected timm:NAME or MODULE:NAME")
    if args.run is explain and len(args.shape) not in (3, 4, 5):
        parser.error(f"shape: got {len(args.shape)} numbers, expected N C and 1 to 3 spatial sizes")
    args.run(args)


if __name__ == "__main__":
    main()
