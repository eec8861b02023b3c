"""The same bits from run to run, from one thread and from two, and from two host threads at once."""

import threading

import pytest
import torch

from cases import Case
from dsconv_ext import nn
from judges import evaluate, subject

LINES = (
    "dw n2c37h33w31k3s1d1p1 nhwc fp32 act=silu",
    "dw n3c24h17w19k5s2d1p2 nchw bf16 act=relu6",
    "dw n1c96w257k31s1d1p15 nchw fp32",
    "dw n1c17t7h9w8k3s1d1p1m2 nhwc fp64",
    "dw n1c512w300k15s1d1p7 nhwc fp32",
    "dw n2c512w101k4s1d1p3:0 nhwc fp32",
    "dw n1c700h40w40k3s1d6p6 nhwc fp32",
    "sep n1c64h7w7k3s1d1p1o512 nhwc fp32 mid=relu fuse=always",
    "sep n1c64h7w7k3s1d1p1o500 nhwc fp32 mid=relu act=silu",
    "sep n1c64h7w7k3s1d1p1o512 nhwc bf16 mid=relu fuse=never",
    "sep n2c37h33w31k3s1d1p1o24 nhwc fp32 mid=relu6 act=silu res",
    "sep n2c96h15w15k3s2d1p1o37 nchw bf16 mid=hardswish act=relu",
    "sep n1c16h65w65k3s1d1p1o96 nhwc fp32 mid=relu6 fuse=always",
    "sep n1c16h65w65k3s1d1p1o96 nchw fp32 mid=relu6 fuse=never",
    "sep n2c24w300k5s1d2p4o17 nhwc fp16 mid=gelu",
)


def bits(line: str) -> list[torch.Tensor]:
    case = Case.parse(line)
    result = evaluate(subject, case, case.inputs(integer=False), lambda y: case.upstream(y, integer=False))
    return [value.contiguous() for _, value in result.items()]


def assert_same_bits(first, second, line):
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a, b), f"{line}\n  result {i} differs by {(a - b).abs().max().item()}"


@pytest.mark.parametrize("line", LINES)
def test_run_to_run(line):
    first = bits(line)
    for _ in range(3):
        assert_same_bits(first, bits(line), line)


@pytest.mark.parametrize("line", LINES)
def test_any_number_of_threads(line, threads, library):
    threads(1)
    one = bits(line)
    for count in (2, 3, 5):
        threads(count)
        assert_same_bits(one, bits(line), f"{line} with {count} threads")


def in_two_host_threads(check, count: int) -> None:
    """Call ``check(i)`` for each of ``count`` numbers several times, from two threads in opposite order."""
    failures: list[str] = []
    start = threading.Barrier(2)

    def work(order):
        start.wait()
        for _ in range(4):
            for i in order:
                try:
                    check(i)
                except Exception as failure:  # a thread's failure would otherwise be lost
                    failures.append(f"{type(failure).__name__}: {failure}")

    workers = [threading.Thread(target=work, args=(order,)) for order in (range(count), range(count - 1, -1, -1))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_two_host_threads():
    """Concurrent calls share nothing: each gets the bits it gets alone."""
    alone = [bits(line) for line in LINES]
    in_two_host_threads(lambda i: assert_same_bits(alone[i], bits(LINES[i]), LINES[i]), len(LINES))


def test_two_host_threads_share_a_module():
    """Each packs the weights, uses those the other packed, or drops them by a forward in grad mode."""
    torch.manual_seed(0)
    module = nn.DepthwiseSeparableConv2d(24, 40, 3, padding=1, mid_activation="relu6").eval()
    inputs = [torch.randn(1, 24, size, size) for size in (5, 9, 14, 20)]

    def output(i):
        with torch.set_grad_enabled(i % 2 == 1):
            return module(inputs[i])

    alone = [output(i).detach() for i in range(len(inputs))]

    def check(i):
        assert torch.equal(output(i), alone[i]), f"input {i}"

    in_two_host_threads(check, len(inputs))


def test_a_batch_does_not_change_its_members(library):
    """The first image of a batch gets the bits it gets alone."""
    case = Case.parse("sep n3c37h13w11k3s1d1p1o24 nhwc fp32 mid=relu6 act=silu fuse=always")
    tensors = case.inputs(integer=False)
    together = subject(case, tensors)
    assert torch.equal(subject(case, {**tensors, "x": tensors["x"][:1]}), together[:1])


def test_inside_the_deterministic_mode_of_pytorch():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for line in LINES:
            assert all(bool(value.isfinite().all()) for value in bits(line)), line
    finally:
        torch.use_deterministic_algorithms(before)
