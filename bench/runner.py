"""A run: workers for every provider and number of threads, checked for correctness, then timed in turn."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from . import measure, problems, providers
from .problems import Case, Layer
from .roofline import Roofline

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 300.0  # seconds until a worker has imported torch, on a busy machine
Row = dict[str, Any]


class WorkerFailed(Exception):
    """A worker raised, died or did not answer in time; the message says which."""


class Worker:
    """A process of one provider, started when it is first asked and again after it had to be killed."""

    def __init__(self, provider: str, threads: int, limit: float) -> None:
        self.provider, self.threads, self.limit = provider, threads, limit
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection

    def ask(self, *request: Any) -> Any:
        """The answer to a request, or `WorkerFailed`."""
        if self.process is None:
            self._start()
        try:
            self.connection.send(request)
            done, result = self._receive(self.limit)
        except (EOFError, OSError):
            self.close()
            raise WorkerFailed("died") from None
        if not done:
            raise WorkerFailed(result)
        return result

    def close(self) -> None:
        """Kill the process: it holds nothing that is wanted later, and a hung one ends no other way."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.connection.close()
            self.process = None

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", "bench.worker", self.provider, str(self.threads), str(theirs.fileno())]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        environment = {**os.environ, **threads, "PYTHONPATH": path}
        with theirs:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
            )
        try:
            self._receive(START_LIMIT)
        except EOFError:
            self.close()
            raise WorkerFailed("did not start") from None

    def _receive(self, limit: float) -> Any:
        if not self.connection.poll(limit):
            self.close()
            raise WorkerFailed("no answer")
        return self.connection.recv()


@dataclass(frozen=True)
class Settings:
    """What is measured and how."""

    layers: list[Layer]
    passes: list[str]
    threads: list[int]
    providers: list[str]
    rounds: int = 16
    seconds: float = 0.003
    cold: bool = False
    limit: float = 60.0
    roofs: dict[int, Roofline] = field(default_factory=dict)  # per number of threads


@dataclass
class Candidate:
    """One provider in one layout, as it goes through a measurement."""

    provider: str
    case: Case
    worker: Worker
    baseline: bool
    settle: float
    status: str = "ok"
    error: float | None = None
    detail: str = ""
    timing: measure.Timing | None = None

    def ask(self, *request: Any) -> Any:
        """The worker's answer; None, and the reason in `status`, if there is none."""
        name, *arguments = request
        try:
            return self.worker.ask(name, str(self.case), *arguments)
        except WorkerFailed as failure:
            self.status = "no answer" if str(failure) == "no answer" else "failed"
            self.detail = str(failure)
            return None

    def check(self, pass_name: str) -> None:
        """Let it compute once, and compare with the truth."""
        answers = self.ask("answer", pass_name)
        if answers is not None:
            self.detail, self.error = problems.worst_error(self.case, pass_name, answers)
            if not self.error <= problems.limit(self.case, pass_name):
                self.status = "wrong"

    def visit(self, pass_name: str, seconds: float, cold: bool) -> list[measure.Sample]:
        samples = self.ask("sample", pass_name, seconds, cold) or []
        time.sleep(self.settle)
        return samples


def run(settings: Settings) -> Iterator[list[Row]]:
    """Measure everything: every layer with every number of threads in every pass.

    Yields
    ------
    list of dict
        The rows of one measurement: one per provider and layout. `ratio` is the time of the fastest baseline provider
        that is right, over the time of this one; `roof` the least time the roofline allows over it.
    """
    workers = {
        (provider, threads): Worker(provider, threads, settings.limit)
        for provider in settings.providers
        for threads in settings.threads
    }
    try:
        for layer in settings.layers:
            for threads in settings.threads:
                for pass_name in settings.passes:
                    chosen = candidates(layer, pass_name, threads, settings.providers, workers)
                    yield measurement(chosen, pass_name, settings)
    finally:
        for worker in workers.values():
            worker.close()


def candidates(
    layer: Layer, pass_name: str, threads: int, names: list[str], workers: dict[tuple[str, int], Worker]
) -> list[Candidate]:
    """The providers that take a layer and pass, each in the layouts it takes."""
    chosen = []
    for name in names:
        provider = providers.find(name)
        if provider.takes(layer.case, pass_name):
            for layout in (provider.layout,) if provider.layout else layer.layouts:
                case = replace(layer.case, layout=layout)
                chosen.append(Candidate(name, case, workers[name, threads], provider.baseline, provider.settle))
    return chosen


def measurement(chosen: list[Candidate], pass_name: str, settings: Settings) -> list[Row]:
    """Check every candidate, then time those that gave an answer, in turn."""
    for candidate in chosen:
        candidate.check(pass_name)
    visits = {
        index: functools.partial(candidate.visit, pass_name, settings.seconds, settings.cold)
        for index, candidate in enumerate(chosen)
        if candidate.status in ("ok", "wrong")
    }
    for index, samples in measure.interleave(visits, rounds=settings.rounds).items():
        chosen[index].timing = measure.summary(samples)
    best = min((c.timing.median for c in chosen if c.baseline and c.status == "ok" and c.timing), default=None)
    return [row(candidate, pass_name, settings, best) for candidate in chosen]


def row(candidate: Candidate, pass_name: str, settings: Settings, best: float | None) -> Row:
    """What is reported and saved of a candidate."""
    case, timing = candidate.case, candidate.timing
    given: Row = {
        "problem": str(case),
        "op": case.op,
        "pass": pass_name,
        "dtype": case.dtype_name,
        "layout": case.layout,
        "threads": candidate.worker.threads,
        "cache": "cold" if settings.cold else "warm",
        "provider": candidate.provider,
        "status": candidate.status,
        "detail": candidate.detail,
        "error": candidate.error,
        "ratio": None,
    }
    if timing is not None:
        given |= vars(timing)
        flops, traffic = problems.flops(case, pass_name), problems.traffic(case, pass_name)
        given |= {"gflops": flops / timing.median * 1e-3, "gbytes": traffic / timing.median * 1e-3, "roof": None}
        if roof := settings.roofs.get(candidate.worker.threads):
            given["roof"] = roof.bound(flops, traffic, case.dtype_name, settings.cold) / timing.median
        if best and candidate.status == "ok":
            given["ratio"] = best / timing.median
    return given
