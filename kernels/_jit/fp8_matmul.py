"""Products of E4M3 codes, summed in float32, scaled on the way out or block by block.

Rows of all operands are contiguous, and k is a multiple of 16. Codes are of triton's E4M3 type
where the target has matrix units for it; elsewhere they are bytes, and become float16, exactly.
"""

import triton
import triton.language as tl

from autoq.kernels._jit.matmul import finished, part_of, tile_of


@triton.jit
def _load(row_pointers, place, k, FULL: tl.constexpr):
    """Columns `place` of some rows, zeros behind the last; FULL says that there are none."""
    if FULL:
        codes = tl.load(row_pointers + place)
    else:
        codes = tl.load(row_pointers + place, mask=place < k, other=0.0)
    return codes


@triton.jit
def _operand(codes, NATIVE: tl.constexpr):
    """Codes as the matrix unit takes them."""
    if not NATIVE:
        wide = codes.to(tl.uint16)
        bits = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
        # The bits are 2**-8 of the number; NaN has its own in float16.
        value = bits.to(tl.float16, bitcast=True) * 256.0
        codes = tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
    return codes


@triton.jit
def _product(left, right, sums, UNIT_SCALES: tl.constexpr):
    """left @ right.T + sums.

    UNIT_SCALES multiplies with block scales of 1, for which sm_120 has an instruction of twice the
    rate, with the same result.
    """
    if UNIT_SCALES:
        left_scales = tl.full((left.shape[0], left.shape[1] // 32), 127, tl.uint8)
        right_scales = tl.full((right.shape[0], right.shape[1] // 32), 127, tl.uint8)
        sums = tl.dot_scaled(left, left_scales, "e4m3", right.T, right_scales, "e4m3", sums)
    else:
        sums = tl.dot(left, right.T, sums)
    return sums


@triton.jit
def _store_tile(
    out_ptr,
    sums,
    rows,
    columns,
    m,
    n,
    row_scale_ptr,
    row_scale_stride,
    column_scale_ptr,
    column_scale_stride,
    bias_ptr,
):
    inside_rows, inside_columns = (rows < m)[:, None], (columns < n)[None, :]
    values = finished(
        sums,
        rows[:, None],
        columns[None, :],
        inside_rows,
        inside_columns,
        row_scale_ptr,
        row_scale_stride,
        column_scale_ptr,
        column_scale_stride,
        bias_ptr,
    )
    places = rows.to(tl.int64)[:, None] * n + columns[None, :]
    values = values.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, values, mask=inside_rows & inside_columns)


@triton.jit
def scaled_kernel(
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
    row_scale_stride,
    column_scale_stride,
    K_MULTIPLE: tl.constexpr,
    NATIVE: tl.constexpr,
    UNIT_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of a [m, k] @ b [n, k].T, scaled, plus bias.

    With SPLIT_K > 1 out is [SPLIT_K, m, n], takes the sums of the parts, and the pointers to scales
    and bias are null. K_MULTIPLE is a power of two that divides k.
    """
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end repeat the last one and are not stored.
    a_rows = a_ptr + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * k
    b_rows = b_ptr + tl.minimum(columns, n - 1).to(tl.int64)[:, None] * k
    inner = tl.arange(0, BLOCK_K)[None, :]
    part = tl.program_id(1)
    first, end = part_of(part, tl.cdiv(k, BLOCK_K), SPLIT_K)
    # Matrix units want at least 64 rows on their left: where a has few, b takes that side.
    SWAP: tl.constexpr = BLOCK_M < 64
    sums = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(first, end):
        place = block * BLOCK_K + inner
        a = _operand(_load(a_rows, place, k, K_MULTIPLE % BLOCK_K == 0), NATIVE)
        b = _operand(_load(b_rows, place, k, K_MULTIPLE % BLOCK_K == 0), NATIVE)
        sums = _product(b, a, sums, UNIT_SCALES) if SWAP else _product(a, b, sums, UNIT_SCALES)
    if SWAP:
        sums = sums.T
    _store_tile(
        out_ptr + part.to(tl.int64) * m * n,
        sums,
        rows,
        columns,
        m,
        n,
        row_scale_ptr,
        row_scale_stride,
        column_scale_ptr,
        column_scale_stride,
        bias_ptr,
    )


@triton.jit
def block_scaled_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    m_bucket,
    K_MULTIPLE: tl.constexpr,
    ROWS_PER_SCALE: tl.constexpr,
    NATIVE: tl.constexpr,
    UNIT_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of a @ b.T with a scale for each BLOCK_K columns of a row of a, and for as many
    columns of ROWS_PER_SCALE rows of b: the product of each block times both is added up."""
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    real_rows, real_columns = tl.minimum(rows, m - 1), tl.minimum(columns, n - 1)
    a_rows = a_ptr + real_rows.to(tl.int64)[:, None] * k
    b_rows = b_ptr + real_columns.to(tl.int64)[:, None] * k
    inner = tl.arange(0, BLOCK_K)[None, :]
    blocks = tl.cdiv(k, BLOCK_K)
    a_scales = a_scale_ptr + real_rows * blocks
    if ROWS_PER_SCALE % BLOCK_N == 0:
        b_scales = b_scale_ptr + column_tile * BLOCK_N // ROWS_PER_SCALE * blocks
        b_scales += tl.zeros((1,), tl.int32)
    else:
        b_scales = b_scale_ptr + real_columns // ROWS_PER_SCALE * blocks
    part = tl.program_id(1)
    first, end = part_of(part, blocks, SPLIT_K)
    SWAP: tl.constexpr = BLOCK_M < 64  # as in scaled_kernel
    sums = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(first, end):
        place = block * BLOCK_K + inner
        a = _operand(_load(a_rows, place, k, K_MULTIPLE % BLOCK_K == 0), NATIVE)
        b = _operand(_load(b_rows, place, k, K_MULTIPLE % BLOCK_K == 0), NATIVE)
        a_scale, b_scale = tl.load(a_scales + block), tl.load(b_scales + block)
        nothing = tl.zeros(sums.shape, dtype=tl.float32)
        if SWAP:
            scale = b_scale[:, None] * a_scale[None, :]
            sums += _product(b, a, nothing, UNIT_SCALES) * scale
        else:
            scale = a_scale[:, None] * b_scale[None, :]
            sums += _product(a, b, nothing, UNIT_SCALES) * scale
    if SWAP:
        sums = sums.T
    _store_tile(
        out_ptr + part.to(tl.int64) * m * n,
        sums,
        rows,
        columns,
        m,
        n,
        None,
        0,
        None,
        0,
        bias_ptr,
    )


@triton.jit
def _store_halves(
    out_descriptor,
    sums,
    row,
    column,
    m,
    n,
    row_scale_ptr,
    row_scale_stride,
    column_scale_ptr,
    column_scale_stride,
    bias_ptr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store a tile left half first: a whole one on its way out would take the place of a stage of
    loads."""
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    rows = row + tl.arange(0, BLOCK_M)
    for half in tl.static_range(2):
        columns = column + half * HALF + tl.arange(0, HALF)
        values = finished(
            left if half == 0 else right,
            rows[:, None],
            columns[None, :],
            (rows < m)[:, None],
            (columns < n)[None, :],
            row_scale_ptr,
            row_scale_stride,
            column_scale_ptr,
            column_scale_stride,
            bias_ptr,
        )
        out_descriptor.store([row, column + half * HALF], values.to(out_descriptor.dtype))


@triton.jit
def persistent_kernel(
    a_descriptor,
    b_descriptor,
    out_descriptor,
    row_scale_ptr,
    column_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    m_bucket,
    row_scale_stride,
    column_scale_stride,
    UNIT_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Every so-many-th tile of a @ b.T, scaled, plus bias; tiles are moved by tensor descriptors,
    which read zeros outside and write nothing there. The loops over tiles and over k are made one,
    so that the first loads of a tile are under way while the one before is stored."""
    tl.static_assert(SPLIT_K == 1)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = tile_of(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for block in range(tl.cdiv(k, BLOCK_K)):
            a = a_descriptor.load([row, block * BLOCK_K])
            b = b_descriptor.load([column, block * BLOCK_K])
            sums = _product(a, b, sums, UNIT_SCALES)
        _store_halves(
            out_descriptor,
            sums,
            row,
            column,
            m,
            n,
            row_scale_ptr,
            row_scale_stride,
            column_scale_ptr,
            column_scale_stride,
            bias_ptr,
            BLOCK_M,
            BLOCK_N,
        )


@triton.jit
def persistent_block_scaled_kernel(
    a_descriptor,
    b_descriptor,
    out_descriptor,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    m_bucket,
    ROWS_PER_SCALE: tl.constexpr,
    UNIT_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`block_scaled_kernel` in the way of `persistent_kernel`."""
    tl.static_assert(SPLIT_K == 1 and ROWS_PER_SCALE % BLOCK_N == 0)
    tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    blocks = tl.cdiv(k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = tile_of(tile, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = row_tile * BLOCK_M, column_tile * BLOCK_N
        a_scales = a_scale_ptr + tl.minimum(row + tl.arange(0, BLOCK_M), m - 1) * blocks
        b_scales = b_scale_ptr + column // ROWS_PER_SCALE * blocks
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for block in range(blocks):
            a = a_descriptor.load([row, block * BLOCK_K])
            b = b_descriptor.load([column, block * BLOCK_K])
            scale = tl.load(a_scales + block) * tl.load(b_scales + block)
            nothing = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            sums += _product(a, b, nothing, UNIT_SCALES) * scale[:, None]
        _store_halves(
            out_descriptor,
            sums,
            row,
            column,
            m,
            n,
            None,
            0,
            None,
            0,
            bias_ptr,
            BLOCK_M,
            BLOCK_N,
        )
