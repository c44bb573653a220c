"""Products of bfloat16 or float16 inputs with INT8 weights: codes widened in registers.

Weights are the left operand: matrix units take it from registers, where codes are widened, and the
rows of the input, few while decoding, are columns of the instruction. Every code is a number of
both dtypes, and the scale belongs to a row of the weight, so that it waits until all is summed.
"""

import triton
import triton.language as tl

from autoq.kernels._jit.matmul import finished, part_of, tile_of


@triton.jit
def matmul_kernel(
    x_ptr,
    codes_ptr,
    out_ptr,
    column_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    m_bucket,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of x [m, k] @ codes [n, k].T, scaled, plus bias; with SPLIT_K > 1 a part's sums.

    The parts go to out [SPLIT_K, m, n] as float32, unscaled.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    part = tl.program_id(1)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = part_of(part, tl.cdiv(k, BLOCK_K), SPLIT_K)
    inner = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one and are not stored.
    x_rows = x_ptr + tl.minimum(rows, m - 1).to(tl.int64) * k
    code_rows = codes_ptr + tl.minimum(columns, n - 1).to(tl.int64) * k
    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in range(first, end):
        place = block * BLOCK_K + inner
        codes = tl.load(code_rows[:, None] + place[None, :], mask=place[None, :] < k, other=0)
        x = tl.load(x_rows[None, :] + place[:, None], mask=place[:, None] < k, other=0.0)
        sums = tl.dot(codes.to(DTYPE), x, sums)
    sums = sums.T
    inside_rows, inside_columns = (rows < m)[:, None], (columns < n)[None, :]
    places = rows.to(tl.int64)[:, None] * n + columns[None, :]
    if SPLIT_K > 1:
        places += part * (tl.cast(m, tl.int64) * n)
    else:
        sums = finished(
            sums,
            rows[:, None],
            columns[None, :],
            inside_rows,
            inside_columns,
            None,
            0,
            column_scale_ptr,
            1,
            bias_ptr,
        )
    tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=inside_rows & inside_columns)
