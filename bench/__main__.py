"""Command line: ``python -m bench overhead``."""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F

import dsconv_ext.functional
import dsconv_ext.nn

from .measure import interleave, machine


def overhead(rounds: int) -> list[dict[str, object]]:
    """Time calls on a map so small that only their fixed cost counts, against F.conv2d on channels_last.

    Returns
    -------
    list of dict
        One per grad mode and form of the call: microseconds per call (median, p20, p80) and the ratio to F.conv2d.
    """
    torch.set_num_threads(1)
    channels = 16
    conv = torch.nn.Conv2d(channels, channels, 3, padding=1, groups=channels).eval()
    module = dsconv_ext.nn.DepthwiseConv2d.from_conv(conv)
    x = torch.randn(1, channels, 3, 3).to(memory_format=torch.channels_last)
    weight, bias = conv.weight, conv.bias
    candidates = {
        "F.conv2d": lambda: F.conv2d(x, weight, bias, 1, 1, 1, channels),
        "functional.depthwise_conv2d": lambda: dsconv_ext.functional.depthwise_conv2d(x, weight, bias, 1, 1, 1),
        "nn.DepthwiseConv2d": lambda: module(x),
    }
    rows = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            timings = interleave(candidates, rounds=rounds)
        for name, timing in timings.items():
            ratio = timing.median / timings["F.conv2d"].median
            rows.append({"mode": mode.__name__, "call": name, **vars(timing), "ratio": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("overhead", help="fixed cost of a call, against F.conv2d")
    command.add_argument("--rounds", type=int, default=40)
    command.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    rows = overhead(arguments.rounds)
    print(machine())
    print(f"{'mode':16s}{'call':30s}{'us':>8s}{'p20':>8s}{'p80':>8s}{'ratio':>8s}")
    for row in rows:
        numbers = "".join(f"{row[key]:8.2f}" for key in ("median", "p20", "p80", "ratio"))
        print(f"{row['mode']:16s}{row['call']:30s}{numbers}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
