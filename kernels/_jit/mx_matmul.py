"""Products of MXFP8 and MXFP4: three kernels, and `autoq.kernels._launch.mx_variant` chooses.

Rows of all operands are contiguous and `blocks` blocks of 32 long. K_MULTIPLE, a power of two of at
most 256 that divides K, says how rows are aligned and whether tiles have a tail along K; tails are
read as zeros. Rows past the last one read that again, and are not stored. With SPLIT_K > 1 the sums
of a part go to out [SPLIT_K, m, n] as float32.
"""

import triton
import triton.language as tl

from autoq.kernels._jit.matmul import finished, part_of, tile_of
from autoq.kernels._jit.mx import decode_e8m0
from autoq.kernels._jit.nvfp4_matmul import (
    halves_of_words,
    load_columns,
    raw_elements,
    rows_of,
)
from autoq.kernels._jit.rounding import decode_e4m3


@triton.jit
def aligned_blocks(blocks, K_MULTIPLE: tl.constexpr):
    """`blocks`, in a form that shows the compiler what divides it."""
    return blocks // (K_MULTIPLE // 32) * (K_MULTIPLE // 32)


@triton.jit
def widen_e2m1(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """E2M1 pairs [ROWS, COLUMNS / 2] as E4M3 [ROWS, COLUMNS], 2**-6 of the numbers.

    Both types have subnormal numbers, so the bits of E2M1 are at once those of E4M3, two places up.
    """
    even = ((packed & 7) << 2) | ((packed & 8) << 4)
    odd = ((packed >> 2) & 0x1C) | (packed & 0x80)
    codes = tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))
    return codes.to(tl.float8e4nv, bitcast=True)


@triton.jit
def store_tile(
    sums,
    out_ptr,
    bias_ptr,
    row_tile,
    column_tile,
    m,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Write sums [BLOCK_M, BLOCK_N] plus the bias, or those of this part."""
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < m) & (columns < n)
    places = rows.to(tl.int64) * n + columns
    if SPLIT_K > 1:
        places += tl.program_id(1) * (tl.cast(m, tl.int64) * n)
    else:
        sums = finished(sums, rows, columns, rows < m, columns < n, None, 0, None, 0, bias_ptr)
    tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scaled_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    blocks,
    m_bucket,
    K_MULTIPLE: tl.constexpr,
    A_E2M1: tl.constexpr,
    B_E2M1: tl.constexpr,
    WIDEN: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """a [m, k] @ b [n, k].T by matrix units that take E8M0 scales.

    WIDEN: as E4M3 where the units do not mix it with E2M1. SWAP: as b @ a.T where they take 128
    rows at a time of the left operand, but as few as 8 columns of the right one.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 32
    A_BYTES: tl.constexpr = 16 if A_E2M1 else 32
    B_BYTES: tl.constexpr = 16 if B_E2M1 else 32
    A_TYPE: tl.constexpr = "e2m1" if A_E2M1 else "e4m3"
    B_TYPE: tl.constexpr = "e2m1" if B_E2M1 and not WIDEN else "e4m3"
    FULL: tl.constexpr = K_MULTIPLE % BLOCK_K == 0
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    length = aligned_blocks(blocks, K_MULTIPLE)
    a_rows = a_ptr + rows_of(row_tile, m, length * A_BYTES, BLOCK_M)
    b_rows = b_ptr + rows_of(column_tile, n, length * B_BYTES, BLOCK_N)
    a_scale_rows = a_scale_ptr + rows_of(row_tile, m, length, BLOCK_M)
    b_scale_rows = b_scale_ptr + rows_of(column_tile, n, length, BLOCK_N)
    start, end = part_of(tl.program_id(1), tl.cdiv(blocks, BLOCKS), SPLIT_K)
    if SWAP:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(start, end):
        first = step * BLOCKS
        a = load_columns(a_rows, first * A_BYTES, blocks * A_BYTES, BLOCKS * A_BYTES, FULL)
        b = load_columns(b_rows, first * B_BYTES, blocks * B_BYTES, BLOCKS * B_BYTES, FULL)
        a_scale = load_columns(a_scale_rows, first, blocks, BLOCKS, FULL)
        b_scale = load_columns(b_scale_rows, first, blocks, BLOCKS, FULL)
        if WIDEN:
            b = widen_e2m1(b, BLOCK_N, BLOCK_K)
        if SWAP:
            sums = tl.dot_scaled(b, b_scale, B_TYPE, a.T, a_scale, A_TYPE, sums)
        else:
            sums = tl.dot_scaled(a, a_scale, A_TYPE, b.T, b_scale, B_TYPE, sums)
    if SWAP:
        sums = sums.T
    if WIDEN:
        sums *= 64.0
    store_tile(sums, out_ptr, bias_ptr, row_tile, column_tile, m, n, BLOCK_M, BLOCK_N, SPLIT_K)


@triton.jit
def grouped_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    blocks,
    m_bucket,
    K_MULTIPLE: tl.constexpr,
    B_E2M1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """a [m, k] E4M3 @ b [n, k].T by matrix units for FP8, a block of 32 at a time.

    Each block's sum of exact products is multiplied by the product of its scales and added in
    float32. Scales whose product is 2**128 or more overflow.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 32
    B_BYTES: tl.constexpr = 16 if B_E2M1 else 32
    FULL: tl.constexpr = K_MULTIPLE % BLOCK_K == 0
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    length = aligned_blocks(blocks, K_MULTIPLE)
    a_rows = a_ptr + rows_of(row_tile, m, length * 32, BLOCK_M)
    b_rows = b_ptr + rows_of(column_tile, n, length * B_BYTES, BLOCK_N)
    a_scale_rows = a_scale_ptr + rows_of(row_tile, m, length, BLOCK_M)
    b_scale_rows = b_scale_ptr + rows_of(column_tile, n, length, BLOCK_N)
    start, end = part_of(tl.program_id(1), tl.cdiv(blocks, BLOCKS), SPLIT_K)
    number = tl.arange(0, BLOCKS)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(start, end):
        first = step * BLOCKS
        a_scales = load_columns(a_scale_rows, first, blocks, BLOCKS, FULL).to(tl.uint32)
        b_scales = load_columns(b_scale_rows, first, blocks, BLOCKS, FULL).to(tl.uint32)
        for block in tl.static_range(BLOCKS):
            place = first + block
            a = load_columns(a_rows, place * 32, blocks * 32, 32, FULL)
            b = load_columns(b_rows, place * B_BYTES, blocks * B_BYTES, B_BYTES, FULL)
            if B_E2M1:
                b = widen_e2m1(b, BLOCK_N, 32)
            # Picking one of a few bytes that a thread holds.
            a_scale = decode_e8m0(tl.sum(tl.where(number == block, a_scales, 0), axis=1))
            b_scale = decode_e8m0(tl.sum(tl.where(number == block, b_scales, 0), axis=1))
            sums += tl.dot(a, b.T) * (a_scale[:, None] * b_scale[None, :])
    if B_E2M1:
        sums *= 64.0
    store_tile(sums, out_ptr, bias_ptr, row_tile, column_tile, m, n, BLOCK_M, BLOCK_N, SPLIT_K)


@triton.jit
def repeated(scales, ROWS: tl.constexpr, BLOCKS: tl.constexpr, TIMES: tl.constexpr):
    """Numbers [ROWS, BLOCKS] as [ROWS, BLOCKS * TIMES], each TIMES times in a row."""
    return tl.reshape(
        tl.broadcast_to(scales[:, :, None], (ROWS, BLOCKS, TIMES)), (ROWS, BLOCKS * TIMES)
    )


@triton.jit
def e2m1_values(packed, scale, FLOAT16: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The even and the odd values of bytes of two codes, under uint32 E8M0 bytes of their shape."""
    even, odd = raw_elements(packed, FLOAT16, ASSEMBLY)
    if FLOAT16:
        # Above byte 240 nothing but zero is a float16, and 2**14 times the scale no float32.
        factor = decode_e8m0(tl.where(scale == 255, scale, tl.minimum(scale, 240))) * 16384.0
        even = (even.to(tl.float32) * factor).to(tl.float16)
        odd = (odd.to(tl.float32) * factor).to(tl.float16)
    else:
        # One factor for both steps would overflow where the scale is above 2.
        factor = decode_e8m0(scale).to(tl.bfloat16)
        unit = tl.full((1, 1), 8.507059173023462e37, tl.float32).to(tl.bfloat16)
        even, odd = even * unit * factor, odd * unit * factor
    return even, odd


@triton.jit
def upcast_kernel(
    a_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    m,
    n,
    k,
    blocks,
    m_bucket,
    K_MULTIPLE: tl.constexpr,
    B_E2M1: tl.constexpr,
    FLOAT16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """a [m, k] of bfloat16 or float16 values @ b [n, k].T, what dequantising to that type gives.

    `a` is read as int32 words of two. Even and odd columns of E2M1 are summed by products of their
    own: the nibbles of a byte need no place next to each other.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 32
    FULL: tl.constexpr = K_MULTIPLE % BLOCK_K == 0
    DTYPE: tl.constexpr = tl.float16 if FLOAT16 else tl.bfloat16
    B_BYTES: tl.constexpr = 16 if B_E2M1 else 32
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    length = aligned_blocks(blocks, K_MULTIPLE)
    b_rows = b_ptr + rows_of(column_tile, n, length * B_BYTES, BLOCK_N)
    b_scale_rows = b_scale_ptr + rows_of(column_tile, n, length, BLOCK_N)
    start, end = part_of(tl.program_id(1), tl.cdiv(blocks, BLOCKS), SPLIT_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(start, end):
        first = step * BLOCKS
        b = load_columns(b_rows, first * B_BYTES, blocks * B_BYTES, BLOCKS * B_BYTES, FULL)
        scale = load_columns(b_scale_rows, first, blocks, BLOCKS, FULL).to(tl.uint32)
        if B_E2M1:
            a_rows = a_ptr + rows_of(row_tile, m, length * 16, BLOCK_M)
            words = load_columns(a_rows, first * 16, blocks * 16, BLOCKS * 16, FULL)
            a_even, a_odd = halves_of_words(words, FLOAT16)
            scale = repeated(scale, BLOCK_N, BLOCKS, 16)
            even, odd = e2m1_values(b, scale, FLOAT16, ASSEMBLY)
            sums = tl.dot(a_even, even.T, sums)
            sums = tl.dot(a_odd, odd.T, sums)
        else:
            a_rows = a_ptr + rows_of(row_tile, m, length * 32, BLOCK_M)
            a = load_columns(a_rows, first * 32, blocks * 32, BLOCK_K, FULL)
            scale = repeated(decode_e8m0(scale), BLOCK_N, BLOCKS, 32)
            b = (decode_e4m3(b, HARDWARE) * scale).to(DTYPE)
            sums = tl.dot(a, b.T, sums)
    store_tile(sums, out_ptr, bias_ptr, row_tile, column_tile, m, n, BLOCK_M, BLOCK_N, SPLIT_K)
