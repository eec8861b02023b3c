"""Interleaved timing: rounds of short samples of every candidate in random order, preempted samples dropped."""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

import dsconv_ext
from dsconv_ext import _loader

Sample = tuple[float, int]  # seconds per call; how often the process was preempted meanwhile
Function = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

SAMPLES_PER_VISIT = 2
WARM_UP = 6  # calls before the first sample
LONG = 0.1  # seconds: a call that takes longer needs no warm-up, and is sampled once per visit
ENOUGH_SAMPLES = 3
PATIENCE = 3


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: median, 20th and 80th percentile of the samples that were kept."""

    median: float
    p20: float
    p80: float
    samples: int
    dropped: int  # preempted samples that were left out
    clean: bool  # False: too few samples were not preempted, so the fastest half was kept


class Sampler:
    """Takes samples of a function in this process.

    Parameters
    ----------
    function : callable
        Of no arguments.
    seconds : float
        Length of one warm sample: the calls of a sample are as many as fit, at least one.
    cold : bool
        Time single calls, each after a walk over more memory than the last-level cache holds.
    """

    def __init__(self, function: Function, seconds: float = 0.003, cold: bool = False) -> None:
        self.function = function
        self.memory = torch.ones(2 * last_level_cache() // 4) if cold else None
        estimates = [self._sample(1)[0]]
        while len(estimates) < WARM_UP and sum(estimates) < LONG:
            estimates.append(self._sample(1)[0])
        self.calls = 1 if cold else max(1, int(seconds / max(1e-9, min(estimates))))
        self.long = min(estimates) > LONG

    def __call__(self) -> list[Sample]:
        """The samples of one visit, after a call that warms up whatever another process ran before."""
        if self.long:
            return [self._sample(1)]
        self.function()
        return [self._sample(self.calls) for _ in range(SAMPLES_PER_VISIT)]

    def _sample(self, calls: int) -> Sample:
        if self.memory is not None:
            self.memory.sum()
        function = self.function
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds = (time.perf_counter() - start) / calls
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches


def interleave(
    candidates: Mapping[Key, Callable[[], list[Sample]]], *, rounds: int = 16, seed: int = 0
) -> dict[Key, list[Sample]]:
    """Visit every candidate once per round, in random order, and collect its samples.

    While over half of a candidate's samples were preempted, more rounds follow, up to `PATIENCE` times as many. A
    candidate that answers with no samples has failed: it is not asked again, and what it gave before is discarded.
    """
    order = random.Random(seed)
    samples: dict[Key, list[Sample]] = {key: [] for key in candidates}
    for done in range(PATIENCE * rounds):
        if done >= rounds and all(2 * len(undisturbed(taken)) >= len(taken) for taken in samples.values()):
            break
        for key in order.sample(list(samples), len(samples)):
            taken = candidates[key]()
            if taken:
                samples[key] += taken
            else:
                del samples[key]
    return samples


def undisturbed(samples: list[Sample]) -> list[float]:
    """The seconds of the samples in which the process was not preempted."""
    return [seconds for seconds, switches in samples if not switches]


def summary(samples: list[Sample]) -> Timing:
    """Drop the samples in which the process was preempted; if fewer than three are left, the slower half instead.

    Being preempted only ever costs time, so the faster samples are the less disturbed ones.
    """
    kept = undisturbed(samples)
    clean = len(kept) >= min(ENOUGH_SAMPLES, len(samples))
    if not clean:
        kept = sorted(seconds for seconds, _ in samples)[: max(ENOUGH_SAMPLES, len(samples) // 2)]
    kept = [seconds * 1e6 for seconds in kept]
    fifths = statistics.quantiles(kept, n=5, method="inclusive") if len(kept) > 1 else kept * 4
    return Timing(statistics.median(kept), fifths[0], fifths[3], len(kept), len(samples) - len(kept), clean)


def last_level_cache() -> int:
    """Bytes of the largest cache the system tells of; 64 MiB where it tells of none."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [file.read_text(encoding="utf-8").strip() for file in files]
    return max((int(text[:-1]) * units[text[-1]] for text in texts if text[-1] in units), default=64 * 2**20)


def surroundings(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Where and with what a run was made: the machine in one line, and the versions, of ``packages`` too."""
    versions = {
        "dsconv_ext": dsconv_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "dsconv_isa": _library_isa(),
    }
    return {"machine": _machine(), "versions": versions | {name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a module of another distribution
        return "unknown"


def _library_isa() -> str:
    """The instruction set the kernels use, or why there are none."""
    if _loader.error is not None:
        return f"none, {_loader.error}"
    return json.loads(torch.ops.dsconv.build_info())["cpu_isa_used"]


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    cache = f"{last_level_cache() / 2**20:.0f} MiB last-level cache"
    return f"{cpu}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {cache}, {platform.platform()}"
