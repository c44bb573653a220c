"""INT4 in groups: element-wise kernels. A program works on whole groups of one or several rows."""

import triton
import triton.language as tl

from autoq.kernels._jit.rounding import (
    divide,
    encode_e4m3,
    magnitude_bits,
    round_e4m3,
    shared_divisor,
    sign_bit,
)


@triton.jit
def two_level_rate(group_scale, tensor_scale):
    """fp16(fp16(group scale) / tensor scale), limited to what float16 holds, as float32."""
    scale = group_scale.to(tl.float16).to(tl.float32)
    quotient = tl.math.div_rn(scale, tl.zeros_like(scale) + tensor_scale)
    limited = tl.minimum(quotient, 65504.0, propagate_nan=tl.PropagateNan.ALL)
    return limited.to(tl.float16).to(tl.float32)


@triton.jit
def unpacked(packed):
    """(columns of the first half, of the second half): codes of packed bytes, int32."""
    wide = packed.to(tl.int32)
    return (wide << 28) >> 28, (wide << 24) >> 28


@triton.jit
def with_sign_of(x, magnitude):
    """`magnitude` with the sign of `x`, -0.0 too."""
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _halves(program, groups, group_size, GROUPS: tl.constexpr, HALF: tl.constexpr):
    """Of a program: (groups [GROUPS, 1], columns [1, HALF] of half a group, what is inside)."""
    group = program.to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    return group, column, (group < groups) & (column < group_size // 2)


@triton.jit
def _scale_of(amax_bits, LARGEST: tl.constexpr, STORAGE: tl.constexpr):
    """Group scales amax / 7 as STORAGE holds them, at most LARGEST; NaN stays NaN."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.math.div_rn(amax, tl.zeros_like(amax) + 7.0)
    # No scale is below 2**-100; where the maximum is 0, or the scale too small to be stored, it is
    # the smallest number of float16.
    scale = tl.minimum(tl.maximum(scale, 7.888609052210118e-31), LARGEST)
    stored = scale.to(STORAGE).to(tl.float32)
    stored = tl.where((amax_bits == 0) | (stored == 0.0), 5.9604644775390625e-08, stored)
    return tl.where(amax_bits > 0x7F800000, amax, stored)


@triton.jit
def _code(x, power, normal, reciprocal):
    """round(x / scale) as a float32 number plus 1.5 * 2**23: the last bits are the code."""
    quotient = divide(tl.abs(x), power, normal, reciprocal)
    quotient = with_sign_of(x, quotient)
    # Limiting before rounding is the same, because both limits are integers.
    limited = tl.clamp(quotient, -8.0, 7.0, propagate_nan=tl.PropagateNan.ALL)
    return limited + 12582912.0


@triton.jit
def _value(code, factor, tensor_scale, TWO_LEVEL: tl.constexpr, HARDWARE: tl.constexpr):
    """code * group scale; in two levels e4m3(code * rate) * tensor scale, `factor` the rate."""
    product = code * factor
    if TWO_LEVEL:
        # A rate can round a code to zero, and -0.0 then stays.
        product = with_sign_of(product, round_e4m3(tl.abs(product), HARDWARE)) * tensor_scale
    return product


@triton.jit
def quantize_kernel(
    weight_ptr,
    given_scale_ptr,
    codes_ptr,
    scale_ptr,
    groups,
    group_size,
    LARGEST: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Codes and scales of GROUPS groups; a null pointer stands for scales to be computed."""
    group, column, inside = _halves(tl.program_id(0), groups, group_size, GROUPS, HALF)
    half = group_size // 2
    places = weight_ptr + group * group_size + column
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + half, mask=inside, other=0.0).to(tl.float32)
    if given_scale_ptr is None:
        bits = tl.max(tl.maximum(magnitude_bits(first), magnitude_bits(second)), axis=1)
        scale = _scale_of(bits[:, None], LARGEST, STORAGE)
        tl.store(scale_ptr + group, scale, mask=group < groups)
    else:
        scale = tl.load(given_scale_ptr + group, mask=group < groups, other=1.0)
    power, normal, reciprocal = shared_divisor(scale)
    low = _code(first, power, normal, reciprocal).to(tl.uint32, bitcast=True) & 0xF
    high = _code(second, power, normal, reciprocal).to(tl.uint32, bitcast=True) & 0xF
    packed = (low | (high << 4)).to(tl.uint8)
    tl.store(codes_ptr + group * half + column, packed, mask=inside)


@triton.jit
def fake_quantize_kernel(
    weight_ptr,
    given_scale_ptr,
    tensor_scale_ptr,
    out_ptr,
    groups,
    group_size,
    LARGEST: tl.constexpr,
    STORAGE: tl.constexpr,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """What is left of GROUPS groups; null pointers: no scales given, no second level."""
    TWO_LEVEL: tl.constexpr = tensor_scale_ptr is not None
    group, column, inside = _halves(tl.program_id(0), groups, group_size, GROUPS, HALF)
    half = group_size // 2
    places = group * group_size + column
    first = tl.load(weight_ptr + places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(weight_ptr + places + half, mask=inside, other=0.0).to(tl.float32)
    if given_scale_ptr is None:
        bits = tl.max(tl.maximum(magnitude_bits(first), magnitude_bits(second)), axis=1)
        scale = _scale_of(bits[:, None], LARGEST, STORAGE)
    else:
        scale = tl.load(given_scale_ptr + group, mask=group < groups, other=1.0)
    power, normal, reciprocal = shared_divisor(scale)
    factor, tensor_scale = scale, 1.0
    if TWO_LEVEL:
        tensor_scale = tl.load(tensor_scale_ptr)
        factor = two_level_rate(scale, tensor_scale)
    low = _code(first, power, normal, reciprocal) - 12582912.0
    high = _code(second, power, normal, reciprocal) - 12582912.0
    low = _value(low, factor, tensor_scale, TWO_LEVEL, HARDWARE)
    high = _value(high, factor, tensor_scale, TWO_LEVEL, HARDWARE)
    tl.store(out_ptr + places, low.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + places + half, high.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    codes_ptr,
    scale_ptr,
    tensor_scale_ptr,
    out_ptr,
    groups,
    group_size,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Values of GROUPS groups; a null pointer: no second level."""
    TWO_LEVEL: tl.constexpr = tensor_scale_ptr is not None
    group, column, inside = _halves(tl.program_id(0), groups, group_size, GROUPS, HALF)
    half = group_size // 2
    packed = tl.load(codes_ptr + group * half + column, mask=inside, other=0)
    factor, tensor_scale = tl.load(scale_ptr + group, mask=group < groups, other=1.0), 1.0
    if TWO_LEVEL:
        tensor_scale = tl.load(tensor_scale_ptr)
        factor = two_level_rate(factor, tensor_scale)
    low, high = unpacked(packed)
    low = _value(low.to(tl.float32), factor, tensor_scale, TWO_LEVEL, HARDWARE)
    high = _value(high.to(tl.float32), factor, tensor_scale, TWO_LEVEL, HARDWARE)
    places = out_ptr + group * group_size + column
    tl.store(places, low.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(places + half, high.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def e4m3_kernel(
    codes_ptr,
    scale_ptr,
    tensor_scale_ptr,
    out_ptr,
    groups,
    group_size,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """E4M3 codes of code * rate, as bytes, of GROUPS groups."""
    group, column, inside = _halves(tl.program_id(0), groups, group_size, GROUPS, HALF)
    half = group_size // 2
    packed = tl.load(codes_ptr + group * half + column, mask=inside, other=0)
    scale = tl.load(scale_ptr + group, mask=group < groups, other=1.0)
    rate = two_level_rate(scale, tl.load(tensor_scale_ptr))
    low, high = unpacked(packed)
    low, high = low.to(tl.float32) * rate, high.to(tl.float32) * rate
    low_code = encode_e4m3(tl.abs(low), HARDWARE) | sign_bit(low)
    high_code = encode_e4m3(tl.abs(high), HARDWARE) | sign_bit(high)
    places = out_ptr + group * group_size + column
    tl.store(places, low_code.to(tl.uint8), mask=inside)
    tl.store(places + half, high_code.to(tl.uint8), mask=inside)


@triton.jit
def largest_kernel(
    codes_ptr,
    scale_ptr,
    largest_ptr,
    groups,
    group_size,
    GROUPS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The largest |code * scale| among GROUPS groups: one number per program."""
    group, column, inside = _halves(tl.program_id(0), groups, group_size, GROUPS, HALF)
    places = codes_ptr + group * (group_size // 2) + column
    low, high = unpacked(tl.load(places, mask=inside, other=0))
    code = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=1)[:, None].to(tl.float32)
    scale = tl.load(scale_ptr + group, mask=group < groups, other=0.0)
    # As bits, because those of NaN are the largest.
    bits = magnitude_bits(code * scale)
    tl.store(largest_ptr + tl.program_id(0), tl.max(bits).to(tl.float32, bitcast=True))
