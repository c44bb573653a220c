"""Products of INT8 codes: exact sums in int32, scaled on the way out."""

import triton
import triton.language as tl

from autoq.kernels._jit.matmul import finished, part_of, tile_of


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    row_scale_ptr,
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
    """One tile of a [m, k] @ b [n, k].T, scaled, plus bias; with SPLIT_K > 1 the sums of one part.

    The parts go to out [SPLIT_K, m, n] as int32. k is a multiple of 16, so that rows are aligned.
    """
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    part = tl.program_id(1)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first, end = part_of(part, tl.cdiv(k, BLOCK_K), SPLIT_K)
    inner = tl.arange(0, BLOCK_K)
    # Rows past the end repeat the last one and are not stored.
    a_rows = a_ptr + tl.minimum(rows, m - 1).to(tl.int64) * k
    b_rows = b_ptr + tl.minimum(columns, n - 1).to(tl.int64) * k
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for block in range(first, end):
        place = block * BLOCK_K + inner
        a = tl.load(a_rows[:, None] + place[None, :], mask=place[None, :] < k, other=0)
        b = tl.load(b_rows[None, :] + place[:, None], mask=place[:, None] < k, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    inside_rows, inside_columns = (rows < m)[:, None], (columns < n)[None, :]
    places = rows.to(tl.int64)[:, None] * n + columns[None, :]
    if SPLIT_K > 1:
        places += part * (tl.cast(m, tl.int64) * n)
        tl.store(out_ptr + places, sums, mask=inside_rows & inside_columns)
    else:
        values = finished(
            sums.to(tl.float32),
            rows[:, None],
            columns[None, :],
            inside_rows,
            inside_columns,
            row_scale_ptr,
            1,
            column_scale_ptr,
            1,
            bias_ptr,
        )
        values = values.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + places, values, mask=inside_rows & inside_columns)
