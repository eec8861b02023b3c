"""Triton kernels: depthwise convolution with both gradients, and depthwise and pointwise convolution in one pass.

Every tensor is one of [N, C, D, H, W] with any strides; 1D and 2D ones have leading sizes of 1. A tile is a block of
positions, flat over N, D, H and W, times a block of channels; whichever is contiguous in memory varies fastest. The
forward pass and the input gradient are one kernel, a correlation: the positions of the input gradient that meet the
same taps lie a stride apart, and the programs of such a phase skip the other taps. Sizes and strides are parameters of
their own: of a tuple, torch.compile would trace the numbers as constants.
"""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
# The interpreter of triton 3.8 multiplies the payloads of bfloat16 in tl.dot and truncates where it rounds; its tl.fma
# rounds twice.
GUARDED = tl.constexpr(INTERPRETED)


@triton.jit
def _round(value, dtype: tl.constexpr):
    """Round to nearest even."""
    if GUARDED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = tl.where(value == value, nearest, bits).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _fma(a, b, sums):
    """a * b + sums, rounded once."""
    if GUARDED and sums.dtype == tl.float32:
        return (a.to(tl.float64) * b + sums).to(tl.float32)
    return tl.fma(a, b, sums)


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if GUARDED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def _expm1(x):
    """exp(x) - 1: next to 0 by its series, to the precision of x."""
    TERMS: tl.constexpr = 14 if x.dtype == tl.float64 else 8
    series = tl.full(x.shape, 1, x.dtype)
    for i in tl.static_range(TERMS, 1, -1):
        series = 1 + series * x * (1 / i)
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1)


@triton.jit
def _tanh(x):
    e = _expm1(-2 * tl.abs(x))
    return tl.where(x < 0, e, -e) / (2 + e)


@triton.jit
def _activate(x, NAME: tl.constexpr, PARAMETER: tl.constexpr):
    """ATen's formulas; the comparisons keep a NaN."""
    if NAME == "relu":
        x = tl.where(x < 0, 0, x)
    elif NAME == "relu6":
        x = tl.where(x < 0, 0, tl.where(x > 6, 6, x))
    elif NAME == "hardsigmoid":
        x = tl.where(x < -3, 0, tl.where(x > 3, 6, x + 3)) / 6
    elif NAME == "hardswish":
        x = x * (tl.where(x < -3, 0, tl.where(x > 3, 6, x + 3)) / 6)
    elif NAME == "silu":
        x = x / (1 + tl.exp(-x))
    elif NAME == "sigmoid":
        x = 1 / (1 + tl.exp(-x))
    elif NAME == "tanh":
        x = _tanh(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "leaky_relu":
        x = tl.where(x > 0, x, x * PARAMETER)
    elif NAME == "elu":
        x = tl.where(x > 0, x, _expm1(x) * PARAMETER)
    return x


@triton.jit
def _unravel(position, size_d, size_h, size_w):
    row = position // size_w
    plane = row // size_h
    return plane // size_d, plane % size_d, row % size_h, position % size_w


@triton.jit
def _vector(pointer, index, stride, size, dtype: tl.constexpr):
    return tl.load(pointer + index * stride, mask=index < size, other=0).to(dtype)


@triton.jit
def _reach(tap, phase, DIM: tl.constexpr, STRIDE, PADDING, DILATION, TRANSPOSED: tl.constexpr):
    """How far from its position a phase reads with a tap, and whether it meets the tap at all."""
    if TRANSPOSED:
        distance = phase + PADDING[DIM] - tap * DILATION[DIM]
        return distance // STRIDE[DIM], distance % STRIDE[DIM] == 0
    else:
        return tap * DILATION[DIM] - PADDING[DIM], True


@triton.jit
def _correlate(
    x,
    weight,
    valid,
    position,
    phase,
    channel,
    channels,
    x_size,
    x_stride,
    weight_stride,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    AXIS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Sum taps times inputs for a tile: of the convolution, or of its input gradient, where x is the output's."""
    n, d, h, w = position
    phase_d, phase_h, phase_w = phase
    FILTERS: tl.constexpr = MULTIPLIER if TRANSPOSED else 1  # per channel of the result
    STEP_D: tl.constexpr = 1 if TRANSPOSED else STRIDE[0]
    STEP_H: tl.constexpr = 1 if TRANSPOSED else STRIDE[1]
    STEP_W: tl.constexpr = 1 if TRANSPOSED else STRIDE[2]
    # More at once would spill: many taps, those that a phase may skip, and 64-bit offsets.
    ALWAYS_MET: tl.constexpr = not TRANSPOSED or STRIDE[2] == 1
    UNROLL: tl.constexpr = TAPS[2] if TAPS[2] <= 8 and ALWAYS_MET and channel.dtype == tl.int32 else 1
    is_channel = tl.expand_dims(channel < channels, 1 - AXIS)
    sums = (tl.expand_dims(channel, 1 - AXIS) * 0 + tl.expand_dims(w, AXIS) * 0).to(SUMS)
    for tap_d in tl.range(0, TAPS[0]):
        reach_d, meets_d = _reach(tap_d, phase_d, 0, STRIDE, PADDING, DILATION, TRANSPOSED)
        in_d = d * STEP_D + reach_d
        inside_d = valid & (in_d >= 0) & (in_d < x_size[0])
        if meets_d:
            for tap_h in tl.range(0, TAPS[1]):
                reach_h, meets_h = _reach(tap_h, phase_h, 1, STRIDE, PADDING, DILATION, TRANSPOSED)
                in_h = h * STEP_H + reach_h
                inside_h = inside_d & (in_h >= 0) & (in_h < x_size[1])
                row = n * x_stride[0] + in_d * x_stride[2] + in_h * x_stride[3]
                if meets_h:
                    for tap_w in tl.range(0, TAPS[2], loop_unroll_factor=UNROLL):
                        reach_w, meets_w = _reach(tap_w, phase_w, 2, STRIDE, PADDING, DILATION, TRANSPOSED)
                        in_w = w * STEP_W + reach_w
                        inside = tl.expand_dims(inside_h & (in_w >= 0) & (in_w < x_size[2]), AXIS) & is_channel
                        if meets_w:
                            for m in tl.range(0, FILTERS):
                                filters = channel * FILTERS + m
                                source = filters if TRANSPOSED else channel // MULTIPLIER
                                at = tl.expand_dims(row + in_w * x_stride[4], AXIS) + tl.expand_dims(
                                    source * x_stride[1], 1 - AXIS
                                )
                                tap = tap_d * weight_stride[1] + tap_h * weight_stride[2] + tap_w * weight_stride[3]
                                taps = tl.load(
                                    weight + (filters * weight_stride[0] + tap), mask=channel < channels, other=0
                                ).to(SUMS)
                                value = tl.load(x + at, mask=inside, other=0).to(SUMS)
                                # Padding is left out: it never meets an infinite or NaN tap.
                                sums = tl.where(inside, _fma(value, tl.expand_dims(taps, 1 - AXIS), sums), sums)
    return sums


@triton.jit
def depthwise_kernel(
    x,
    weight,
    bias,
    y,
    batch,
    channels,
    y_size_d,
    y_size_h,
    y_size_w,
    x_size_d,
    x_size_h,
    x_size_w,
    y_stride_n,
    y_stride_c,
    y_stride_d,
    y_stride_h,
    y_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    weight_stride_c,
    weight_stride_d,
    weight_stride_h,
    weight_stride_w,
    bias_stride,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARAMETER: tl.constexpr,
    AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y = activation(bias + the correlation of x), or y = the input gradient of it for the output's gradient x."""
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    SUMS: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    STEP_D: tl.constexpr = STRIDE[0] if TRANSPOSED else 1
    STEP_H: tl.constexpr = STRIDE[1] if TRANSPOSED else 1
    STEP_W: tl.constexpr = STRIDE[2] if TRANSPOSED else 1
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    channel = ((program % blocks) * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    program = program // blocks
    phase_w = program % STEP_W
    phase_h = program // STEP_W % STEP_H
    phase_d = program // (STEP_W * STEP_H) % STEP_D
    first = (program // (STEP_W * STEP_H * STEP_D)).to(INDEX) * POSITIONS
    n, d, h, w = _unravel(
        first + tl.arange(0, POSITIONS), tl.cdiv(y_size_d, STEP_D), tl.cdiv(y_size_h, STEP_H), tl.cdiv(y_size_w, STEP_W)
    )
    out_d, out_h, out_w = d * STEP_D + phase_d, h * STEP_H + phase_h, w * STEP_W + phase_w
    valid = (n < batch) & (out_d < y_size_d) & (out_h < y_size_h) & (out_w < y_size_w)
    sums = _correlate(
        x,
        weight,
        valid,
        (n, d, h, w),
        (phase_d, phase_h, phase_w),
        channel,
        channels,
        (x_size_d, x_size_h, x_size_w),
        (x_stride_n, x_stride_c, x_stride_d, x_stride_h, x_stride_w),
        (weight_stride_c, weight_stride_d, weight_stride_h, weight_stride_w),
        TAPS,
        STRIDE,
        PADDING,
        DILATION,
        MULTIPLIER,
        TRANSPOSED,
        AXIS,
        SUMS,
    )
    if bias is not None:
        sums += tl.expand_dims(_vector(bias, channel, bias_stride, channels, SUMS), 1 - AXIS)
    value = _round(_activate(sums, ACTIVATION, PARAMETER), y.dtype.element_ty)
    at = n * y_stride_n + out_d * y_stride_d + out_h * y_stride_h + out_w * y_stride_w
    at = tl.expand_dims(at, AXIS) + tl.expand_dims(channel * y_stride_c, 1 - AXIS)
    tl.store(y + at, value, mask=tl.expand_dims(valid, AXIS) & tl.expand_dims(channel < channels, 1 - AXIS))


@triton.jit
def weight_gradient_kernel(
    grad,
    x,
    partial,
    batch,
    filters,
    grad_size_d,
    grad_size_h,
    grad_size_w,
    x_size_d,
    x_size_h,
    x_size_w,
    grad_stride_n,
    grad_stride_c,
    grad_stride_d,
    grad_stride_h,
    grad_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    slab,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """partial[slab, column, filter] = the sums over one slab of positions.

    The columns are the taps from FIRST on, and after the last tap the gradient of the bias, whose input is 1.
    """
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    SUMS: tl.constexpr = partial.dtype.element_ty
    ALL: tl.constexpr = TAPS[0] * TAPS[1] * TAPS[2]
    blocks = tl.cdiv(filters, CHANNELS)
    column_blocks: tl.constexpr = tl.cdiv(COLUMNS, COLUMN_BLOCK)
    program = tl.program_id(0)
    channel = ((program % blocks) * CHANNELS + tl.arange(0, CHANNELS)).to(INDEX)
    column = program // blocks % column_blocks * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    index = (program // (blocks * column_blocks)).to(INDEX)
    tap = (FIRST + column)[:, None]
    reach_w = tap % TAPS[2] * DILATION[2] - PADDING[2]
    reach_h = tap // TAPS[2] % TAPS[1] * DILATION[1] - PADDING[1]
    reach_d = tap // (TAPS[2] * TAPS[1]) * DILATION[0] - PADDING[0]
    is_bias = tap == ALL
    is_channel = tl.expand_dims(channel < filters, 1 - AXIS)
    total = batch * grad_size_d * grad_size_h * grad_size_w
    sums = tl.zeros((COLUMN_BLOCK, POSITIONS if AXIS == 1 else CHANNELS, CHANNELS if AXIS == 1 else POSITIONS), SUMS)
    for start in tl.range(index * slab, tl.minimum(index * slab + slab, total), POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        n, d, h, w = _unravel(position, grad_size_d, grad_size_h, grad_size_w)
        valid = position < total
        at = n * grad_stride_n + d * grad_stride_d + h * grad_stride_h + w * grad_stride_w
        at = tl.expand_dims(at, AXIS) + tl.expand_dims(channel * grad_stride_c, 1 - AXIS)
        slope = tl.load(grad + at, mask=tl.expand_dims(valid, AXIS) & is_channel, other=0).to(SUMS)[None, :, :]
        in_d, in_h, in_w = d * STRIDE[0] + reach_d, h * STRIDE[1] + reach_h, w * STRIDE[2] + reach_w
        inside = (in_d >= 0) & (in_d < x_size_d) & (in_h >= 0) & (in_h < x_size_h) & (in_w >= 0) & (in_w < x_size_w)
        inside = inside & (tap < ALL) & valid
        used = (inside | is_bias) & valid & (column < COLUMNS)[:, None]
        at = n * x_stride_n + in_d * x_stride_d + in_h * x_stride_h + in_w * x_stride_w
        source = tl.expand_dims(channel // MULTIPLIER * x_stride_c, 1 - AXIS)[None, :, :]
        if AXIS == 1:
            at, inside, used = at[:, :, None], inside[:, :, None], used[:, :, None]
        else:
            at, inside, used = at[:, None, :], inside[:, None, :], used[:, None, :]
        value = tl.load(x + (at + source), mask=inside & is_channel[None, :, :], other=0).to(SUMS)
        value = tl.where(is_bias[:, :, None], 1, value)
        sums = tl.where(used, _fma(slope, value, sums), sums)
    result = tl.sum(sums, axis=2 - AXIS)
    at = (index * COLUMNS + column[:, None]) * filters + channel[None, :]
    tl.store(partial + at, result, mask=(column < COLUMNS)[:, None] & (channel < filters)[None, :])


@triton.jit
def separable_kernel(
    x,
    weight,
    bias,
    pointwise,
    pointwise_bias,
    residual,
    y,
    batch,
    channels,
    outputs,
    y_size_d,
    y_size_h,
    y_size_w,
    x_size_d,
    x_size_h,
    x_size_w,
    y_stride_n,
    y_stride_c,
    y_stride_d,
    y_stride_h,
    y_stride_w,
    x_stride_n,
    x_stride_c,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    residual_stride_n,
    residual_stride_c,
    residual_stride_d,
    residual_stride_h,
    residual_stride_w,
    weight_stride_c,
    weight_stride_d,
    weight_stride_h,
    weight_stride_w,
    pointwise_stride_o,
    pointwise_stride_c,
    bias_stride,
    pointwise_bias_stride,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    MID: tl.constexpr,
    MID_PARAMETER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARAMETER: tl.constexpr,
    PRECISION: tl.constexpr,
    AXIS: tl.constexpr,
    LARGE: tl.constexpr,
    POSITIONS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y = activation(pointwise(mid(depthwise(x))) + residual), one program for all outputs of its positions."""
    INDEX: tl.constexpr = tl.int64 if LARGE else tl.int32
    position = tl.program_id(0).to(INDEX) * POSITIONS + tl.arange(0, POSITIONS)
    n, d, h, w = _unravel(position, y_size_d, y_size_h, y_size_w)
    valid = n < batch
    output = tl.arange(0, OUTPUTS).to(INDEX)
    mask = tl.expand_dims(valid, AXIS) & tl.expand_dims(output < outputs, 1 - AXIS)
    sums = tl.zeros((POSITIONS, OUTPUTS) if AXIS == 1 else (OUTPUTS, POSITIONS), tl.float32)
    for start in tl.range(0, channels, CHANNELS):
        channel = (start + tl.arange(0, CHANNELS)).to(INDEX)
        middle = _correlate(
            x,
            weight,
            valid,
            (n, d, h, w),
            (0, 0, 0),
            channel,
            channels,
            (x_size_d, x_size_h, x_size_w),
            (x_stride_n, x_stride_c, x_stride_d, x_stride_h, x_stride_w),
            (weight_stride_c, weight_stride_d, weight_stride_h, weight_stride_w),
            TAPS,
            STRIDE,
            PADDING,
            DILATION,
            MULTIPLIER,
            False,
            AXIS,
            tl.float32,
        )
        if bias is not None:
            middle += tl.expand_dims(_vector(bias, channel, bias_stride, channels, tl.float32), 1 - AXIS)
        middle = _round(_activate(middle, MID, MID_PARAMETER), x.dtype.element_ty)
        at = tl.expand_dims(channel * pointwise_stride_c, AXIS) + tl.expand_dims(output * pointwise_stride_o, 1 - AXIS)
        used = tl.expand_dims(channel < channels, AXIS) & tl.expand_dims(output < outputs, 1 - AXIS)
        matrix = tl.load(pointwise + at, mask=used, other=0)
        sums = _dot(middle, matrix, sums, PRECISION) if AXIS == 1 else _dot(matrix, middle, sums, PRECISION)
    if pointwise_bias is not None:
        sums += tl.expand_dims(_vector(pointwise_bias, output, pointwise_bias_stride, outputs, tl.float32), 1 - AXIS)
    if residual is not None:
        at = n * residual_stride_n + d * residual_stride_d + h * residual_stride_h + w * residual_stride_w
        at = tl.expand_dims(at, AXIS) + tl.expand_dims(output * residual_stride_c, 1 - AXIS)
        sums += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    value = _round(_activate(sums, ACTIVATION, PARAMETER), y.dtype.element_ty)
    at = n * y_stride_n + d * y_stride_d + h * y_stride_h + w * y_stride_w
    tl.store(y + (tl.expand_dims(at, AXIS) + tl.expand_dims(output * y_stride_c, 1 - AXIS)), value, mask=mask)
