"""INT8 with one scale per row: element-wise kernels."""

import triton
import triton.language as tl

from autoq.kernels._jit.rounding import divide, magnitude_bits, scale_from_amax, shared_divisor


@triton.jit
def _encode(x, scale):
    """Codes, int32, of float32 x [rows, columns] under scale [rows, 1]; 0 where that is no number."""
    power, normal, reciprocal = shared_divisor(scale)
    magnitude = tl.minimum(divide(tl.abs(x), power, normal, reciprocal), 127.0)
    # The last bits of 2**23 + magnitude are the nearest integer, ties to even.
    code = ((magnitude + 8388608.0).to(tl.uint32, bitcast=True) & 0xFF).to(tl.int32)
    code = tl.where(x < 0, -code, code)
    return tl.where(scale < float("inf"), code, 0)


@triton.jit
def _store_encoded(out_ptr, offsets, inside, x, scale, FAKE: tl.constexpr):
    code = _encode(x, scale)
    if FAKE:
        # Codes have one zero, so -0.0 does not come back.
        value = (code.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, value, mask=inside)
    else:
        tl.store(out_ptr + offsets, code.to(tl.int8), mask=inside)


@triton.jit
def quantize_kernel(
    x_ptr,
    given_scale_ptr,
    out_ptr,
    scale_ptr,
    rows,
    k,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    FAKE: tl.constexpr,
):
    """Codes of ROWS rows and their scales; with FAKE the values code * scale, and no scales.

    Rows longer than BLOCK_K are read twice, the second time from the level-2 cache.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_K)[None, :]
    row_inside = row < rows
    inside = row_inside & (column < k)
    offsets = row * k + column
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    bits = magnitude_bits(x)
    if not ONE_BLOCK:
        for start in range(BLOCK_K, k, BLOCK_K):
            more = row_inside & (start + column < k)
            x = tl.load(x_ptr + offsets + start, mask=more, other=0.0).to(tl.float32)
            bits = tl.maximum(bits, magnitude_bits(x))
    amax = tl.max(bits, axis=1)[:, None].to(tl.float32, bitcast=True)
    scale = scale_from_amax(amax, 127.0)
    if HAS_SCALE:
        # NaN has no code: a row that holds one keeps it in its scale.
        given = tl.load(given_scale_ptr + row, mask=row_inside, other=1.0)
        scale = tl.where(amax == amax, given, amax)  # noqa: PLR0124 - triton has no isnan
    if ONE_BLOCK:
        _store_encoded(out_ptr, offsets, inside, x, scale, FAKE)
    else:
        for start in range(0, k, BLOCK_K):
            more = row_inside & (start + column < k)
            x = tl.load(x_ptr + offsets + start, mask=more, other=0.0).to(tl.float32)
            _store_encoded(out_ptr, offsets + start, more, x, scale, FAKE)
    if not FAKE:
        tl.store(scale_ptr + row, scale, mask=row_inside)


@triton.jit
def dequantize_kernel(
    codes_ptr, scale_ptr, out_ptr, rows, k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Values code * scale of one tile."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    inside = (row < rows) & (column < k)
    code = tl.load(codes_ptr + row * k + column, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=1.0)
    value = (code * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * k + column, value, mask=inside)
