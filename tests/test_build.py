"""The build from a clean copy: without CUDA, with CUDA, and the sentence where PyTorch is missing."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import test_library
from conftest import ROOT
from dsconv_ext import _build

pytestmark = pytest.mark.slow
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "csrc", "dsconv_ext")
REPORT = """
import json, dsconv_ext, torch
from dsconv_ext import _loader
x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 1, 3, 3)
y = dsconv_ext.functional.depthwise_conv2d(x, weight)
print(json.dumps({
    "file": dsconv_ext.__file__,
    "error": _loader.error,
    "targets": sorted({row["target"] for row in json.loads(torch.ops.dsconv.kernels())}),
    "right": torch.allclose(y, torch.nn.functional.conv2d(x, weight, groups=8), atol=1e-5),
    **json.loads(torch.ops.dsconv.build_info()),
}))
"""


@pytest.fixture
def clean_copy(tmp_path):
    """What the build reads, without anything built."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run(*command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DSCONV_BACKEND")}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, timeout=1800)


def built(folder: Path, python, **environment: str) -> dict:
    """Build in ``folder`` and return what the library says of itself in a fresh interpreter."""
    done = run("setup.py", "--quiet", "build_ext", "--inplace", cwd=folder, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout + done.stderr, done.stdout + done.stderr
    report = json.loads(python(REPORT, PYTHONPATH=str(folder)))
    assert report["error"] is None and report["right"]
    assert Path(report["file"]).parent == folder / "dsconv_ext"
    return report


def check_library(folder: Path) -> None:
    library = folder / "dsconv_ext" / "_C.abi3.so"
    test_library.test_what_it_needs(library)
    test_library.test_undefined_symbols(library)
    test_library.test_exported_symbols(library)


def test_without_cuda(clean_copy, python):
    report = built(clean_copy, python, DSCONV_CUDA="0")
    assert report["cuda_compiled"] is False and report["cuda_archs"] == []
    assert "cuda" not in report["targets"] and "portable" in report["targets"]
    check_library(clean_copy)


def test_with_cuda(clean_copy, python, monkeypatch):
    """For one architecture; the library then loads without a GPU and beside a PyTorch without CUDA."""
    monkeypatch.delenv("DSCONV_CUDA", raising=False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if _build.find_cuda() is None:
        pytest.skip("nvcc was not found")
    report = built(clean_copy, python, DSCONV_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0")
    assert report["cuda_compiled"] is True and report["cuda_archs"] == ["80"]
    assert {"cuda", "portable"} <= set(report["targets"])
    check_library(clean_copy)


def test_cuda_is_demanded_but_missing(clean_copy):
    nowhere = {"CUDA_HOME": "", "CUDA_PATH": "", "PATH": "/"}
    done = run("setup.py", "--quiet", "build_ext", "--inplace", cwd=clean_copy, DSCONV_CUDA="1", **nowhere)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    sentence = "DSCONV_CUDA=1 needs nvcc: set CUDA_HOME to a CUDA toolkit or put its nvcc on PATH."
    assert done.stderr.splitlines()[-1] == sentence


def test_installing_without_torch_is_one_sentence(clean_copy):
    """In an environment of setuptools alone pip shows what to do, and no traceback."""
    venv = clean_copy / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    import setuptools

    for package in ("setuptools", "_distutils_hack"):
        (site / package).symlink_to(Path(setuptools.__file__).parent.with_name(package))
    pip = ("-m", "pip", "--python", str(venv / "bin" / "python"))
    done = run(*pip, "install", "--no-build-isolation", "--no-deps", "--no-index", str(clean_copy), cwd=clean_copy)
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in printed, printed
    assert "[1 lines of output]" in printed, printed
    sentence = "dsconv_ext is compiled against an installed PyTorch, and here is none: install torch >= "
    assert printed.count(sentence) == 1 and "then run `pip install --no-build-isolation .`." in printed
