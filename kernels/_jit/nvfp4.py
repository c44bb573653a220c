"""NVFP4: element-wise kernels. A contiguous tensor is a list of blocks of 16."""

import triton
import triton.language as tl

from autoq.kernels._jit.e2m1 import decode_e2m1, encode_limited, round_limited
from autoq.kernels._jit.rounding import (
    decode_e4m3,
    divide,
    encode_e4m3,
    magnitude_bits,
    scale_from_amax,
    shared_divisor,
)

# The first operand goes to the high nibble.
_PAIR_CONVERSION = tl.constexpr("""{
.reg .b8 first, second, third, fourth;
cvt.rn.satfinite.e2m1x2.f32 first, $1, $5;
cvt.rn.satfinite.e2m1x2.f32 second, $2, $6;
cvt.rn.satfinite.e2m1x2.f32 third, $3, $7;
cvt.rn.satfinite.e2m1x2.f32 fourth, $4, $8;
mov.b32 $0, {first, second, third, fourth};
}""")


@triton.jit
def largest_vanishing(divisor):
    """The largest magnitude whose quotient by `divisor` is 0 in float32: 2**-150 of it, down."""
    halfway = divisor * 2.6469779601696886e-23
    nearest = halfway * 2.6469779601696886e-23
    bits = nearest.to(tl.int32, bitcast=True)
    rounded_up = nearest * 3.777893186295716e22 > halfway
    return tl.where(rounded_up, bits - 1, bits).to(tl.float32, bitcast=True)


@triton.jit
def block_scale_code(amax, global_scale):
    """E4M3 codes, uint32, of the scales of blocks: amax / (6 * global scale), at least 2**-9.

    1 where the quotient is zero, as in blocks of zeros; NaN where `amax` or the scale is.
    """
    divisor = 6.0 * global_scale
    power, normal, reciprocal = shared_divisor(divisor)
    scale = divide(amax, power, normal, reciprocal)
    scale = tl.where(scale < 0.001953125, 0.001953125, scale)
    scale = tl.where(amax <= largest_vanishing(divisor), 1.0, scale)
    return encode_e4m3(scale, False)


@triton.jit
def divided(x, power, normal, reciprocal):
    """min(|x| / step, 6), on the side of every boundary of E2M1 that the rounded quotient is on.

    The other arguments are `shared_divisor(step)`; where the step is NaN the result is 6, code 7.
    Beyond 6 by the last bit at most. One correction of the quotient suffices: the true one is
    further from what separates two codes than the error that is left, except for divisors next to
    1, 1.5 and 2, which the tests go through one by one.
    """
    limit = (6.0 * normal).to(tl.uint32, bitcast=True)
    scaled = tl.minimum((tl.abs(x) * power).to(tl.uint32, bitcast=True), limit)
    scaled = scaled.to(tl.float32, bitcast=True)
    quotient = scaled * reciprocal
    negative = (normal.to(tl.uint32, bitcast=True) | 0x80000000).to(tl.float32, bitcast=True)
    return tl.fma(tl.fma(quotient, negative, scaled), reciprocal, quotient)


@triton.jit
def signed(magnitude, negative):
    """Float32 magnitudes with a sign. As a bit: -x is 0 - x here, which has no -0.0."""
    bits = magnitude.to(tl.uint32, bitcast=True) | tl.where(negative, 0x80000000, 0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def converted_pairs(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """E2M1 codes of float32 [ROWS, COLUMNS] in bytes of two, as Blackwell converts them.

    To nearest, ties to even, saturating; -0.0 keeps its sign and NaN becomes 6.
    """
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    return tl.inline_asm_elementwise(
        _PAIR_CONVERSION,
        "=r,r,r,r,r,r,r,r,r",
        [odd, even],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def amax_kernel(x_ptr, partial_ptr, size, BLOCK: tl.constexpr):
    """partial [programs] = the largest magnitudes in parts of a flat tensor, as integers."""
    bits = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, size, tl.num_programs(0) * BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + places, mask=places < size, other=0.0)
        bits = tl.maximum(bits, magnitude_bits(x.to(tl.float32)))
    tl.store(partial_ptr + tl.program_id(0), tl.max(bits, axis=0))


@triton.jit
def global_scale_kernel(partial_ptr, scale_ptr, parts, MOST_PARTS: tl.constexpr):
    """scale [] = amax / (6 * 448); 1 if amax is 0, at least 2**-100; NaN if it is not finite."""
    places = tl.arange(0, MOST_PARTS)
    bits = tl.max(tl.load(partial_ptr + places, mask=places < parts, other=0), axis=0)
    scale = scale_from_amax(bits.to(tl.float32, bitcast=True), 2688.0)
    # Under infinity some values would be numbers, and wrong.
    tl.store(scale_ptr, tl.where(bits < 0x7F800000, scale, float("nan")))


@triton.jit
def quantize_kernel(
    x_ptr,
    codes_ptr,
    block_scale_ptr,
    global_scale_ptr,
    blocks,
    THREADS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes, a uint64 a block, and block scales. A thread has a block, in pieces of 16 bytes."""
    global_scale = tl.load(global_scale_ptr)
    places = tl.program_id(0).to(tl.int64) * (THREADS * STEPS) + tl.arange(0, THREADS)
    for turn in range(STEPS):
        rows = places + turn * THREADS
        inside = rows < blocks
        x_places = x_ptr + rows[:, None] * 16 + tl.arange(0, WIDTH)[None, :]
        bits = tl.zeros((THREADS,), tl.int32)
        for piece in tl.static_range(0, 16, WIDTH):
            x = tl.load(x_places + piece, mask=inside[:, None], other=0.0)
            bits = tl.maximum(bits, tl.max(magnitude_bits(x.to(tl.float32)), axis=1))
        scale = block_scale_code(bits.to(tl.float32, bitcast=True), global_scale)
        tl.store(block_scale_ptr + rows, scale.to(tl.uint8), mask=inside)
        step = decode_e4m3(scale, False) * global_scale
        power, normal, reciprocal = shared_divisor(step)
        vanishing = largest_vanishing(step)
        word = tl.zeros((THREADS,), tl.uint64)
        for piece in tl.static_range(0, 16, WIDTH):
            # The compiler keeps what it has loaded above.
            x = tl.load(x_places + piece, mask=inside[:, None], other=0.0).to(tl.float32)
            quotient = divided(x, power[:, None], normal[:, None], reciprocal[:, None])
            negative = x < -vanishing[:, None]
            if HARDWARE:
                codes = converted_pairs(signed(quotient, negative), THREADS, WIDTH).to(tl.uint32)
                part = tl.sum(codes << (tl.arange(0, WIDTH // 2) * 8)[None, :], axis=1)
            else:
                codes = encode_limited(quotient) + tl.where(negative, 8, 0).to(tl.uint32)
                part = tl.sum(codes << (tl.arange(0, WIDTH) * 4)[None, :], axis=1)
            word |= part.to(tl.uint64) << (4 * piece)
        tl.store(codes_ptr + rows, word, mask=inside)


@triton.jit
def fake_quantized(x, global_scale, WITH_GLOBAL: tl.constexpr):
    """What is left of float32 blocks [blocks, 16]; without the global scale, e2m1 * e4m3 only."""
    amax = tl.max(magnitude_bits(x), axis=1).to(tl.float32, bitcast=True)
    scale = decode_e4m3(block_scale_code(amax, global_scale), False)
    step = scale * global_scale
    power, normal, reciprocal = shared_divisor(step)
    quotient = divided(x, power[:, None], normal[:, None], reciprocal[:, None])
    factor = step if WITH_GLOBAL else scale
    value = round_limited(quotient) * factor[:, None]
    return signed(value, x < -largest_vanishing(step)[:, None])


@triton.jit
def fake_quantize_kernel(
    x_ptr, out_ptr, global_scale_ptr, blocks, BLOCKS: tl.constexpr, WITH_GLOBAL: tl.constexpr
):
    """What is left of x after quantising; without the global scale, e2m1 * e4m3 only."""
    rows = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (rows < blocks)[:, None]
    places = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    value = fake_quantized(x, tl.load(global_scale_ptr), WITH_GLOBAL)
    tl.store(out_ptr + places, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    codes_ptr,
    block_scale_ptr,
    global_scale_ptr,
    out_ptr,
    words,
    THREADS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Values of words of WIDTH codes: a thread has a word, and stores 16 bytes.

    Without a global scale, e2m1 * e4m3 only.
    """
    places = tl.program_id(0).to(tl.int64) * (THREADS * STEPS) + tl.arange(0, THREADS)
    shifts = (tl.arange(0, WIDTH) * 4)[None, :]
    for turn in tl.static_range(STEPS):
        rows = places + turn * THREADS
        inside = rows < words
        word = tl.load(codes_ptr + rows, mask=inside, other=0).to(tl.uint32)
        scale_places = block_scale_ptr + rows // (16 // WIDTH)
        factor = decode_e4m3(tl.load(scale_places, mask=inside, other=0), False)
        if global_scale_ptr is not None:
            factor *= tl.load(global_scale_ptr)
        value = decode_e2m1((word[:, None] >> shifts) & 0xF) * factor[:, None]
        out_places = out_ptr + rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(out_places, value.to(out_ptr.dtype.element_ty), mask=inside[:, None])
