"""FP8 E4M3: element-wise kernels. Codes travel as bytes, because sm_80 has no type for them.

A tensor is worked on as groups: row `group // blocks`, and in it the columns of block
`group % blocks`, BLOCK of them. The elements of a group share a scale, so what dividing by it needs
is computed once for all. The launch wrappers say what groups a scaling has.
"""

import triton
import triton.language as tl

from autoq.kernels._jit.rounding import (
    decode_e4m3,
    divide,
    divide_narrow,
    encode_e4m3,
    magnitude_bits,
    round_e4m3,
    scale_from_amax,
    shared_divisor,
    shared_reciprocal,
    sign_bit,
    with_sign,
)


@triton.jit
def _places_of(groups, columns, blocks, group_count, BLOCK: tl.constexpr):
    """(offsets [groups, BLOCK] in the tensor, which of them are inside)."""
    start = (groups % blocks).to(tl.int64) * BLOCK
    column = start[:, None] + tl.arange(0, BLOCK)[None, :]
    offsets = ((groups // blocks).to(tl.int64) * columns)[:, None] + column
    return offsets, (groups < group_count)[:, None] & (column < columns)


@triton.jit
def _quotient(x, scale, NARROW: tl.constexpr):
    """|x| / scale; NARROW says that x has 11 significant bits at most."""
    if NARROW:
        power, high, low = shared_reciprocal(scale)
        quotient = divide_narrow(tl.abs(x), power, high, low)
    else:
        power, normal, reciprocal = shared_divisor(scale)
        quotient = divide(tl.abs(x), power, normal, reciprocal)
    return quotient


@triton.jit
def fake_quantized(x, scale, HARDWARE: tl.constexpr, NARROW: tl.constexpr = False):
    """What is left of float32 x under `scale`, which broadcasts to it."""
    quotient = _quotient(x, scale, NARROW)
    if HARDWARE:
        # The conversion saturates.
        value = with_sign(quotient, x).to(tl.float8e4nv).to(tl.float32)
    else:
        value = with_sign(round_e4m3(quotient, HARDWARE), x)
    return value * scale


@triton.jit
def _store(out_ptr, offsets, inside, x, scale, FAKE: tl.constexpr, HARDWARE: tl.constexpr):
    """Store the codes of x under `scale`, in the dtype it was loaded; with FAKE their values."""
    NARROW: tl.constexpr = x.dtype.primitive_bitwidth == 16
    x = x.to(tl.float32)
    if FAKE:
        value = fake_quantized(x, scale, HARDWARE, NARROW)
        tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        quotient = _quotient(x, scale, NARROW)
        if HARDWARE:
            code = with_sign(quotient, x).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            code = (encode_e4m3(quotient, HARDWARE) | sign_bit(x)).to(tl.uint8)
        tl.store(out_ptr + offsets, code, mask=inside)


@triton.jit
def _group_scales(
    given_scale_ptr,
    groups,
    blocks,
    inside,
    row_stride,
    block_stride,
    ROWS_PER_SCALE: tl.constexpr,
):
    """The given scales of `groups`."""
    row, block = groups // blocks, groups % blocks
    places = (row // ROWS_PER_SCALE).to(tl.int64) * row_stride + block * block_stride
    return tl.load(given_scale_ptr + places, mask=inside, other=1.0)


@triton.jit
def quantize_groups_kernel(
    x_ptr,
    out_ptr,
    given_scale_ptr,
    scale_ptr,
    columns,
    blocks,
    group_count,
    scale_row_stride,
    scale_block_stride,
    ROWS_PER_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    FAKE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Quantise GROUPS groups under the given scales or, where none are given, their own.

    Null pointers: no given scales; scales are not asked for; codes are not asked for.
    """
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    offsets, inside = _places_of(groups, columns, blocks, group_count, BLOCK)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    real = groups < group_count
    if given_scale_ptr is None:
        bits = magnitude_bits(x.to(tl.float32))
        amax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        scale = scale_from_amax(amax, 448.0)
    else:
        scale = _group_scales(
            given_scale_ptr,
            groups,
            blocks,
            real,
            scale_row_stride,
            scale_block_stride,
            ROWS_PER_SCALE,
        )
    if scale_ptr is not None:
        tl.store(scale_ptr + groups, scale, mask=real)
    if out_ptr is not None:
        _store(out_ptr, offsets, inside, x, scale[:, None], FAKE, HARDWARE)


@triton.jit
def quantize_long_rows_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    columns,
    BLOCK: tl.constexpr,
    FAKE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Quantise a row that no program can hold under its own scale: the second time it is read, it
    comes from a cache. Null pointers as in `quantize_groups_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + lane
        x = tl.load(x_ptr + row * columns + column, mask=column < columns, other=0.0)
        largest = tl.maximum(largest, magnitude_bits(x.to(tl.float32)))
    scale = scale_from_amax(tl.max(largest, axis=0).to(tl.float32, bitcast=True), 448.0)
    if scale_ptr is not None:
        tl.store(scale_ptr + row, scale)
    if out_ptr is not None:
        for start in range(0, columns, BLOCK):
            column = start + lane
            offsets, inside = row * columns + column, column < columns
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
            _store(out_ptr, offsets, inside, x, scale, FAKE, HARDWARE)


@triton.jit
def quantize_squares_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    rows,
    columns,
    SIDE: tl.constexpr,
    FAKE: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Quantise a block of SIDE x SIDE under its own scale. Null pointers as above."""
    square, blocks = tl.program_id(0), tl.cdiv(columns, SIDE)
    row = (square // blocks).to(tl.int64) * SIDE + tl.arange(0, SIDE)[:, None]
    column = square % blocks * SIDE + tl.arange(0, SIDE)[None, :]
    offsets, inside = row * columns + column, (row < rows) & (column < columns)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    bits = magnitude_bits(x.to(tl.float32))
    amax = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True)
    scale = scale_from_amax(amax, 448.0)
    if scale_ptr is not None:
        tl.store(scale_ptr + square, scale)
    if out_ptr is not None:
        _store(out_ptr, offsets, inside, x, scale, FAKE, HARDWARE)


@triton.jit
def partial_amax_kernel(x_ptr, amax_ptr, size, BLOCK: tl.constexpr):
    """amax[program] = the largest magnitude among every so-many-th block of a flat tensor."""
    lane = tl.arange(0, BLOCK)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        x = tl.load(x_ptr + start + lane, mask=start + lane < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude_bits(x))
    tl.store(amax_ptr + tl.program_id(0), tl.max(largest, axis=0).to(tl.float32, bitcast=True))


@triton.jit
def tensor_scale_kernel(amax_ptr, scale_ptr, count, BLOCK: tl.constexpr):
    """The scale of a tensor from what `partial_amax_kernel` found, at most BLOCK numbers."""
    lane = tl.arange(0, BLOCK)
    found = magnitude_bits(tl.load(amax_ptr + lane, mask=lane < count, other=0.0))
    amax = tl.max(found, axis=0).to(tl.float32, bitcast=True)
    tl.store(scale_ptr, scale_from_amax(amax, 448.0))


@triton.jit
def dequantize_kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    columns,
    blocks,
    group_count,
    scale_row_stride,
    scale_block_stride,
    ROWS_PER_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Values code * scale of GROUPS groups."""
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    offsets, inside = _places_of(groups, columns, blocks, group_count, BLOCK)
    code = tl.load(codes_ptr + offsets, mask=inside, other=0)
    scale = _group_scales(
        scale_ptr,
        groups,
        blocks,
        groups < group_count,
        scale_row_stride,
        scale_block_stride,
        ROWS_PER_SCALE,
    )
    value = decode_e4m3(code, HARDWARE) * scale[:, None]
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=inside)
