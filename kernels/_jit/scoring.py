"""Scoring's sums: statistics of channels, and matrix products that are reduced as they are made.

No program adds to what another one wrote. Each writes its own sums and a second, small kernel adds
them in order, so that the result does not depend on which program ends first.
"""

import triton
import triton.language as tl

from autoq.kernels._jit import fp8, nvfp4
from autoq.kernels._jit.matmul import tile_of
from autoq.kernels._jit.rounding import magnitude_bits


@triton.jit
def _fake_quantized(
    x, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr, NVFP4: tl.constexpr, HARDWARE: tl.constexpr
):
    """What is left of float32 x [ROWS, COLUMNS] under `scale`: a scalar, or [ROWS, 1] for FP8."""
    if NVFP4:
        blocks = tl.reshape(x, (ROWS * COLUMNS // 16, 16))
        value = tl.reshape(nvfp4.fake_quantized(blocks, scale, True), (ROWS, COLUMNS))
    else:
        value = fp8.fake_quantized(x, scale, HARDWARE)
    return value


@triton.jit
def statistics_kernel(
    x_ptr,
    values_ptr,
    scale_ptr,
    partial_ptr,
    rows,
    k,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_SCALES: tl.constexpr,
    NVFP4: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Statistics of ROWS * steps rows of COLUMNS channels, to partial [statistics, programs, k].

    They are the largest |x| and the sum of |x|; where there is room for fake-quantised values,
    those are stored and the sums of x**2 and of (value - x)**2 follow.
    """
    program = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, ROWS)
    bits = tl.zeros((ROWS, COLUMNS), tl.int32)
    absolute = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    error_square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        row = (program.to(tl.int64) * steps + step) * ROWS + lane
        inside = (row < rows)[:, None] & (column < k)[None, :]
        places = row[:, None] * k + column[None, :]
        x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, magnitude_bits(x))
        absolute += tl.abs(x)
        if values_ptr is not None:
            if ROW_SCALES:
                scale = tl.load(scale_ptr + row, mask=row < rows, other=1.0)[:, None]
            else:
                scale = tl.load(scale_ptr)
            value = _fake_quantized(x, scale, ROWS, COLUMNS, NVFP4, HARDWARE)
            value = value.to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + places, value, mask=inside)
            error = value.to(tl.float32) - x
            square += x * x
            error_square += error * error
    size = tl.num_programs(0).to(tl.int64) * k
    partial_ptr += program.to(tl.int64) * k + column
    amax = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
    tl.store(partial_ptr, amax, mask=column < k)
    tl.store(partial_ptr + size, tl.sum(absolute, axis=0), mask=column < k)
    if values_ptr is not None:
        tl.store(partial_ptr + 2 * size, tl.sum(square, axis=0), mask=column < k)
        tl.store(partial_ptr + 3 * size, tl.sum(error_square, axis=0), mask=column < k)


@triton.jit
def add_statistics_kernel(partial_ptr, amax_ptr, sums_ptr, programs, k, BLOCK: tl.constexpr):
    """amax [k] and float64 sums [statistics - 1, k] of partial [statistics, programs, k]."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    statistic = tl.program_id(1)
    inside = column < k
    partial_ptr += statistic.to(tl.int64) * programs * k + column
    if statistic == 0:
        bits = tl.zeros((BLOCK,), tl.int32)
        for _ in range(programs):
            amax = tl.load(partial_ptr, mask=inside, other=0.0)
            bits = tl.maximum(bits, magnitude_bits(amax))
            partial_ptr += k
        tl.store(amax_ptr + column, bits.to(tl.float32, bitcast=True), mask=inside)
    else:
        total = tl.zeros((BLOCK,), tl.float64)
        for _ in range(programs):
            total += tl.load(partial_ptr, mask=inside, other=0.0).to(tl.float64)
            partial_ptr += k
        tl.store(sums_ptr + (statistic - 1) * k + column, total, mask=inside)


@triton.jit
def _reduced(sums, rows, first, changed_ptr, exact_ptr, input_gradient_ptr, m, n):
    """Sums over the columns from `first` on of sums * x' + (x' - x) * (g W)."""
    columns = first + tl.arange(0, sums.shape[1])
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    places = rows.to(tl.int64)[:, None] * n + columns[None, :]
    changed = tl.load(changed_ptr + places, mask=inside, other=0.0).to(tl.float32)
    sums *= changed
    changed -= tl.load(exact_ptr + places, mask=inside, other=0.0).to(tl.float32)
    sums += changed * tl.load(input_gradient_ptr + places, mask=inside, other=0.0).to(tl.float32)
    # Outside, infinity in the gradient would have made NaN of the zeros.
    return tl.sum(tl.where(inside, sums, 0.0), axis=1)


@triton.jit
def project_kernel(
    gradient_ptr,
    weight_ptr,
    scale_ptr,
    changed_ptr,
    exact_ptr,
    input_gradient_ptr,
    partial_ptr,
    m,
    n,
    k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    NVFP4: tl.constexpr,
    HARDWARE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """partial [tiles of n, m] = sums over a tile's columns of product * x' + (x' - x) * (g W).

    The product is gradient [m, k] @ dW [k, n]: as in all products here k is what is summed over,
    and n, the channels of the input, is what the epilogue reduces. dW is weight or, where there is
    a scale, fake_quantize(weight) - weight.
    """
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_columns = columns < n
    inner = tl.arange(0, BLOCK_K)
    gradient_rows = gradient_ptr + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * k
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        place = start + inner
        gradient = tl.load(gradient_rows + place[None, :], mask=place[None, :] < k, other=0.0)
        error = tl.load(
            weight_ptr + place.to(tl.int64)[:, None] * n + columns[None, :],
            mask=(place[:, None] < k) & inside_columns[None, :],
            other=0.0,
        )
        if scale_ptr is not None:
            exact = error.to(tl.float32)
            value = _fake_quantized(exact, tl.load(scale_ptr), BLOCK_K, BLOCK_N, NVFP4, HARDWARE)
            error = (value - exact).to(gradient_ptr.dtype.element_ty)
        sums = tl.dot(gradient, error, sums, input_precision=PRECISION)
    # In halves: the epilogue reads three numbers for each of the sums, and registers are few.
    halves = tl.permute(tl.reshape(sums, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    first = column_tile * BLOCK_N
    total = _reduced(left, rows, first, changed_ptr, exact_ptr, input_gradient_ptr, m, n)
    total += _reduced(
        right, rows, first + BLOCK_N // 2, changed_ptr, exact_ptr, input_gradient_ptr, m, n
    )
    tl.store(partial_ptr + column_tile.to(tl.int64) * m + rows, total, mask=rows < m)


@triton.jit
def add_projections_kernel(partial_ptr, out_ptr, m, parts, BLOCK: tl.constexpr):
    """out [m] = the sum of partial [parts, m], first part first."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < m
    partial_ptr += rows
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(partial_ptr, mask=inside, other=0.0)
        partial_ptr += m
    tl.store(out_ptr + rows, total, mask=inside)
