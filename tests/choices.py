"""Reading and steering the choice of kernels through the library's own operators."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import dsconv_ext  # noqa: F401 (defines the operators)


def rows(*passes: str, target: str = "cpu") -> list[dict]:
    """The rows for ``target``, cpu or cuda, that belong to any of ``passes``; to any pass without ``passes``."""
    table = json.loads(torch.ops.dsconv.kernels())
    chosen = [row for row in table if not passes or row["pass"] in passes]
    return [row for row in chosen if (row["target"] == "cuda") == (target == "cuda")]


@contextmanager
def forced(*names: str) -> Iterator[None]:
    """Take the named rows wherever they can run."""
    torch.ops.dsconv.set_choices(",".join(names))
    try:
        yield
    finally:
        torch.ops.dsconv.set_choices("")


@contextmanager
def recorded() -> Iterator[list[dict]]:
    """Collect every choice made inside the block; the list is filled at its end."""
    choices: list[dict] = []
    torch.ops.dsconv.explain_begin()
    try:
        yield choices
    finally:
        choices.extend(json.loads(torch.ops.dsconv.explain_end()))


def chosen(choices: list[dict]) -> set[str]:
    """The names of the rows that ran; a separable convolution that is not fused takes two, joined by " + "."""
    return {name for choice in choices for name in choice["chosen"].split(" + ")}


def refusals(choices: list[dict], name: str) -> list[str | None]:
    """Why row ``name`` could not run, for each choice that considered it."""
    return [c["reason"] for choice in choices for c in choice["candidates"] if c["name"] == name]
