"""Options and fixtures of the suite.

``pytest tests/test_depthwise.py --case "dw n2c37h13w11k3s2d1p1 nhwc bf16 act=relu6"`` runs one problem.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cases
import dsconv_ext
from dsconv_ext import _loader

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(dsconv_ext.__file__).parent

# An installed package is tested without the source tree (`make wheel-check`): these compile or read sources.
if not (ROOT / "csrc").exists():
    names = ("bench", "build", "choose", "core", "examples", "mma", "ptx", "ptxas", "simt", "simt_fused")
    collect_ignore = [f"test_{name}.py" for name in names]
M_PERTURB = -6  # glibc's mallopt
PERTURB_NAN = 0x100  # fills fresh memory with (value ^ 0xFF) & 0xFF = 0xFF bytes: NaN in every floating dtype


def pytest_addoption(parser):
    parser.addoption("--case", action="append", help="a problem string to run instead of the sampled ones; repeatable")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "cases(families, default, slow): run on fixed and `default` sampled problems; `slow` more if slow"
    )
    os.environ.setdefault("DSCONV_CPU_CACHE", "0")  # memory that it keeps is not filled with NaN
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(M_PERTURB, PERTURB_NAN)


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    families, default, slow = marker.args
    if lines := metafunc.config.getoption("case"):
        chosen = [case for case in map(cases.Case.parse, lines) if families.startswith(case.op)]
        metafunc.parametrize("case", chosen, ids=str)
        return
    usual = cases.sample(families, default)
    rest = [
        case for family in cases.FAMILIES if family.startswith(families) for case in cases.generate(family, slow, 1)
    ]
    more = [pytest.param(case, marks=pytest.mark.slow) for case in rest]
    metafunc.parametrize("case", [*usual, *more], ids=lambda case: str(case))


@pytest.fixture(scope="session")
def library() -> Path:
    """The path of the compiled library; a test that needs it fails without it, if it was to be used."""
    if _loader.forced == "torch":
        pytest.skip("DSCONV_BACKEND=torch: the compiled library is not used")
    assert _loader.error is None or _loader.forced == "triton", f"the compiled library is needed here: {_loader.error}"
    return PACKAGE / "_C.abi3.so"


@pytest.fixture
def python():
    """Run a program in a fresh interpreter with changed environment variables and return what it printed.

    The backend is the library unless ``DSCONV_BACKEND`` is among them.
    """

    def run(program: str, **environment: str) -> str:
        paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        env = {**os.environ, "PYTHONPATH": paths, "DSCONV_BACKEND": "", **environment}
        done = subprocess.run(
            [sys.executable, "-P", "-c", program], env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def threads():
    """Set the number of threads for one test: ``threads(1)``."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
