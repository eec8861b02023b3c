"""Saved runs, and the tables in the terminal."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]
IDENTITY = ("problem", "pass", "threads", "cache", "provider")
GROUP = ("op", "pass", "dtype", "threads", "provider", "layout")
FILE_WIDTH = 160


def console() -> Console:
    """The terminal; or a file or pipe, where lines may be long."""
    return Console() if Console().is_terminal else Console(width=FILE_WIDTH)


def save_json(path: str, run: Row) -> None:
    """Write a run: the machine, the versions, the arguments and every row."""
    Path(path).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def load_json(path: str) -> Row:
    """Read what `save_json` wrote."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save_csv(path: str, rows: list[Row]) -> None:
    """Write the rows of a run."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def print_head(console: Console, run: Row) -> None:
    console.print(run["machine"], highlight=False, soft_wrap=True)
    console.print(
        ", ".join(f"{name} {value}" for name, value in run["versions"].items()), highlight=False, soft_wrap=True
    )


def print_run(console: Console, run: Row) -> None:
    """Every row, and the geometric means."""
    print_head(console, run)
    for roof in run.get("rooflines", []):
        print_roofline(console, roof)
    for name, packages in run.get("absent", {}).items():
        console.print(f"[yellow]{name} is left out: not installed: {', '.join(packages)}", highlight=False)
    print_rows(console, run["rows"])
    print_means(console, run["rows"])


def print_roofline(console: Console, roof: Row) -> None:
    peaks = ", ".join(f"{name} {peak:.0f}" for name, peak in roof["peaks"].items())
    speeds = ", ".join(f"{_size(size)} {speed:.0f}" for size, speed in roof["bandwidths"])
    text = f"roofline, threads {roof['threads']}: GFLOP/s {peaks}; copy GB/s per working set {speeds}"
    console.print(text, highlight=False, soft_wrap=True)


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"


def table(*columns: str, text: int) -> Table:
    """An empty table whose first ``text`` columns are words, the rest numbers."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < text else "right", overflow="fold")
    return made


def print_rows(console: Console, rows: list[Row]) -> None:
    """One line per provider; what was measured side by side stands together, its problem on the first line only."""
    columns = ("problem", "pass", "thr", "provider", "us", "p20", "p80", "GFLOP/s", "GB/s", "of roof", "x best torch")
    made, before = table(*columns, text=4), None
    for row in rows:
        measured = (_without_layout(row), row["pass"], str(row["threads"]))
        if before not in (None, measured):
            made.add_section()
        shown = ("", "", "") if before == measured else measured
        made.add_row(*shown, f"{row['provider']} {row['layout']}", *_numbers(row))
        before = measured
    console.print(made)


def _without_layout(row: Row) -> str:
    return row["problem"].replace(f" {row['layout']} ", " ", 1)


def _numbers(row: Row) -> tuple[str, ...]:
    if "median" not in row:
        return f"[red]{row['status']}", *[""] * 6
    times = (f"{_noisy(row)}{row['median']:.1f}", f"{row['p20']:.1f}", f"{row['p80']:.1f}")
    roof = "-" if row.get("roof") is None else f"{row['roof']:.2f}"
    return *times, f"{row['gflops']:.1f}", f"{row['gbytes']:.1f}", roof, _ratio(row)


def _noisy(row: Row) -> str:
    """The mark of a time for which hardly a sample was undisturbed."""
    return "" if row["clean"] else "~"


def _ratio(row: Row) -> str:
    if row["status"] == "wrong":
        return f"[red]wrong: {row['detail']} off by {row['error']:.1e}"
    if row["ratio"] is None:
        return "-"
    return f"{'[red]' if row['ratio'] < 0.995 else ''}{row['ratio']:.2f}"


def means(rows: Iterable[Row]) -> list[Row]:
    """The geometric mean of the ratios of each operation, pass, dtype, number of threads, provider and layout."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["ratio"] is not None:
            groups.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    return [{**dict(zip(GROUP, group, strict=True)), **_mean(members)} for group, members in groups.items()]


def _mean(rows: list[Row]) -> Row:
    ratios = [row["ratio"] for row in rows]
    return {
        "mean": statistics.geometric_mean(ratios),
        "problems": len(ratios),
        "behind": sum(ratio < 1 for ratio in ratios),
        "worst": min(ratios),
        "noisy": sum(not row["clean"] for row in rows),
    }


def print_means(console: Console, rows: list[Row]) -> None:
    made = table(
        "op", "pass", "dtype", "thr", "provider", "x best torch", "problems", "behind", "worst", "noisy", text=5
    )
    for mean in means(rows):
        made.add_row(
            *(str(mean[key]) for key in GROUP[:4]),
            f"{mean['provider']} {mean['layout']}",
            f"{mean['mean']:.2f}",
            str(mean["problems"]),
            str(mean["behind"]),
            f"{mean['worst']:.2f}",
            str(mean["noisy"]),
        )
    console.print("Geometric means of the best PyTorch time over the provider's:")
    console.print(made)
    for row in (row for row in rows if row["status"] != "ok"):
        where = f"{row['problem']} {row['pass']} with {row['threads']} threads: {row['provider']}"
        console.print(f"[red]{where}: {row['status']}[/] {escape(row['detail'])}", highlight=False, soft_wrap=True)


def compare(before: list[Row], after: list[Row]) -> list[Row]:
    """The rows both runs have; `ratio` is what the provider gained relative to PyTorch in the same run.

    Absolute times of two runs do not compare: the machine may have been slower in one of them.
    """
    earlier = {tuple(row[key] for key in IDENTITY): row for row in before}
    pairs = [(earlier.get(tuple(row[key] for key in IDENTITY)), row) for row in after]
    return [
        {
            **{key: new[key] for key in (*IDENTITY, "op", "dtype", "layout", "status")},
            "before": old["ratio"],
            "after": new["ratio"],
            "clean": old["clean"] and new["clean"],
            "time": old["median"] / new["median"],
            "ratio": new["ratio"] / old["ratio"] if new["ratio"] and old["ratio"] else None,
        }
        for old, new in pairs
        if old is not None and "median" in old and "median" in new
    ]


def print_comparison(console: Console, first: Row, second: Row) -> None:
    """Before and after, per row."""
    for run in (first, second):
        print_head(console, run)
    if first["machine"] != second["machine"]:
        console.print("[red]The runs were made on different machines.")
    rows = compare(first["rows"], second["rows"])
    made = table("problem", "pass", "thr", "provider", "before", "after", "gain", "time before/after", text=4)
    for row in rows:
        ratios = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("before", "after", "ratio"))
        made.add_row(
            row["problem"],
            row["pass"],
            str(row["threads"]),
            row["provider"],
            *ratios,
            f"{_noisy(row)}{row['time']:.2f}",
        )
    console.print(made)
    for mean in means(rows):
        name = " ".join(str(mean[key]) for key in GROUP)
        console.print(
            f"gain, geometric mean of {mean['problems']}: {name}: {mean['mean']:.2f}", highlight=False, soft_wrap=True
        )
    console.print("before, after: times the best PyTorch provider of the same run; gain: after / before")


def print_overhead(console: Console, run: Row) -> None:
    print_head(console, run)
    made = table("mode", "call", "us", "p20", "p80", "ratio", text=2)
    for row in run["rows"]:
        made.add_row(row["mode"], row["call"], *(f"{row[key]:.2f}" for key in ("median", "p20", "p80", "ratio")))
    console.print(made)
