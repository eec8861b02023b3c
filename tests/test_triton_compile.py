"""The Triton kernels compiled for every supported GPU, none needed: shared memory, spills, tensor cores, FMAs."""

import os
import re
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from tolerance import DTYPES

pytest.importorskip("triton", reason="the triton package is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dsconv_ext import triton_ops
from dsconv_ext.geometry import output_size

pytestmark = pytest.mark.skipif(triton_ops.INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")

KB = 1024
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64, "gfx1100": 64}
GEOMETRY = ([1, 1], [1, 1, 1, 1], [1, 1])
LAYOUTS = {1: torch.channels_last, 0: torch.contiguous_format}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TENSOR_CORES = re.compile(r"\bmma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_|v_wmma_")


@dataclass
class Driver:
    """What the launcher asks of a driver, for a GPU that is not there."""

    target: GPUTarget

    @property
    def utils(self) -> SimpleNamespace:
        return SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED[self.target.arch] * KB})

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device=None) -> int:
        return 0


def pretend(monkeypatch, arch) -> None:
    """Make ``arch`` the GPU of this machine."""
    hip = isinstance(arch, str)
    monkeypatch.setattr(
        driver, "_active", Driver(GPUTarget("hip" if hip else "cuda", arch, 64 if arch == "gfx942" else 32))
    )
    major, minor = (0, 0) if hip else divmod(arch, 10)
    properties = SimpleNamespace(major=major, minor=minor, gcnArchName=f"{arch}:xnack-", multi_processor_count=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)


def compiled(monkeypatch, arch, op, *args):
    """The kernel that a call of a Triton operator launches on ``arch``."""
    kernels = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: kernels.append(self.kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setattr(triton_ops, "wrap_triton", Recorder)
    pretend(monkeypatch, arch)
    op._init_fn(*args)
    (kernel,) = kernels
    return kernel


def assembly(kernel) -> str:
    return kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]


def multiplications(kernel) -> int:
    """Single-precision multiplications and additions of a thread, counted in the PTX."""
    ptx = kernel.asm["ptx"]
    return len(re.findall(r"\bfma\.rn\.f32\b", ptx)) + 2 * len(re.findall(r"\bfma\.rn\.f32x2\b", ptx))


def spilled_bytes(kernel, tmp_path) -> int:
    if "ptx" not in kernel.asm:
        found = re.findall(
            r"\.(?:vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly(kernel)
        )
        assert len(found) == 3
        return sum(map(int, found))
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    done = subprocess.run([CUOBJDUMP, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    found = re.findall(r"\b(?:STACK|LOCAL):(\d+)", done.stdout)
    assert len(found) == 2, done.stdout
    return sum(map(int, found))


def check_resources(kernel, arch, tmp_path) -> None:
    assert kernel.metadata.shared <= SHARED[arch] * KB
    assert spilled_bytes(kernel, tmp_path) == 0


def empty(*shape, dtype, axis=0):
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=LAYOUTS[axis]) if len(shape) == 4 else t


def problem(axis, dtype, taps=3):
    x, weight = empty(2, 64, 28, 28, dtype=dtype, axis=axis), empty(64, 1, taps, taps, dtype=dtype)
    return x, weight, empty(64, dtype=dtype)


def everything(tiles, usual):
    """(arch, dtype, axis, tile): all of them, those of `usual` by default, the rest slow."""
    for arch in SHARED:
        for name in ("fp32", "fp16", "bf16"):
            for axis, choices in tiles.items():
                for index, tile in enumerate(choices):
                    marks = [] if (arch, name, axis, index) in usual else [pytest.mark.slow]
                    label = f"{arch}-{name}-{('nchw', 'nhwc')[axis]}-{'x'.join(map(str, tile))}"
                    yield pytest.param(arch, DTYPES[name], axis, tile, id=label, marks=marks)


DEPTHWISE = {(75, "fp16", 1, 0), (80, "fp32", 1, 1), (90, "bf16", 0, 0), (120, "fp32", 0, 3), ("gfx942", "fp16", 1, 0)}
FUSED = {(80, "fp16", 1, 1), (89, "bf16", 0, 3), (90, "fp32", 1, 2), (100, "fp16", 1, 3), ("gfx1100", "bf16", 1, 0)}


@pytest.mark.parametrize(("arch", "dtype", "axis", "tile"), list(everything(triton_ops.DEPTHWISE_TILES, DEPTHWISE)))
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
def test_depthwise(monkeypatch, tmp_path, arch, dtype, axis, tile, transposed):
    """Three taps of a row are unrolled: each value of the tile meets each of them once."""
    monkeypatch.setitem(triton_ops.DEPTHWISE_TILES, axis, (tile,))
    x, weight, bias = problem(axis, dtype)
    if transposed:
        kernel = compiled(monkeypatch, arch, triton_ops.input_gradient, x, x, weight, *GEOMETRY)
    else:
        kernel = compiled(monkeypatch, arch, triton_ops.depthwise, x, weight, bias, *GEOMETRY, "relu6", 0.0)
    check_resources(kernel, arch, tmp_path)
    if "ptx" in kernel.asm:
        assert multiplications(kernel) == 3 * tile.positions * tile.channels // (32 * tile.warps)


@pytest.mark.parametrize(
    ("arch", "dtype", "axis", "tile"), list(everything(triton_ops.WEIGHT_GRADIENT_TILES, DEPTHWISE))
)
def test_weight_gradient(monkeypatch, tmp_path, arch, dtype, axis, tile):
    """Each gradient of the tile meets each column of the block once."""
    monkeypatch.setitem(triton_ops.WEIGHT_GRADIENT_TILES, axis, (tile,))
    x, weight, _ = problem(axis, dtype)
    kernel = compiled(monkeypatch, arch, triton_ops.weight_gradient, x, x, weight, *GEOMETRY, True, True)
    check_resources(kernel, arch, tmp_path)
    if "ptx" in kernel.asm:
        assert multiplications(kernel) == 4 * tile.positions * tile.channels // (32 * tile.warps)


@pytest.mark.parametrize(
    ("arch", "dtype", "axis", "tile"),
    list(everything(dict.fromkeys((1, 0), triton_ops.FUSED_TILES), FUSED)),
)
def test_fused(monkeypatch, tmp_path, arch, dtype, axis, tile):
    """Where a fused tile is chosen, the product runs on tensor cores and no warp repeats depthwise work of another."""
    pretend(monkeypatch, arch)
    target = triton_ops.target_of.__wrapped__(torch.device("cuda", 0))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    chosen = triton_ops.fused_tile(target, dtype, 10**6, tile.outputs, "auto")
    if isinstance(chosen, str):
        assert arch == 75 or (isinstance(arch, str) and dtype is torch.float32), chosen
        return
    assert chosen == (tile if isinstance(arch, int) else tile._replace(registers=0))
    x, weight, bias = problem(axis, dtype)
    pointwise = empty(tile.outputs, 64, 1, 1, dtype=dtype)
    tensors = (x, weight, pointwise, bias, empty(tile.outputs, dtype=dtype), None)
    kernel = compiled(monkeypatch, arch, triton_ops.fused, *tensors, *GEOMETRY, *("relu6", 0.0) * 2, chosen)
    check_resources(kernel, arch, tmp_path)
    assert kernel.metadata.shared <= triton_ops.shared_bytes(tile, dtype.itemsize) + 64
    assert TENSOR_CORES.search(assembly(kernel))
    if "ptx" in kernel.asm:
        assert multiplications(kernel) == 3 * tile.positions * tile.channels // (32 * tile.warps)


@pytest.mark.parametrize(
    ("arch", "options", "reason"),
    [
        (80, {"outputs": 257}, "257 outputs do not fit one program: 256 at most"),
        (80, {"fuse": "never"}, "fuse='never'"),
        (80, {"positions": 64 * 99}, "99 programs would leave some of 100 processors idle"),
        (80, {"dtype": torch.float64}, "float64 has no fused kernel"),
        (80, {"dtype": torch.float32}, "float32 is fused in TF32 only"),
        (75, {}, "tl.dot uses no tensor cores on sm_75"),
        ("gfx1030", {}, "tl.dot uses no tensor cores on gfx1030"),
        (86, {"tiles": (triton_ops.Tile(256, 32, 8, 256, 255),)}, "needs more than sm_86 has"),
        (80, {"tiles": (triton_ops.Tile(64, 32, 4, 256, 128),)}, "needs more than sm_80 has"),
    ],
)
def test_why_nothing_is_fused(monkeypatch, arch, options, reason):
    """`explain` repeats the reason; the last two tiles need too much shared memory, and too many registers."""
    monkeypatch.setitem(SHARED, "gfx1030", 64)
    pretend(monkeypatch, arch)
    monkeypatch.setattr(triton_ops, "FUSED_TILES", options.pop("tiles", triton_ops.FUSED_TILES))
    wanted = {"dtype": torch.float16, "positions": 10**6, "outputs": 64, "fuse": "auto", **options}
    target = triton_ops.target_of.__wrapped__(torch.device("cuda", 0))
    assert reason in triton_ops.fused_tile(target, **wanted)


@pytest.mark.parametrize("taps", [1, 7, pytest.param(31, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_taps_strides_and_activations(monkeypatch, tmp_path, dtype, taps):
    """Nothing spills with many taps, a stride, 64-bit offsets or a long activation."""
    monkeypatch.setattr(triton_ops, "INT32_LIMIT", 0)
    x, weight, bias = problem(1, dtype, taps)
    where = [2, 1], [taps, 0, 1, taps], [1, 2] if taps < 9 else [1, 1]
    x = empty(2, 64, 64, 64, dtype=dtype, axis=1)
    spatial = output_size(x.shape[2:], weight.shape[2:], *where)
    grad = empty(2, 64, *spatial, dtype=dtype, axis=1)
    for op, args in (
        (triton_ops.depthwise, (x, weight, bias, *where, "gelu_tanh", 0.0)),
        (triton_ops.input_gradient, (grad, x, weight, *where)),
        (triton_ops.weight_gradient, (grad, x, weight, *where, True, False)),
    ):
        check_resources(compiled(monkeypatch, 80, op, *args), 80, tmp_path)
