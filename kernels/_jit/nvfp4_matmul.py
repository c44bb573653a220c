"""Products of NVFP4: two kernels, and `autoq.kernels._launch.nvfp4_matmul.variant` chooses.

Rows of all operands are contiguous and `blocks` blocks of 16 long. K_MULTIPLE, a power of two of at
most 256 that divides K, says how rows are aligned and whether tiles have a tail along K; tails are
read as zeros. Rows past the last one read that again, and are not stored. Global scales multiply
the sums. With SPLIT_K > 1 out is [SPLIT_K, m, n] and takes the sums of the parts, unscaled.
"""

import triton
import triton.language as tl

from autoq.kernels._jit.matmul import finished, part_of, tile_of
from autoq.kernels._jit.rounding import decode_e4m3

# Four bytes, eight codes, become four registers of two numbers each: the low nibbles of bytes 0 and
# 1, of 2 and 3, then the high ones. Two bytes are spread over the halves of a register, in which a
# multiplication puts the magnitude at the lowest bits of the exponent and the sign at the top.
_BFLOAT16_ASSEMBLY = tl.constexpr("""{
.reg .b32 spread, nibble;
prmt.b32 spread, $4, 0, 0x4140;
and.b32 nibble, spread, 0x000F000F;
mul.lo.u32 nibble, nibble, 0x1040;
and.b32 $0, nibble, 0x81C081C0;
and.b32 nibble, spread, 0x00F000F0;
mul.lo.u32 nibble, nibble, 0x0104;
and.b32 $2, nibble, 0x81C081C0;
prmt.b32 spread, $4, 0, 0x4342;
and.b32 nibble, spread, 0x000F000F;
mul.lo.u32 nibble, nibble, 0x1040;
and.b32 $1, nibble, 0x81C081C0;
and.b32 nibble, spread, 0x00F000F0;
mul.lo.u32 nibble, nibble, 0x0104;
and.b32 $3, nibble, 0x81C081C0;
}""")
# Here the two would overlap, so the sign is put in its place by itself.
_FLOAT16_ASSEMBLY = tl.constexpr("""{
.reg .b32 spread, sign, size;
prmt.b32 spread, $4, 0, 0x4140;
and.b32 sign, spread, 0x00080008;
and.b32 size, spread, 0x00070007;
shl.b32 size, size, 9;
mul.lo.u32 sign, sign, 0x1000;
add.u32 $0, sign, size;
and.b32 sign, spread, 0x00800080;
and.b32 size, spread, 0x00700070;
shl.b32 size, size, 5;
mul.lo.u32 sign, sign, 0x0100;
add.u32 $2, sign, size;
prmt.b32 spread, $4, 0, 0x4342;
and.b32 sign, spread, 0x00080008;
and.b32 size, spread, 0x00070007;
shl.b32 size, size, 9;
mul.lo.u32 sign, sign, 0x1000;
add.u32 $1, sign, size;
and.b32 sign, spread, 0x00800080;
and.b32 size, spread, 0x00700070;
shl.b32 size, size, 5;
mul.lo.u32 sign, sign, 0x0100;
add.u32 $3, sign, size;
}""")


@triton.jit
def raw_elements(packed, FLOAT16: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The even and the odd elements of bytes of two codes, as bfloat16 numbers, or float16.

    They are 2**-126 of what they stand for, or 2**-14: the bits of E2M1 are those of the wider
    type, subnormal numbers too, but for the bias of the exponent.
    """
    if ASSEMBLY:
        if FLOAT16:
            even, odd = tl.inline_asm_elementwise(
                _FLOAT16_ASSEMBLY,
                "=r,=r,=r,=r,r",
                [packed],
                dtype=(tl.float16, tl.float16),
                is_pure=True,
                pack=4,
            )
        else:
            even, odd = tl.inline_asm_elementwise(
                _BFLOAT16_ASSEMBLY,
                "=r,=r,=r,=r,r",
                [packed],
                dtype=(tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=4,
            )
    else:
        codes = packed.to(tl.uint16)
        if FLOAT16:
            even = (((codes & 7) << 9) | ((codes & 8) << 12)).to(tl.float16, bitcast=True)
            odd = (((codes & 0x70) << 5) | ((codes & 0x80) << 8)).to(tl.float16, bitcast=True)
        else:
            even = (((codes & 7) << 6) | ((codes & 8) << 12)).to(tl.bfloat16, bitcast=True)
            odd = (((codes & 0x70) << 2) | ((codes & 0x80) << 8)).to(tl.bfloat16, bitcast=True)
    return even, odd


@triton.jit
def rows_of(tile, size, stride, BLOCK: tl.constexpr):
    """Offsets [BLOCK, 1], int64, of a tile's rows; past the end that of the last row again."""
    return tl.minimum(tile * BLOCK + tl.arange(0, BLOCK), size - 1).to(tl.int64)[:, None] * stride


@triton.jit
def load_columns(pointers, first, end, COLUMNS: tl.constexpr, FULL: tl.constexpr):
    """Columns of some rows from `first` on; FULL says that none of them is behind the end."""
    place = first + tl.arange(0, COLUMNS)[None, :]
    if FULL:
        values = tl.load(pointers + place)
    else:
        values = tl.load(pointers + place, mask=place < end, other=0.0)
    return values


@triton.jit
def halves_of_words(words, FLOAT16: tl.constexpr):
    """The 16-bit numbers in the low and the high halves of int32: the even and the odd ones."""
    DTYPE: tl.constexpr = tl.float16 if FLOAT16 else tl.bfloat16
    low = (words & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    return low, (words >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def store_tile(
    sums,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    row_tile,
    column_tile,
    m,
    n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Write sums [BLOCK_M, BLOCK_N], scaled, plus the bias; or the sums of this part."""
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    places = rows.to(tl.int64) * n + columns
    if SPLIT_K > 1:
        places += tl.program_id(1) * (tl.cast(m, tl.int64) * n)
    else:
        sums = finished(
            sums, rows, columns, rows < m, columns < n, a_scale_ptr, 0, b_scale_ptr, 0, bias_ptr
        )
    tl.store(out_ptr + places, sums.to(out_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))


@triton.jit
def weight_only_kernel(
    x_ptr,
    codes_ptr,
    block_scale_ptr,
    out_ptr,
    input_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    blocks,
    m_bucket,
    K_MULTIPLE: tl.constexpr,
    FLOAT16: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    HARDWARE: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """x [m, k] @ w [n, k].T of bfloat16 or float16 x, read as int32 words of two.

    Even and odd columns are summed by products of their own: the nibbles of a byte need no place
    next to each other. e2m1 * e4m3 is exact in both types; as bfloat16 it is held 2**-8 times too
    small here, as float16 2**-7 times, so that no factor leaves the range of its type.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    SCALES: tl.constexpr = BLOCK_K // 16
    FULL: tl.constexpr = K_MULTIPLE % BLOCK_K == 0
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    aligned = blocks // (K_MULTIPLE // 16) * (K_MULTIPLE // 16)
    x_rows = x_ptr + rows_of(row_tile, m, aligned * 8, BLOCK_M)
    code_rows = codes_ptr + rows_of(column_tile, n, aligned * 8, BLOCK_N)
    scale_rows = block_scale_ptr + rows_of(column_tile, n, aligned, BLOCK_N)
    first, end = part_of(tl.program_id(1), tl.cdiv(k, BLOCK_K), SPLIT_K)
    if SWAP:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, end):
        words = load_columns(x_rows, step * HALF, blocks * 8, HALF, FULL)
        packed = load_columns(code_rows, step * HALF, blocks * 8, HALF, FULL)
        scales = load_columns(scale_rows, step * SCALES, blocks, SCALES, FULL)
        factor = decode_e4m3(scales, HARDWARE)
        if FLOAT16:
            factor = (factor * 128.0).to(tl.float16)
        else:
            factor = (factor * 3.3230699894622897e35).to(tl.bfloat16)
        factor = tl.broadcast_to(factor[:, :, None], (BLOCK_N, SCALES, 8))
        factor = tl.reshape(factor, (BLOCK_N, HALF))
        even, odd = raw_elements(packed, FLOAT16, ASSEMBLY)
        x_even, x_odd = halves_of_words(words, FLOAT16)
        if SWAP:
            sums = tl.dot(even * factor, x_even.T, sums)
            sums = tl.dot(odd * factor, x_odd.T, sums)
        else:
            sums = tl.dot(x_even, (even * factor).T, sums)
            sums = tl.dot(x_odd, (odd * factor).T, sums)
    if SWAP:
        sums = sums.T
    sums *= 128.0 if FLOAT16 else 256.0
    store_tile(
        sums,
        out_ptr,
        input_scale_ptr,
        weight_scale_ptr,
        bias_ptr,
        row_tile,
        column_tile,
        m,
        n,
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
    )


@triton.jit
def scaled_kernel(
    a_ptr,
    a_block_scale_ptr,
    b_ptr,
    b_block_scale_ptr,
    out_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    m,
    n,
    k,
    blocks,
    m_bucket,
    K_MULTIPLE: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """a [m, k] @ b [n, k].T by matrix units that take E2M1 with an E4M3 scale per 16.

    SWAP: as b @ a.T, where they take 128 rows at a time of the left operand, but as few as 8
    columns of the right one.
    """
    HALF: tl.constexpr = BLOCK_K // 2
    SCALES: tl.constexpr = BLOCK_K // 16
    FULL: tl.constexpr = K_MULTIPLE % BLOCK_K == 0
    row_tile, column_tile = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    aligned = blocks // (K_MULTIPLE // 16) * (K_MULTIPLE // 16)
    a_rows = a_ptr + rows_of(row_tile, m, aligned * 8, BLOCK_M)
    b_rows = b_ptr + rows_of(column_tile, n, aligned * 8, BLOCK_N)
    a_scale_rows = a_block_scale_ptr + rows_of(row_tile, m, aligned, BLOCK_M)
    b_scale_rows = b_block_scale_ptr + rows_of(column_tile, n, aligned, BLOCK_N)
    first, end = part_of(tl.program_id(1), tl.cdiv(k, BLOCK_K), SPLIT_K)
    if SWAP:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, end):
        a = load_columns(a_rows, step * HALF, blocks * 8, HALF, FULL)
        b = load_columns(b_rows, step * HALF, blocks * 8, HALF, FULL)
        a_scale = load_columns(a_scale_rows, step * SCALES, blocks, SCALES, FULL)
        b_scale = load_columns(b_scale_rows, step * SCALES, blocks, SCALES, FULL)
        if SWAP:
            sums = tl.dot_scaled(b, b_scale, "e2m1", a.T, a_scale, "e2m1", sums)
        else:
            sums = tl.dot_scaled(a, a_scale, "e2m1", b.T, b_scale, "e2m1", sums)
    if SWAP:
        sums = sums.T
    store_tile(
        sums,
        out_ptr,
        a_scale_ptr,
        b_scale_ptr,
        bias_ptr,
        row_tile,
        column_tile,
        m,
        n,
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
    )


@triton.jit
def split_float32_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out [3, size] bfloat16 = numbers whose sum is float32 x [size]: its bits, eight at a time.

    Cut off, not rounded, so that no part is larger than x and the rests are exact. Infinity and NaN
    are their own rests.
    """
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < size
    rest = tl.load(x_ptr + places, mask=inside, other=0.0)
    finite = tl.abs(rest) < float("inf")
    for part in tl.static_range(3):
        bits = rest.to(tl.uint32, bitcast=True) & 0xFFFF0000
        leading = tl.where(finite, bits.to(tl.float32, bitcast=True), rest)
        tl.store(
            out_ptr + tl.cast(size, tl.int64) * part + places, leading.to(tl.bfloat16), mask=inside
        )
        rest = tl.where(finite, rest - leading, rest)
