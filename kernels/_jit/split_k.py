"""The second half of a matrix product whose sum over K was cut into parts."""

import triton
import triton.language as tl

from autoq.kernels._jit.matmul import finished


@triton.jit
def reduce_kernel(
    partial_ptr,
    out_ptr,
    row_scale_ptr,
    column_scale_ptr,
    bias_ptr,
    m,
    n,
    row_scale_stride,
    column_scale_stride,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [m, n] = the sum of partial [SPLIT_K, m, n], first part first, scaled, plus the bias."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = tl.cast(m, tl.int64) * n  # m is a constant where it is 1
    inside = places < size
    rows, columns = places // n, places % n
    sums = tl.load(partial_ptr + places, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT_K):
        sums += tl.load(partial_ptr + part * size + places, mask=inside, other=0.0)
    sums = finished(
        sums,
        rows,
        columns,
        inside,
        inside,
        row_scale_ptr,
        row_scale_stride,
        column_scale_ptr,
        column_scale_stride,
        bias_ptr,
    )
    tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=inside)
