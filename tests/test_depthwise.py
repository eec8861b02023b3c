"""Depthwise convolution, forward and backward, by both judges: as chosen, and through every row of the kernel table."""

import pytest

from cases import sample
from judges import check_accuracy, check_exact
from row_tests import check_row, row_parameters

ROW_CASES = sample("dw", 4, seed=2)


@pytest.mark.cases("dw", 24, 300)
def test_integers_are_exact(case):
    check_exact(case)


@pytest.mark.cases("dw", 24, 300)
def test_accuracy(case):
    check_accuracy(case)


@pytest.mark.parametrize("row", row_parameters("depthwise_fwd", "depthwise_dgrad", "depthwise_wgrad"))
def test_every_row(row, library):
    check_row(row, ROW_CASES)
