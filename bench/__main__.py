"""Command line: ``python -m bench run | report | compare | overhead``."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.progress import Progress

from . import measure, plot, problems, providers, report, roofline
from .overhead import overhead
from .runner import Settings, run


def words(*allowed: str) -> Callable[[str], list[str]]:
    """The type of an option that takes a comma-separated list."""

    def read(text: str) -> list[str]:
        given = text.split(",")
        for word in given:
            if allowed and word not in allowed:
                raise argparse.ArgumentTypeError(f"got {word!r}, expected some of {','.join(allowed)}")
        return given

    return read


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def add_run(commands: Any) -> None:
    command = commands.add_parser(
        "run",
        help="time layers: this library, PyTorch and others, interleaved in one run",
        description="Exit code 1: a provider was wrong.",
    )
    what = command.add_argument_group("what")
    what.add_argument("--op", type=words(*problems.OPS), default=list(problems.OPS), help="depthwise,separable")
    what.add_argument("--pass", dest="passes", type=words(*problems.PASSES), default=["fwd"], help="default: fwd")
    what.add_argument("--shapes", type=words(), default=[], help="names of bench/shapes, or .txt files like them")
    what.add_argument("--problem", action="append", default=[], help="a problem string of tests/cases.py; repeatable")
    what.add_argument("--batch", type=numbers, default=[1])
    what.add_argument("--dtype", type=words("fp64", "fp32", "bf16", "fp16"), default=["fp32"])
    what.add_argument("--layout", type=words(*problems.LAYOUTS), default=["nhwc"], help="of providers that take any")
    what.add_argument("--threads", type=numbers, default=[1])
    what.add_argument(
        "--providers",
        type=words(),
        default=["dsconv", "torch", "torch-channels-last"],
        help=f"some of {','.join(providers.PROVIDERS)}, or module:attribute; onnxruntime and openvino: fwd alone, in "
        "fp32, openvino in bf16 too; left out elsewhere",
    )
    how = command.add_argument_group("how")
    how.add_argument("--rounds", type=int, default=16)
    how.add_argument("--sample-ms", type=float, default=3.0, help="length of a warm sample")
    how.add_argument("--cache", choices=["warm", "cold"], default="warm")
    how.add_argument("--time-limit", type=float, default=60.0, help="seconds until a worker is killed")
    how.add_argument("--json", help="save the run")
    how.add_argument("--csv", help="save its rows")
    how.add_argument("--plot", help="save a roofline scatter, a PNG; needs matplotlib")
    command.set_defaults(function=do_run)


def do_run(console: report.Console, arguments: argparse.Namespace) -> int:
    layers = problems.select(
        arguments.shapes, arguments.problem, arguments.op, arguments.batch, arguments.dtype, arguments.layout
    )
    if not layers:
        raise ValueError("nothing to measure: give --shapes or --problem")
    if arguments.plot:
        plot.require()
    cores = len(os.sched_getaffinity(0))
    if max(arguments.threads) > cores:
        console.print(f"[red]{max(arguments.threads)} threads on {cores} cores: those times mean little.")
    absent = {name: missing for name in arguments.providers if (missing := providers.find(name).missing())}
    names = [name for name in arguments.providers if name not in absent]
    if not names:
        raise ValueError(f"providers: packages that are not installed: {absent}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run as Ctrl-C does
    settings = Settings(
        layers,
        arguments.passes,
        arguments.threads,
        names,
        arguments.rounds,
        arguments.sample_ms / 1000,
        arguments.cache == "cold",
        arguments.time_limit,
        roofs(console, layers, arguments.threads),
    )
    given = {name: value for name, value in vars(arguments).items() if name != "function"}
    saved: report.Row = {
        **measure.surroundings(package for name in names for package in providers.find(name).packages),
        "arguments": given,
        "absent": absent,
        "rooflines": [asdict(roof) for roof in settings.roofs.values()],
        "rows": [],
    }
    try:
        # Without a refreshing thread, which would preempt the workers.
        with Progress(console=console, auto_refresh=False, transient=True) as progress:
            task = progress.add_task("measuring", total=len(layers) * len(settings.passes) * len(settings.threads))
            for rows in run(settings):
                saved["rows"] += rows
                progress.update(task, advance=1, refresh=True)
    finally:  # an interrupted run is saved too
        if arguments.json:
            report.save_json(arguments.json, saved)
        if arguments.csv:
            report.save_csv(arguments.csv, saved["rows"])
        if arguments.plot:
            plot.save(arguments.plot, saved)
        report.print_run(console, saved)
    return int(any(row["status"] == "wrong" for row in saved["rows"]))


def roofs(
    console: report.Console, layers: list[problems.Layer], numbers_of_threads: list[int]
) -> dict[int, roofline.Roofline]:
    """The roofline per number of threads; where it cannot be measured, rows have no fraction of it."""
    dtypes, found = list(dict.fromkeys(layer.case.dtype_name for layer in layers)), {}
    for threads in numbers_of_threads:
        try:
            found[threads] = roofline.measured(threads, dtypes)
        except subprocess.SubprocessError as error:
            console.print(f"[red]no roofline with {threads} threads: {error}")
    return found


def do_report(console: report.Console, arguments: argparse.Namespace) -> int:
    if arguments.plot:
        plot.require()
    run = report.load_json(arguments.file)
    report.print_run(console, run)
    if arguments.plot:
        plot.save(arguments.plot, run)
    return 0


def do_compare(console: report.Console, arguments: argparse.Namespace) -> int:
    report.print_comparison(console, report.load_json(arguments.before), report.load_json(arguments.after))
    return 0


def do_overhead(console: report.Console, arguments: argparse.Namespace) -> int:
    rows = overhead(arguments.rounds)
    saved = {**measure.surroundings(), "rows": rows}
    if arguments.json:
        report.save_json(arguments.json, saved)
    report.print_overhead(console, saved)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_run(commands)
    command = commands.add_parser("report", help="print the tables of a saved run")
    command.add_argument("file")
    command.add_argument("--plot", help="save a roofline scatter, a PNG; needs matplotlib")
    command.set_defaults(function=do_report)
    command = commands.add_parser("compare", help="print before and after of two saved runs, row by row")
    command.add_argument("before")
    command.add_argument("after")
    command.set_defaults(function=do_compare)
    command = commands.add_parser("overhead", help="fixed cost of a call, against F.conv2d")
    command.add_argument("--rounds", type=int, default=40)
    command.add_argument("--json", help="save the run")
    command.set_defaults(function=do_overhead)
    parsed = parser.parse_args(arguments)
    try:
        return parsed.function(report.console(), parsed)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
