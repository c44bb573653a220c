"""Products with INT4 weights, of bfloat16 or float16 inputs and of E4M3 codes.

Weights are the left operand: matrix units take it from registers, where codes are decoded, and the
input, as it lies in shared memory, is the right one. A step takes the columns of one group, or 128
of them, in two dots, one for each half of the group, because a byte holds a column of each.
"""

import triton
import triton.language as tl

from autoq.kernels._jit.int4 import two_level_rate
from autoq.kernels._jit.int4_decode import decoded, decoded_two_level
from autoq.kernels._jit.matmul import finished, part_of, tile_of


@triton.jit
def _load(pointers, place, WIDTH: tl.constexpr, STEP: tl.constexpr):
    """STEP columns [1, WIDTH] from `place` on, zeros behind them."""
    column = tl.arange(0, WIDTH)[None, :]
    if WIDTH == STEP:
        columns = tl.load(pointers + (place + column))
    else:
        columns = tl.load(pointers + (place + column), mask=column < STEP, other=0.0)
    return columns


@triton.jit
def matmul_kernel(
    x_ptr,
    codes_ptr,
    group_scale_ptr,
    tensor_scale_ptr,
    out_ptr,
    row_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    row_bytes,
    groups,
    row_scale_stride,
    m_bucket,
    GROUP: tl.constexpr,
    NARROWEST: tl.constexpr,
    PTX: tl.constexpr,
    HARDWARE: tl.constexpr,
    ONE_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of x [m, k] @ weight [n, k].T, scaled, plus bias.

    Codes are [n, row_bytes], group scales [n, groups]; without a tensor scale a weight is code *
    group scale, with one it is e4m3(code * rate) * tensor scale. With SPLIT_K > 1 the sums of a part
    go to out [SPLIT_K, m, n], unscaled but for the groups. ONE_SUM: products of all steps go to one
    sum of the matrix unit; else it begins anew every step. NARROWEST: columns of the narrowest dot.
    """
    TWO_LEVEL: tl.constexpr = tensor_scale_ptr is not None
    HALF: tl.constexpr = GROUP // 2
    STEP: tl.constexpr = BLOCK_K // 2 if BLOCK_K < GROUP else HALF
    STEPS: tl.constexpr = HALF // STEP  # of a group
    WIDTH: tl.constexpr = max(STEP, NARROWEST)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    part = tl.program_id(1)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end repeat the last one and are not stored.
    inside_columns = tl.minimum(columns, n - 1).to(tl.int64)
    x_rows = x_ptr + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * k
    code_rows = codes_ptr + inside_columns[:, None] * row_bytes
    scale_rows = group_scale_ptr + inside_columns * groups
    tensor_scale = 1.0
    if TWO_LEVEL:
        tensor_scale = tl.load(tensor_scale_ptr)
    first, end = part_of(part, groups * STEPS, SPLIT_K)
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    # Scales are fetched one step ahead, for they are not among the loads that triton pipelines.
    scale = tl.load(scale_rows + tl.minimum(first // STEPS, groups - 1))
    for step in range(first, end):
        next_scale = tl.load(scale_rows + tl.minimum((step + 1) // STEPS, groups - 1))
        packed = _load(code_rows, step * STEP, WIDTH, STEP)
        column = step // STEPS * GROUP + step % STEPS * STEP
        x_low = _load(x_rows, column, WIDTH, STEP)
        x_high = _load(x_rows, column + HALF, WIDTH, STEP)
        if TWO_LEVEL:
            rate = two_level_rate(scale, tensor_scale)[:, None]
            low, high = decoded_two_level(packed, rate, DTYPE, PTX, HARDWARE)
        else:
            low, high = decoded(packed, DTYPE, PTX)
        if ONE_SUM:
            sums = tl.dot(high, x_high.T, tl.dot(low, x_low.T, sums))
        else:
            step_sums = tl.dot(high, x_high.T, tl.dot(low, x_low.T))
            sums += step_sums if TWO_LEVEL else step_sums * scale[:, None]
        scale = next_scale
    sums = sums.T
    inside_m, inside_n = (rows < m)[:, None], (columns < n)[None, :]
    places = rows.to(tl.int64)[:, None] * n + columns[None, :]
    if SPLIT_K > 1:
        places += part * (tl.cast(m, tl.int64) * n)
    else:
        sums = finished(
            sums,
            rows[:, None],
            columns[None, :],
            inside_m,
            inside_n,
            row_scale_ptr,
            row_scale_stride,
            tensor_scale_ptr,
            0,
            bias_ptr,
        )
    tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=inside_m & inside_n)
