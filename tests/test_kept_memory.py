"""Memory of outputs (csrc/ops/kept_memory.h). Each test is a process of its own: the suite runs without keeping it."""

import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is kept under Linux alone")

BASE = """
import os

import torch
import dsconv_ext
from dsconv_ext import functional as F

CACHE_LINE, PAGE = 64, 4096
MEBI = 1 << 20
torch.set_grad_enabled(False)


def apply(channels, size=128, value=1):
    '''An output of `channels` / 16 MiB, and what all its elements are.'''
    x = torch.full((1, channels, size, size), float(value)).contiguous(memory_format=torch.channels_last)
    return F.depthwise_conv2d(x, torch.full((channels, 1, 1, 1), 3.0))


def span(y):
    return y.data_ptr(), y.data_ptr() + y.nbytes


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE
"""


@pytest.fixture
def run(python, library):
    def run(program, **environment):
        return python(BASE + program, DSCONV_CPU_CACHE="1", **environment)

    return run


def test_memory_of_a_freed_output_serves_the_next(run):
    run("""
for channels in (16, 20, 31, 32, 33, 100, 1024):
    y = apply(channels)
    first = y.data_ptr()
    del y
    for value in range(20):
        y = apply(channels, value=value)
        assert abs(y.data_ptr() - first) < PAGE and y.data_ptr() % CACHE_LINE == 0, channels
        assert (y == 3 * value).all(), channels
        del y
    dsconv_ext.empty_cache()
""")


def test_a_smaller_output_of_about_the_size_takes_it_too(run):
    run("""
y = apply(128)
first = y.data_ptr()
del y
y = apply(120)
assert abs(y.data_ptr() - first) < PAGE
z = apply(128)
assert abs(z.data_ptr() - first) > PAGE
del y, z
half = apply(64)
assert abs(half.data_ptr() - first) > PAGE
""")


def test_outputs_that_live_share_nothing(run):
    """Also views, arrays and tensors of other libraries keep their memory."""
    run("""
kept = []
for i in range(60):
    y = apply(16 + i % 7, value=i)
    kept.append([y, y[:, :3], y.numpy(), torch.from_dlpack(y), y.permute(0, 2, 3, 1)][i % 5])
    if i % 3 == 0:
        del kept[(7 * i) % len(kept)]
kept = [torch.as_tensor(y) for y in kept]
for y in kept:
    first = y.flatten()[0]
    assert (y == first).all() and first % 3 == 0
whole = [span(y) for y in kept if y.is_contiguous(memory_format=torch.channels_last)]
whole.sort()
assert len(whole) > 10
assert all(a[1] <= b[0] for a, b in zip(whole, whole[1:], strict=False))
""")


def test_gradients(run):
    run("""
x = torch.ones(2, 64, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
weight = torch.ones(64, 1, 1, 1).requires_grad_()
first = None
for value in range(1, 6):
    with torch.enable_grad():
        y = F.depthwise_conv2d(x, weight)
        given = torch.full_like(y, value)
        (grad,) = torch.autograd.grad(y, x, given)
    assert (grad == value).all() and (y == 1).all()
    assert [(b.data_ptr() - a.data_ptr()) % 1024 // CACHE_LINE for a, b in [(x, y), (given, grad)]] == [5, 5]
    blocks = {tensor.data_ptr() // (2 * MEBI) for tensor in (y, grad)}
    first = first or blocks
    assert len(blocks) == 2 and blocks == first
    del y, grad
""")


def test_small_outputs_and_a_cache_that_is_off_leave_it_to_pytorch(python, library):
    program = (
        BASE
        + """
small, large = apply(15, 32), apply(16, 32)  # 60 and 64 KiB
def resizes(y):
    try:
        y.untyped_storage().resize_(0)
    except RuntimeError as error:
        assert "not resizable" in str(error)
        return False
    return True
print(resizes(small), resizes(large))
"""
    )
    assert python(program, DSCONV_CPU_CACHE="1") == "True False\n"
    assert python(program, DSCONV_CPU_CACHE="0") == "True True\n"
    with pytest.raises(AssertionError, match="DSCONV_CPU_CACHE: got 'off', expected 0 or 1"):
        python(program, DSCONV_CPU_CACHE="off")


def test_empty_cache_gives_all_of_it_back(run):
    run(
        """
apply(16)
before = resident()
held = apply(1024, value=2)
del held
waiting = resident() - before
dsconv_ext.empty_cache()
after = resident() - before
assert waiting > 60 * MEBI, waiting
assert after < 8 * MEBI, after
assert (apply(1024) == 3).all()
""",
        MALLOC_TRIM_THRESHOLD_="0",
        MALLOC_MMAP_THRESHOLD_="65536",
    )


def test_the_system_may_take_what_waits_for_a_while(run):
    """Not at once: that interrupts other processors."""
    run("""
def lazily_freed():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("LazyFree"))


x = torch.ones(1, 16, 128, 128).contiguous(memory_format=torch.channels_last)
weight = torch.ones(16, 1, 1, 1)
apply(1024)
for i in range(256 + 64):
    assert i > 200 or lazily_freed() < 8 * MEBI
    F.depthwise_conv2d(x, weight)
assert lazily_freed() > 50 * MEBI
y = apply(1024, value=2)
assert lazily_freed() < 8 * MEBI
for i in range(256 + 64):
    F.depthwise_conv2d(x, weight)
assert (y == 6).all()
""")


def test_what_nothing_wants_for_long_is_unmapped(run):
    run(
        """
x = torch.ones(1, 16, 128, 128).contiguous(memory_format=torch.channels_last)
weight = torch.ones(16, 1, 1, 1)
apply(1024)
before = resident()
for i in range(1024 + 64):
    F.depthwise_conv2d(x, weight)
    if i == 900:
        assert resident() > before - 8 * MEBI
assert resident() < before - 50 * MEBI
""",
        MALLOC_TRIM_THRESHOLD_="0",
        MALLOC_MMAP_THRESHOLD_="65536",
    )


def test_what_waits_is_bounded_by_what_was_in_use(run):
    run(
        """
before = resident()
for channels in range(64, 1024, 32):  # 4 to 62 MiB, each larger than all before; together 990 MiB
    apply(channels)
assert resident() < before + 5.5 * 64 * MEBI, (resident() - before) / MEBI
""",
        MALLOC_TRIM_THRESHOLD_="0",
        MALLOC_MMAP_THRESHOLD_="65536",
    )


def test_threads(run):
    """Outputs made and freed by many threads at once, some of them freed by another one."""
    run("""
from concurrent.futures import ThreadPoolExecutor

torch.set_num_threads(1)
wrong = []

def work(seed):
    previous = None
    for i in range(60):
        value = seed * 100 + i
        y = apply(16 + (seed + i) % 5, value=value)
        if previous is not None and not (previous[0] == 3 * previous[1]).all():
            wrong.append(previous[1])
        previous = (y, value)
    return previous

with ThreadPoolExecutor(8) as pool:
    for y, value in pool.map(work, range(16)):
        assert (y == 3 * value).all()
assert not wrong
""")


def test_children_of_a_fork(run):
    """Also of one that happens while other threads hold the lock."""
    run("""
import threading

torch.set_num_threads(1)
y = apply(16, value=7)
stop = threading.Event()

def churn():
    while not stop.is_set():
        apply(16)

threads = [threading.Thread(target=churn) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        z = apply(16, value=5)
        os._exit(0 if (z == 15).all() and (y == 21).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
assert (y == 21).all()
""")


def test_copies_and_files(run):
    run("""
import copy
import io

y = apply(33, value=2)
file = io.BytesIO()
torch.save(y, file)
assert len(file.getvalue()) < y.nbytes + 64 * 1024
file.seek(0)
z = torch.load(file)
shared = apply(33, value=2).share_memory_()
for other in (z, copy.deepcopy(y), y.clone(), shared):
    assert torch.equal(other, y) and other.data_ptr() != y.data_ptr()
""")
