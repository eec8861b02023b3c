"""Interleaved timing: rounds of short samples of every candidate in random order, preempted samples dropped."""

from __future__ import annotations

import platform
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import dsconv_ext


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: median and the 20th and 80th percentile of the samples that were kept."""

    median: float
    p20: float
    p80: float
    samples: int


def interleave(
    candidates: dict[str, Callable[[], object]], *, rounds: int = 40, sample_seconds: float = 0.002, seed: int = 0
) -> dict[str, Timing]:
    """Time every candidate in one run.

    Parameters
    ----------
    candidates : dict
        Functions of no arguments by name.
    rounds : int
        Samples of each candidate.
    sample_seconds : float
        Length of one sample: the calls of a sample are as many as fit, at least one.
    seed : int
        Of the random order within a round.

    Returns
    -------
    dict of Timing
        A sample in which the process was preempted (ru_nivcsw) is dropped, unless fewer than three are left.
    """
    calls = {}
    for name, candidate in candidates.items():
        for _ in range(3):
            candidate()
        calls[name] = max(1, int(sample_seconds / min(_sample(candidate, 1)[0] for _ in range(3))))
    order = random.Random(seed)
    samples: dict[str, list[tuple[float, int]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in order.sample(list(candidates), len(candidates)):
            candidates[name]()  # warm, whatever ran before
            samples[name].append(_sample(candidates[name], calls[name]))
    return {name: _summary(taken) for name, taken in samples.items()}


def _sample(candidate: Callable[[], object], calls: int) -> tuple[float, int]:
    """Seconds per call and how often the process was preempted meanwhile."""
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter()
    for _ in range(calls):
        candidate()
    seconds = (time.perf_counter() - start) / calls
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches


def _summary(samples: list[tuple[float, int]]) -> Timing:
    clean = sorted(seconds * 1e6 for seconds, switches in samples if not switches)
    kept = clean if len(clean) >= 3 else sorted(seconds * 1e6 for seconds, _ in samples)
    p20, p80 = kept[len(kept) // 5], kept[-1 - len(kept) // 5]
    return Timing(statistics.median(kept), p20, p80, len(kept))


def machine() -> str:
    """One line on where a run was made."""
    cpu = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, dsconv_ext {dsconv_ext.__version__}"
