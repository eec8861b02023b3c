"""Every row of the kernel table is a test: it is forced, both judges look at it, and explain says that it ran."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import choices
from cases import Case
from judges import check

ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")


def row_parameters(*passes: str) -> list:
    """The CPU rows of ``passes`` (all without) as test parameters; what cannot run here is skipped with its reason."""
    allowed = json.loads(torch.ops.dsconv.build_info()).get("cpu_isa_used", "portable")
    parameters = []
    for row in choices.rows(*passes):
        missing = ISAS.index(row["target"]) > ISAS.index(allowed)
        reason = f"{row['target']}: not on this processor, or not allowed by DSCONV_CPU_ISA"
        skip = [pytest.mark.skip(reason=reason)] if missing else []
        parameters.append(pytest.param(row, id=row["name"], marks=skip))
    return parameters or ["no library"]


def check_row(row: dict, problems: list[Case]) -> None:
    """Force ``row`` on every problem; where it did not run it must say why, and somewhere it must run."""
    name, fuse = row["name"], "always" if row["pass"] == "separable_fwd" else "never"
    ran = 0
    for case in problems:
        case = replace(case, fuse=fuse if case.op == "sep" else case.fuse)
        with choices.forced(name), choices.recorded() as made:
            check(case)
        if name in choices.chosen(made):
            ran += 1
        else:
            assert all(choices.refusals(made, name)), f"{case}\n  {name} was forced and could run, yet another row did"
    assert ran > 0, f"{name} ran on none of {len(problems)} problems"
