"""Depthwise-separable convolution, forward and backward, by both judges: as chosen, and through every row."""

import pytest

from cases import Case, sample
from judges import check_accuracy, check_exact
from row_tests import check_row, row_parameters

ROW_CASES = [*sample("sep", 6, seed=2), Case.parse("sep n2c19h7w7k3s1d1p1o12 nchw fp32 mid=relu6 act=relu")]
# Outputs that fill half a vector of a panel, one, one and a half or nearly two (csrc/cpu/gemm.h), alone and after a
# whole panel, in blocks of 8, 4, 2 and 1 rows. The number of channels is odd: bfloat16 is multiplied in pairs of them.
PARTIAL = [
    f"sep n1c9h5w3k3s1d1p1o{outputs} nhwc {dtype} mid=relu6 act=relu res fuse={fuse}"
    for dtype, vector in (("fp32", 16), ("fp64", 8), ("bf16", 16), ("fp16", 16))
    for outputs in (vector // 2 - 1, vector - 1, vector + vector // 2, 2 * vector - 1, 2 * vector + 3, 3 * vector + 3)
    for fuse in ("always", "never")
]
# Depthwise values of a tile by strips (csrc/cpu/pointwise_gemm.h): a whole map, tiles of it, a stride, too few rows,
# columns that are too few in each phase.
STRIPS = [
    f"sep n2c40h{size}k3{window}o24 nhwc {dtype} mid=relu6 act=relu fuse=always"
    for size, window in (
        ("14w14", "s1d1p1"),
        ("30w31", "s1d1p1"),
        ("20w19", "s2d1p1"),
        ("3w60", "s1d1p1"),
        ("9w8", "s1d1x3p1x3"),
        ("9w40", "s1d1x2p1x2"),
    )
    for dtype in ("fp32", "bf16")
]


@pytest.mark.cases("sep", 24, 300)
def test_integers_are_exact(case):
    check_exact(case)


@pytest.mark.cases("sep", 24, 300)
def test_accuracy(case):
    check_accuracy(case)


@pytest.mark.parametrize("line", PARTIAL)
def test_outputs_that_fill_a_part_of_a_panel(line):
    check_exact(Case.parse(line))


@pytest.mark.parametrize("line", STRIPS)
def test_depthwise_values_by_strips(line):
    check_exact(Case.parse(line))
    check_accuracy(Case.parse(line))


@pytest.mark.parametrize("row", row_parameters())
def test_every_row(row, library):
    check_row(row, ROW_CASES)
