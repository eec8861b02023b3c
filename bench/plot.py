"""The roofline scatter of a run, with matplotlib."""

from __future__ import annotations

import importlib.util
from typing import Any

from .roofline import load

MARKERS = "os^DvP*X"


def require() -> None:
    """Raise, before anything is measured, if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib, which is not installed: pip install matplotlib")


def save(path: str, run: dict[str, Any]) -> None:
    """Write a PNG: a point per row, at its FLOP per byte and GFLOP/s, under the roofs it was measured with."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a display

    rows = [row for row in run["rows"] if "median" in row and row["status"] == "ok"]
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved", ylabel="GFLOP/s")
    axes.set_title(run["machine"], fontsize="small", wrap=True)
    series: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in rows:
        key = (row["provider"], row["layout"], row["dtype"], row["pass"], row["threads"])
        series.setdefault(key, []).append((row["gflops"] / row["gbytes"], row["gflops"]))
    for index, (key, points) in enumerate(series.items()):
        name = "{} {} {} {}, threads {}".format(*key)
        axes.scatter(*zip(*points, strict=True), s=24, alpha=0.7, marker=MARKERS[index % len(MARKERS)], label=name)
    intensities = [x for points in series.values() for x, _ in points]
    for roof in map(load, run.get("rooflines", [])):
        _draw_roof(axes, roof, min(intensities, default=1) / 2, max(intensities, default=100) * 2)
    axes.grid(which="major", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize="x-small")
    figure.savefig(path, format="png", dpi=150)


def _draw_roof(axes: Any, roof: Any, low: float, high: float) -> None:
    """Per dtype: as far as memory allows, and dashed as the fastest cache does."""
    memory, cache = roof.bandwidths[-1][1], max(speed for _, speed in roof.bandwidths)
    for dtype, peak in roof.peaks.items():
        for speed, style in ((memory, "-"), (cache, "--")):
            name = f"roof {dtype}, threads {roof.threads}: {speed:.0f} GB/s, {peak:.0f} GFLOP/s"
            ends = sorted({low, min(max(peak / speed, low), high), high})
            axes.plot(ends, [min(peak, speed * x) for x in ends], style, color="black", linewidth=1, label=name)
        axes.annotate(f"{dtype}, threads {roof.threads}", (high, peak), ha="right", va="bottom", fontsize="x-small")
