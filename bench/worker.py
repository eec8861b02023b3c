"""One provider in one process: ``python -m bench.worker PROVIDER THREADS DESCRIPTOR``, started by runner.py.

Requests and answers travel over the connection with that file descriptor. A request is ``(function, *arguments)`` with
a function of `REQUESTS`, an answer ``(True, result)`` or ``(False, error message)``. No request depends on an earlier
one, so a worker that had to be killed can be replaced by a fresh one at any time.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from . import problems, providers
from .measure import Sample, Sampler


@functools.lru_cache(maxsize=len(problems.LAYOUTS))  # what is compared side by side stays prepared
def prepare(provider: str, line: str, pass_name: str) -> providers.Work:
    """The work of a problem string and a pass, on tensors in the layout of the string."""
    case = problems.Case.parse(line)
    given, g = problems.tensors(case)
    travelling = ("x", "residual")
    given = {name: problems.arrange(t, case.layout) if name in travelling else t for name, t in given.items()}
    return providers.find(provider).build(case, pass_name, given, problems.arrange(g, case.layout))


@functools.lru_cache(maxsize=len(problems.LAYOUTS))
def sampler(provider: str, line: str, pass_name: str, seconds: float, cold: bool) -> Sampler:
    return Sampler(prepare(provider, line, pass_name), seconds, cold)


def answer(provider: str, line: str, pass_name: str) -> dict[str, tuple[list[int], list[float]]]:
    """What the provider computes, at random points."""
    values = [value.detach() for value in prepare(provider, line, pass_name)() if value is not None]
    names = problems.results(problems.Case.parse(line), pass_name)
    return {name: problems.points(name, value) for name, value in zip(names, values, strict=True)}


def sample(provider: str, line: str, pass_name: str, seconds: float, cold: bool) -> list[Sample]:
    """The samples of one visit."""
    return sampler(provider, line, pass_name, seconds, cold)()


REQUESTS: dict[str, Callable[..., Any]] = {"answer": answer, "sample": sample}


def main(provider: str, threads: str, descriptor: str) -> None:
    torch.set_num_threads(int(threads))
    connection = Connection(int(descriptor))
    connection.send("ready")
    while True:
        try:
            name, line, pass_name, *arguments = connection.recv()
        except EOFError:  # the end of the run
            return
        try:
            with torch.set_grad_enabled(pass_name == "step"):
                result = REQUESTS[name](provider, line, pass_name, *arguments)
            connection.send((True, result))
        except Exception as error:  # whatever a provider raises is its answer
            connection.send((False, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"))


if __name__ == "__main__":
    main(*sys.argv[1:])
