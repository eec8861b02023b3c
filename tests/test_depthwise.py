"""Depthwise convolution, forward and backward, by both judges: as chosen, and through every row of the kernel table."""

import itertools
import re

import pytest
import torch
from torch.nn.functional import conv2d

import choices
import dsconv_ext.functional as F
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
# Input gradients by cells of 2 x 2 (csrc/cpu/cell_blocks.h): both parities of the padding, half a cell at the end,
# columns outside on either side, padding past all taps, windows and strides that are none of these, a depth, every
# delivery.
CELLS = (
    "dw n2c37h14w14k3s2d1p1 nhwc fp32",
    "dw n2c24h15w16k3s2d1p1 nhwc fp64 act=relu",
    "dw n1c40h12w33k3s2d1p0x0 nhwc fp32",
    "dw n1c24h13w14k3s2d1p0:1x0:1 nhwc bf16",
    "dw n2c24h9w21k5s2d1p2 nhwc fp16 act=relu6",
    "dw n2c17h14w14k5s2d1p1:2x1:2 nhwc fp32",
    "dw n1c24h7w7k3s2d1p2 nhwc fp32",
    "dw n1c24h8w6k5s2d1p4 nhwc fp64",
    "dw n1c24h14w14k5s2d1p2x1 nhwc fp32",
    "dw n2c24h20w20k3s2d1p1 nchw fp32",
    "dw n2c24h20w20k5s2d1p2 nchw bf16",
    "dw n1c24h10w10k3s2d1p1 nhwc_sliced fp32",
    "dw n1c12h10w10k3s2d1p1m2 nhwc fp32",
    "dw n1c24t4h9w10k1x3x3s1x2x2d1p1x1x1 nhwc fp32",
    "dw n16c96h112w112k3s2d1p1 nhwc fp32",
    "dw n2c1024h11w13k3s2d1p1x0 nhwc fp32",
    "dw n1c1024h8w26k3s2d1p0:1x0:1 nhwc fp32",
    "dw n1c2048h9w12k3s2d1p2 nhwc bf16",
    "dw n1c512h8w15k3s2d1p1 nhwc fp64",
    "dw n1c1024h9w17k5s2d1p2 nhwc fp32",
)

# Weight gradients of columns that crowd the cache, by few (csrc/cpu/grad_weight_rows.h); of dilated layers that
# are fetched, row by row: rows that a cache keeps until the next tap row meets them, and more than it does.
SCATTERED = (
    "dw n2c512w61k4s1d1p3:0 nhwc",
    "dw n1c1024w40k9s1d1p4 nhwc",
    "dw n2c1024h9w7k1x3s1d1p0x1 nhwc",
    "dw n1c400h32w32k3s1d2p2 nhwc",
    "dw n1c720h25w31k3s1d12p12 nhwc",
    "dw n1c500h26w29k5s1d3p6 nhwc",
)

# By strips of columns (csrc/cpu/column_strips.h, grad_strips.h): every width of them, fewer rows than are in work at a
# time, rows that are cut into tasks, rows outside on either side, all of them (a depth), phases, phases without taps,
# an activation that makes them blocks, a tensor that would go past the caches by blocks (kStreamedBytes), one that is
# fetched ahead (kNearBytes) by few rows or many, columns that crowd the cache (kCrowdedColumn) or lie pages apart, more
# rows than one chain of additions.
STRIPS = (
    "dw n2c37h9w4k3s1d1p1 nhwc",
    "dw n1c64h2w5k3s1d1p1 nhwc act=relu6",
    "dw n1c33h1w9k3s1d1p1 nhwc bias=dw",
    "dw n1c40h30w15k3s1d1p1 nhwc act=relu6",
    "dw n1c24h8w30k3s1d1p3x1 nhwc",
    "dw n1c24h7w13k3s1d1p0 nhwc act=relu",
    "dw n1c24h21w22k3s1d3p3 nhwc act=relu",
    "dw n1c130h64w64k3s1d1p1 nhwc",
    "dw n1c48h40w12k3s2d1p1 nhwc act=relu",
    "dw n2c16h11w13k3s2d1p0:1x0:1 nhwc",
    "dw n1c70h3w27k3s2d1p1 nhwc",
    "dw n1c70h30w27k3s1d1p1 nhwc act=hardswish",
    "dw n1c24h13w13k3s2d2p2 nhwc",
    "dw n1c24t3h9w10k1x3x3s1x1x1d1p1x1x1 nhwc",
    "dw n2c128h64w72k3s1d1p1 nhwc",
    "dw n1c256h14w14k3s2d1p1 nhwc act=relu6",
    "dw n2c512h27w28k3s2d1p1:0x0:1 nhwc",
    "dw n1c1024h1w9k3s2d1p1 nhwc bias=dw",
    "dw n1c512h14w15k3s1d1p1 nhwc act=relu6",
    "dw n2c1024h9w7k3s1d1p1 nhwc bias=dw",
    "dw n2c1024h20w17k3s1d1p1 nhwc",
    "dw n2c1024h20w17k5s1d1p2 nhwc",
    "dw n1c512h2w2k3s1d1p1 nhwc",
    "dw n1c256h21w22k3s1d2p2 nhwc",
    "dw n1c24h35w1k3s1d1p1 nhwc",
    "dw n2c24h21w2k3s1d1p1x0:1 nhwc",
    "dw n1c24h23w6k3s2d1p1 nhwc",
    "dw n3c40h33w33k3s1d18p18 nhwc",
    "dw n2c24h19w20k3s2d3p3 nhwc",
    "dw n2c24h9w10k3s1d12p12 nhwc",
    "dw n1c512h5w4k3s2d2p2 nhwc",
    "dw n1c24h5w5k3s2d1p1 nhwc act=relu",
    "dw n1c2048h33w33k3s1d12p12 nhwc",
    "dw n1c24t3h9w10k1x3x3s1d1p1x1x1 nhwc",
    "dw n2c430h17w18k3s1d1p1 sliced",
    "dw n3c960h33w33k3s1d4p4 nhwc",
    "dw n2c430h91w47k3s2d1p1 nhwc",
    "dw n3c300h61w60k3s1d1p1 nhwc",
    "dw n5c130h61w60k3s1d1p1 nhwc",
    "dw n2c24h33w17k3s2d1p1 nhwc act=relu",
    "dw n1c128h33w21k3s2d1p1 nhwc",
    "dw n1c1024h23w9k3s1d1p1 nhwc act=relu6",
    "dw n1c2048h15w6k3s1d1p1 nhwc",
)

# Depth multipliers (gather_mapped in csrc/cpu/row_stage.h): channels that a vector of outputs shares with the next one,
# several vectors for one channel, inputs of one vector in several of gradients, parts of vectors, a depth, a line.
MULTIPLIERS = (
    "dw n2c40h9w11k3s2d1p1m2 nhwc",
    "dw n1c9h7w8k3s1d1p1m3 nhwc act=relu",
    "dw n2c5h6w7k5s1d1p2m7 nhwc",
    "dw n1c3h8w9k3s2d1p1m17 nhwc bias=dw",
    "dw n1c2h5w5k3s1d1p1m40 nhwc",
    "dw n1c37h12w13k3s1d2p2m4 nhwc_sliced",
    "dw n1c96h30w31k7s2d1p3m2 nhwc act=relu6",
    "dw n1c12t4h5w6k3x3x3s1x1x1d1p1x1x1m2 nhwc",
    "dw n2c17w40k31s1d1p15m2 nhwc",
)

# By planes (csrc/cpu/planes.h, plane_cells.h, grad_planes.h): strips narrower than a vector, with a column outside on
# one side or both and with none, taps that no column meets, more rows than one chain of additions, several images in
# one, rows of taps outside, dilated rows of all phases, rows that end where a vector does or a column before or behind,
# with columns left that two planes share or cannot share; cells with half a one at either end, of both parities.
PLANES = (
    "dw n3c5h5w5k3s1d1p1 nchw",
    "dw n2c6h70w37k3s1d1p1 nchw act=relu",
    "dw n9c4h14w14k3s1d1p1 nchw",
    "dw n2c3h30w35k5s1d1p2 nchw act=silu",
    "dw n2c3h30w16k7s1d1p3 nchw",
    "dw n2c5h21w40k3s2d1p1 nchw act=relu6",
    "dw n2c5h20w19k5s2d1p2 nchw",
    "dw n1c3h20w33k7s2d1p3 nchw act=gelu",
    "dw n1c4h19w50k3s1d3p3 nchw",
    "dw n1c4h21w12k3s1d6p6 nchw act=relu",
    "dw n1c3h9w9k5s1d4p8 nchw",
    "dw n2c4h24w24k7s2d2p5 nchw",
    "dw n2c4h9w10k3s1d1p2m3 nchw",
    "dw n1c4h3w66k7s1d1p3 nchw",
    "dw n1c2h6w7k3s1d1p1 nchw",
    "dw n1c2h6w8k3s1d1p1 nchw",
    "dw n1c2h6w9k5s1d1p2 nchw",
    "dw n1c2h6w15k3s2d1p1 nchw",
    "dw n1c2h6w16k3s2d1p1:0x1:0 nchw",
    "dw n1c2h6w17k3s2d1p0 nchw",
    "dw n1c2h100w130k3s1d1p1 nchw",
    "dw n1c2h13w31k3s2d1p1 nchw",
    "dw n2c3h40w32k3s2d1p0 nchw act=relu",
    "dw n1c2h9w33k5s2d1p2 nchw",
    "dw n1c3h11w67k5s2d1p1:2x1:2 nchw",
    "dw n1c2h70w140k7s2d1p3 nchw",
    "dw n1c2h33w20k7s2d1p2:4x6:1 nchw",
    "dw n1c2h12w18k3s2d1p1x0 nchw",
    "dw n2c3h15w18k5s2d1p3 nchw",
    "dw n2c3h4w3k3s2d1p1 nchw",
    "dw n1c70h150w40k3s2d1p1 nchw",
    "dw n1c5h40w33k3s1d6p6 nchw",
    "dw n1c3h26w33k3s1d12p12 nchw act=relu",
    "dw n2c3h9w24k7s1d1p3 nchw act=relu6",
    "dw n2c19h9w25k3s1d1p1 nchw",
    "dw n1c3h66w46k3s2d1p1 nchw act=silu",
    "dw n1c2h70w20k5s1d1p2m3 nchw",
)

# By planes whose rows fit into vectors (csrc/cpu/plane_rows.h): one vector, two of a row, two planes side by side, each
# with a column to spare and with none; an odd number of planes, more than a block of them, rows cut for threads,
# dilated rows of all phases, taps that no row or column meets.
NARROW = (
    "dw n2c5h7w7k3s1d1p1 nchw act=relu6",
    "dw n1c37h7w7k5s1d1p2 nchw",
    "dw n1c1h8w8k3s1d1p1 nchw act=relu",
    "dw n3c3h5w7k7s1d1p3 nchw",
    "dw n2c3h14w14k3s2d1p1 nchw act=silu",
    "dw n1c4h16w16k5s2d1p2 nchw",
    "dw n1c3h15w15k7s2d1p3 nchw act=relu",
    "dw n1c35h14w14k3s1d1p1 nchw act=relu",
    "dw n2c3h9w16k7s1d1p3 nchw",
    "dw n1c3h12w9k5s1d1p2 nchw act=gelu",
    "dw n2c5h28w28k3s2d1p1 nchw",
    "dw n1c3h30w32k5s2d1p2 nchw act=relu6",
    "dw n1c2h31w31k7s2d1p3 nchw",
    "dw n1c3h20w18k3s2d1p1:0x1:0 nchw",
    "dw n1c4h13w12k3s1d3p3 nchw",
    "dw n1c3h9w8k3s1d2p2 nchw act=relu",
    "dw n1c3h4w3k5s1d4p8 nchw",
    "dw n2c3h7w7k3s1d1p1m3 nchw",
    "dw n1c3h1w2k3s1d1p1 nchw",
    "dw n1c5h2w3k3s2d1p1 nchw",
    "dw n1c3h2000w14k3s1d1p1 nchw",
    "dw n1c3h3000w7k3s1d1p1 nchw",
    "dw n1c2h10w16k3s1d1p0 nchw",
)

# By lines (csrc/cpu/lines.h): fewer taps than a vector has lanes, as many, one more, several vectors of them; lines
# that are shorter than a vector, in step with vectors or not, longer than a task; padding on one side, on none, as wide
# as the window.
LINES = (
    "dw n2c5w70k31s1d1p15 nchw act=relu",
    "dw n1c3w300k31s1d1p15 nchw",
    "dw n2c4w257k4s1d1p3:0 nchw act=silu",
    "dw n1c20w256k4s1d1p3:0 nchw act=relu6",
    "dw n1c2w16k3s1d1p1 nchw",
    "dw n3c2w5k3s1d1p1 nchw",
    "dw n1c2w33k16s1d1p0 nchw",
    "dw n1c2w100k17s1d1p16 nchw act=gelu",
    "dw n2c3w150k33s1d1p16 nchw",
    "dw n1c2w200k63s1d1p31 nchw",
    "dw n1c3w90k2s1d1p0:1 nchw",
    "dw n1c3w64k1s1d1p0 nchw",
    "dw n2c3w75k5s1d1p2m2 nchw",
    "dw n1c3w75k7s1d1p3 nchw",
    "dw n1c1w20000k9s1d1p4 nchw",
    "dw n2c3t3h4w50k1x1x5s1x1x1d1p0x0x2 nchw act=relu",
    "dw n1c3h8w300k1x5s1d1p0:1x2:2 nchw",
    "dw n1c3h8w300k1x5s1d1p1:0x2:2 nchw",
)


# They are taken where they can run, however few lanes a width fills.
NARROW_ROWS = [row["name"] for row in choices.rows() if "_narrow_planes_" in row["name"]]
CONTIGUOUS_ROWS = [
    row["name"]
    for row in choices.rows()
    if row["name"] not in NARROW_ROWS and ("_planes_" in row["name"] or "_lines_" in row["name"])
]


def of_dtype(line: str, dtype: str) -> Case:
    """A case of one of these lists."""
    return Case.parse(re.sub(r"\b(nchw|nhwc_sliced|nhwc|sliced)\b", rf"\1 {dtype}", line))


# Columns of bfloat16 in pairs (for_pairs in csrc/cpu/row_blocks.h): even and odd numbers of taps and of outputs,
# each column of a pair outside, both or none, strides that begin a window with its second column, dilation, one row.
PAIRED = (
    "dw n2c24h14w14k3s1d1p1 nhwc bf16 act=relu6",
    "dw n1c40h9w7k3s1d1p1 nhwc bf16",
    "dw n1c17h8w33k3s2d1p1 nhwc bf16",
    "dw n1c33h11w15k3s1d1p0 nhwc bf16",
    "dw n1c24h6w5k3s1d1p2 nhwc bf16",
    "dw n1c24h13w13k5s1d1p2 nhwc bf16 act=relu",
    "dw n1c24h14w23k5s2d1p2 nhwc bf16",
    "dw n1c24h7w7k7s1d1p3 nhwc bf16",
    "dw n1c40h15w30k7s2d1p3 nhwc bf16",
    "dw n1c24h12w29k2s1d1p0:1x0:1 nhwc bf16",
    "dw n1c24h5w18k4s1d1p3:0x3:0 nhwc bf16",
    "dw n1c24h20w21k3s1d3p3 nhwc bf16",
    "dw n1c24w70k31s1d1p15 nhwc bf16",
    "dw n1c64w40k4s1d1p3:0 nhwc bf16",
    "dw n1c24t4h9w10k3x3x3s1x1x1d1p1x1x1 nhwc bf16",
    "dw n2c24h14w9k11x1s1d1p5x0 nhwc bf16",
    "dw n1c40h13w14k5x1s1x2d1p2x0 nhwc bf16 act=relu",
    "dw n1c24h15w4k4x1s1d2x1p3x0 nhwc bf16",
)

# Windows of one column (along_rows in csrc/cpu/row_stage.h): strides, dilation, padding of one side, few channels, more
# taps than a chain has, depth multipliers, a depth, maps of one column, outputs past the caches.
COLUMNS = (
    "dw n2c24h13w9k11x1s1d1p5x0 nhwc act=relu6",
    "dw n1c40h14w15k5x1s2x1d1p2x0 nhwc",
    "dw n1c33h15w8k3x1s1x2d3x1p3x0 nhwc bias=dw",
    "dw n2c12h20w7k11x1s1d1p5x0 nhwc",
    "dw n1c24h30w5k4x1s3x2d1p0:2x0 nhwc",
    "dw n1c17h90w3k71x1s1d1p35x0 nhwc",
    "dw n2c9h11w6k7x1s1d1p3x0m3 nhwc",
    "dw n1c24t4h9w7k3x5x1s1d1p1x2x0 nhwc",
    "dw n2c32h40w1k31x1s1d1p15x0 nhwc_sliced",
    "dw n2c20h12w13k5x1s1d1p2x1 nchw",
    "dw n2c96h112w112k3x1s1d1p1x0 nhwc",  # in float32 too large for the exchange
)


@pytest.mark.cases("dw", 24, 300)
def test_integers_are_exact(case):
    check_exact(case)


@pytest.mark.cases("dw", 24, 300)
def test_accuracy(case):
    check_accuracy(case)


@pytest.mark.parametrize("row", row_parameters("depthwise_fwd", "depthwise_dgrad", "depthwise_wgrad"))
def test_every_row(row, library):
    dtypes = itertools.cycle(["fp32", "bf16"])
    contiguous = [*PLANES[::3], *NARROW[::3], *LINES[::3]]
    check_row(row, [*ROW_CASES, *map(Case.parse, PAIRED), *map(of_dtype, contiguous, dtypes)])


@pytest.mark.parametrize("line", CELLS)
@choices.forced(*(row["name"] for row in choices.rows() if row["name"].startswith("depthwise_dgrad_rows_")))
def test_gradient_by_cells(line):
    check_exact(Case.parse(line))


def with_dtypes(lines):
    """Each of them in each type; what takes seconds in one, in float32 and bfloat16."""
    for line in lines:
        few = of_dtype(line, "fp32").multiplications < 10**7
        yield from ((line, dtype) for dtype in (["fp32", "fp64", "bf16", "fp16"] if few else ["fp32", "bf16"]))


@pytest.mark.parametrize(("line", "dtype"), with_dtypes(SCATTERED))
def test_weight_gradients_of_columns_far_apart(line, dtype):
    check_exact(of_dtype(line, dtype))
    check_accuracy(of_dtype(line, dtype))


@pytest.mark.parametrize(("line", "dtype"), with_dtypes(STRIPS))
def test_strips_of_columns(line, dtype):
    check_exact(of_dtype(line, dtype))
    check_accuracy(of_dtype(line, dtype))


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("line", [*MULTIPLIERS, *COLUMNS])
@choices.forced(*(row["name"] for row in choices.rows() if "_rows_" in row["name"]))
def test_depth_multipliers_and_windows_of_one_column(line, dtype):
    check_exact(of_dtype(line, dtype))
    check_accuracy(of_dtype(line, dtype))


@pytest.mark.parametrize(
    ("dtype", "apart"),
    [(torch.float32, 256), (torch.float32, 512), (torch.bfloat16, 512), (torch.bfloat16, 1024), (torch.float64, 256)],
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [9, 16, 32, 40, 104, 200, 239])
@pytest.mark.parametrize("first", [3, 8, 16])
def test_some_channels_of_columns_that_crowd_the_cache(first, channels, stride, dtype, apart):
    """Strips take several vectors at a time there; some before or after may be alone, the last one overlap another."""
    x = torch.randint(-3, 4, (2, 13, 12, apart)).to(dtype)[..., first : first + channels].permute(0, 3, 1, 2)
    weight, bias = torch.randint(-3, 4, (channels, 1, 3, 3)).to(dtype), torch.randint(-3, 4, (channels,)).to(dtype)
    y = F.depthwise_conv2d(x, weight, bias, stride, 1)
    assert torch.equal(y, conv2d(x.contiguous(), weight, bias, stride, 1, groups=channels))


def test_strides_beyond_everything():
    x, weight = torch.randn(1, 16, 5, 5).to(memory_format=torch.channels_last), torch.randn(16, 1, 3, 3)
    expected = conv2d(x, weight, stride=5000, padding=1, groups=16)
    torch.testing.assert_close(F.depthwise_conv2d(x, weight, stride=5000, padding=1), expected)


@pytest.mark.parametrize("line", PAIRED)
def test_columns_in_pairs(line):
    check_exact(Case.parse(line))
    check_accuracy(Case.parse(line))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (5, 1), (7, 1), (7, 2)])
@pytest.mark.parametrize("width", [7, 16, 21])
@pytest.mark.parametrize("rows", [CONTIGUOUS_ROWS, NARROW_ROWS], ids=["wide", "narrow"])
def test_what_is_infinite_stays_in_its_windows(rows, width, taps, stride, dtype, memory_format):
    """A value outside the window of an output does not meet a weight of zero instead: the product would be NaN."""
    with choices.forced(*rows):
        for column in range(width):
            x = torch.zeros(1, 16, 2, width, dtype=dtype).to(memory_format=memory_format)
            x[..., 1, column] = torch.inf
            weight = torch.ones(16, 1, taps, taps, dtype=dtype)
            got = F.depthwise_conv2d(x, weight, stride=stride, padding=taps // 2)
            expected = conv2d(x.double(), weight.double(), stride=stride, padding=taps // 2, groups=16)
            assert torch.equal(got.double(), expected)
            grad = torch.zeros_like(got)
            grad[..., -1, column // stride] = torch.inf
            ours, theirs = x.zero_().requires_grad_(), x.double().detach().requires_grad_()
            F.depthwise_conv2d(ours, weight, stride=stride, padding=taps // 2).backward(grad)
            conv2d(theirs, weight.double(), stride=stride, padding=taps // 2, groups=16).backward(grad.double())
            assert torch.equal(ours.grad.double(), theirs.grad)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1)])
@pytest.mark.parametrize("height", [2, 9])
@choices.forced(*CONTIGUOUS_ROWS)
def test_gradients_that_are_infinite_meet_no_padding(height, taps, stride, dtype, memory_format):
    """A tap that lies outside the tensor leaves them out: multiplied with zeros of padding they would be NaN."""
    x = torch.ones(1, 16, height, 16, dtype=dtype).to(memory_format=memory_format)
    weight = torch.zeros(16, 1, taps, taps, dtype=dtype, requires_grad=True)
    y = F.depthwise_conv2d(x, weight, stride=stride, padding=taps // 2)
    rows, columns = y.shape[2:]
    for row, column in itertools.product((0, rows - 1), (0, columns // 2, columns - 1)):
        grad = torch.zeros_like(y)
        grad[..., row, column] = torch.inf
        (got,) = torch.autograd.grad(y, weight, grad, retain_graph=True)
        met = torch.zeros(taps, taps, dtype=dtype)
        for u, t in itertools.product(range(taps), repeat=2):
            h, w = row * stride - taps // 2 + u, column * stride - taps // 2 + t
            met[u, t] = torch.inf if 0 <= h < height and 0 <= w < 16 else 0
        assert torch.equal(got, met.expand_as(got)), (row, column)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [3, 4, 17, 31])
@choices.forced(*CONTIGUOUS_ROWS)
def test_what_is_infinite_stays_in_its_windows_of_a_line(taps, dtype):
    weight = torch.ones(1, 1, taps, dtype=dtype)
    for column in range(90):
        x = torch.zeros(1, 1, 90, dtype=dtype)
        x[..., column] = torch.inf
        got = F.depthwise_conv1d(x, weight, padding=taps // 2)
        expected = torch.nn.functional.conv1d(x.double(), weight.double(), padding=taps // 2)
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("line", PLANES + LINES)
@choices.forced(*CONTIGUOUS_ROWS)
def test_contiguous(line, dtype):
    check_exact(of_dtype(line, dtype))
    check_accuracy(of_dtype(line, dtype))


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16", "fp16"])
@pytest.mark.parametrize("line", NARROW)
@choices.forced(*NARROW_ROWS, *CONTIGUOUS_ROWS)
def test_narrow_planes(line, dtype):
    with choices.recorded() as made:
        check_exact(of_dtype(line, dtype))
    check_accuracy(of_dtype(line, dtype))
    if dtype != "fp64":  # of which a vector holds half as many
        reasons = {reason for row in NARROW_ROWS for reason in choices.refusals(made, row)}
        allowed = ("the processor, or", "a gradient of multipliers", "gradients of a stride")
        assert all(reason is None or reason.startswith(allowed) for reason in reasons), reasons


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (5, 1), (7, 2)])
@pytest.mark.parametrize("width", [5, 7, 14, 21, 28])
@pytest.mark.parametrize("rows", [CONTIGUOUS_ROWS, NARROW_ROWS], ids=["wide", "narrow"])
def test_parts_of_larger_planes(rows, width, taps, stride, dtype):
    """Rows and planes do not follow each other; what lies between them is not read."""
    larger = torch.full((2, 7, 13, width + 4), torch.nan, dtype=dtype)
    x = larger[:, 1:6, 2:11, 3:-1].copy_(torch.randint(-3, 4, (2, 5, 9, width)))
    weight, bias = torch.randint(-3, 4, (5, 1, taps, taps)).to(dtype), torch.randint(-3, 4, (5,)).to(dtype)
    with choices.forced(*rows), choices.recorded() as made:
        y = F.depthwise_conv2d(x, weight, bias, stride, taps // 2)
    assert "columns are no neighbours in memory" not in {r for row in rows for r in choices.refusals(made, row)}
    expected = conv2d(x.double(), weight.double(), bias.double(), stride, taps // 2, groups=5)
    assert torch.equal(y.double(), expected)


@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("dw n1c144h56w56k3s1d1p1 nchw fp32", ("planes", "planes", "planes")),
        ("dw n1c96h56w56k3s2d1p1 nchw fp32", ("planes", "planes", "planes")),
        ("dw n1c64h7w7k7s1d1p3 nchw fp32", ("rows", "rows", "rows")),
        ("dw n1c64w1000k9s1d1p4 nchw fp32", ("lines", "lines", "rows")),
        ("dw n1c64w12k7s1d1p3 nchw fp32", ("rows", "rows", "rows")),
    ],
)
def test_contiguous_tensors_take_what_is_faster(line, rows):
    """Planes and lines where a width fills vectors, else columns of channels (`part` of the kernels)."""
    with choices.recorded() as made:
        check_exact(Case.parse(line))
    names = [f"depthwise_{kind}_{row}_" for kind, row in zip(("fwd", "dgrad", "wgrad"), rows, strict=True)]
    taken = choices.chosen(made)
    if "depthwise_wgrad_rows_portable" in taken:  # four lanes: always the faster one
        names[2] = "depthwise_wgrad_rows_"
    assert all(any(name.startswith(start) for name in taken) for start in names), taken


@pytest.mark.parametrize("line", CROWDED)
def test_crowded_columns(line):
    check_exact(Case.parse(line))
