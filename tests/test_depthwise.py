"""Depthwise convolution, forward and backward, by both judges: as chosen, and through every row of the kernel table."""

import pytest

from cases import Case, sample
from judges import check_accuracy, check_exact
from row_tests import check_row, row_parameters

ROW_CASES = sample("dw", 4, seed=2)
# Columns of channels that crowd a cache (is_crowded in csrc/cpu/row_stage.h): rows that are copied, rows that are read
# by lines because of a stride, of dilation, or of a copy that would not fit, and outputs in chunks of an odd number of
# vectors.
CROWDED = (
    "dw n2c512h7w9k3s1d1p1 nhwc fp32 act=relu",
    "dw n1c1024h6w7k5s1d1p2 nhwc fp32 bias=dw",
    "dw n2c512h9w8k3s2d1p1 nhwc fp32 act=silu",
    "dw n1c512h9w11k3s1d2p2 nhwc fp32",
    "dw n1c512h3w170k3s1d1p1 nhwc fp32",
    "dw n1c256h7w9k3s2d1p1 nhwc fp64",
    "dw n1c8704h11w11k3s1d1p1 nhwc fp32",
)


@pytest.mark.cases("dw", 24, 300)
def test_integers_are_exact(case):
    check_exact(case)


@pytest.mark.cases("dw", 24, 300)
def test_accuracy(case):
    check_accuracy(case)


@pytest.mark.parametrize("row", row_parameters("depthwise_fwd", "depthwise_dgrad", "depthwise_wgrad"))
def test_every_row(row, library):
    check_row(row, ROW_CASES)


@pytest.mark.parametrize("line", CROWDED)
def test_crowded_columns(line):
    check_exact(Case.parse(line))
