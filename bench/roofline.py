"""The roofline of this machine, measured at the start of a run: ``python -m bench.roofline THREADS DTYPE[,DTYPE]``.

Peak FLOP/s per dtype is the fastest ``torch.mm`` of squares of `SIDES`, a multiply-add being two; half types take
float32's where that is more, for kernels that convert. Bandwidth is that of ``Tensor.copy_`` in float32, read plus
written bytes, per working set (source and target together) from 64 KiB to four times the last-level cache; the time of
copying one element, which is PyTorch's cost of the call, is taken off, but never more than half of the time. All of
them run in one process with the threads of the run, in turn and in random order, warm; the fastest sample counts,
preempted ones are dropped.

The bound of a problem is max(FLOP / peak, bytes / bandwidth) with the bytes that the pass must move as the working set,
between two measured sizes by logarithmic interpolation; a cold run takes the bandwidth of the largest. Neither the cost
of a call nor the activation is part of it. A fraction slightly above 1 means that a layer beat what was measured:
its kernel is better than ``torch.mm``, it reads more than it writes, or the machine was slower at the start.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import measure
from .problems import DTYPES

ROOT = Path(__file__).resolve().parent.parent
SIDES = (256, 512)
SMALLEST, LARGEST = 2**16, 2**30  # bytes of a working set; the largest for machines with very large caches
ROUNDS = 8
LIMIT = 300.0  # seconds


@dataclass(frozen=True)
class Roofline:
    """What a number of threads can do: GFLOP/s per dtype, and pairs of working set in bytes and GB/s, ascending."""

    threads: int
    peaks: dict[str, float]
    bandwidths: list[tuple[int, float]]

    def bandwidth(self, size: float, cold: bool = False) -> float:
        """GB/s of a working set of ``size`` bytes."""
        sizes = [measured for measured, _ in self.bandwidths]
        if cold or size >= sizes[-1]:
            return self.bandwidths[-1][1]
        above = next(index for index, measured in enumerate(sizes) if size <= measured)
        (a, slow), (b, fast) = self.bandwidths[max(0, above - 1)], self.bandwidths[above]
        part = math.log(size / a) / math.log(b / a) if b > a else 1.0
        return slow ** (1 - part) * fast**part

    def bound(self, flops: float, size: float, dtype: str, cold: bool = False) -> float:
        """Microseconds that work of ``flops`` on ``size`` bytes takes at least."""
        return max(flops / self.peaks[dtype], size / self.bandwidth(size, cold)) * 1e-3


def measured(threads: int, dtypes: Sequence[str]) -> Roofline:
    """The roofline, from a process of its own."""
    command = [sys.executable, "-m", "bench.roofline", str(threads), ",".join(dtypes)]
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=LIMIT, check=True)
    return load(json.loads(done.stdout))


def load(saved: dict) -> Roofline:
    """A roofline from the JSON of a run."""
    return Roofline(saved["threads"], saved["peaks"], [(size, speed) for size, speed in saved["bandwidths"]])


def measure_here(dtypes: Sequence[str], largest: int | None = None, rounds: int = ROUNDS) -> Roofline:
    """The roofline with the threads that PyTorch has in this process."""
    largest = largest or max(2 * SMALLEST, min(4 * measure.last_level_cache(), LARGEST))
    sizes = [SMALLEST << n for n in range((largest // SMALLEST).bit_length())]
    products = [(name, side) for name in dict.fromkeys(["fp32", *dtypes]) for side in SIDES]
    functions = {("copy", 4): _copy(1)}  # one element
    functions |= {("copy", size): _copy(size // 8) for size in sizes}
    functions |= {(name, side): _product(name, side) for name, side in products}
    samplers = {key: measure.Sampler(function) for key, function in functions.items()}
    best = {key: _fastest(samples) for key, samples in measure.interleave(samplers, rounds=rounds).items()}
    bandwidths = [(size, _bandwidth(size, best["copy", size], best["copy", 4])) for size in sizes]
    peaks = {name: max(2 * side**3 / best[name, side] for side in SIDES) * 1e-9 for name, _ in products}
    peaks |= {name: max(peaks[name], peaks["fp32"]) for name in peaks if name in ("bf16", "fp16")}
    return Roofline(torch.get_num_threads(), peaks, bandwidths)


def _bandwidth(size: int, seconds: float, call: float) -> float:
    """GB/s; a call that took as long as the copy was disturbed, and says nothing about the copy."""
    return size / max(seconds - call, seconds / 2) * 1e-9


def _copy(elements: int) -> measure.Function:
    source, target = torch.ones(elements), torch.zeros(elements)
    return lambda: target.copy_(source)


def _product(dtype: str, side: int) -> measure.Function:
    a, b, c = (torch.ones(side, side, dtype=DTYPES[dtype]) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def _fastest(samples: list[measure.Sample]) -> float:
    return min(measure.undisturbed(samples) or [seconds for seconds, _ in samples])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(asdict(measure_here(sys.argv[2].split(",")))))
