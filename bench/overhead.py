"""The fixed cost of a call: ``python -m bench overhead``."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import dsconv_ext.functional
import dsconv_ext.nn

from .measure import Sampler, interleave, summary

CHANNELS = 16


def overhead(rounds: int) -> list[dict[str, object]]:
    """Time calls on a map so small that only their fixed cost counts, against F.conv2d on channels_last.

    Returns
    -------
    list of dict
        One per grad mode and form of the call: microseconds per call (median, p20, p80) and the ratio to F.conv2d.
    """
    torch.set_num_threads(1)
    conv = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS).eval()
    module = dsconv_ext.nn.DepthwiseConv2d.from_conv(conv)
    x = torch.randn(1, CHANNELS, 3, 3).to(memory_format=torch.channels_last)
    weight, bias = conv.weight, conv.bias
    calls = {
        "F.conv2d": lambda: F.conv2d(x, weight, bias, 1, 1, 1, CHANNELS),
        "functional.depthwise_conv2d": lambda: dsconv_ext.functional.depthwise_conv2d(x, weight, bias, 1, 1, 1),
        "nn.DepthwiseConv2d": lambda: module(x),
    }
    rows = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            samples = interleave({name: Sampler(call) for name, call in calls.items()}, rounds=rounds)
        timings = {name: summary(taken) for name, taken in samples.items()}
        for name, timing in timings.items():
            ratio = timing.median / timings["F.conv2d"].median
            rows.append({"mode": mode.__name__, "call": name, **vars(timing), "ratio": ratio})
    return rows
