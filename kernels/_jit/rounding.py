"""Division and rounding that give the reference's bits on every target."""

import triton
import triton.language as tl


@triton.jit
def shared_divisor(scale):
    """What `divide` needs of a positive scale: (power of two, scale in [2, 4), its reciprocal).

    Under the scale infinity finite numbers become 0; under NaN all become NaN.
    """
    exponent = scale.to(tl.uint32, bitcast=True) >> 23
    power = ((255 - exponent) << 23).to(tl.float32, bitcast=True)
    normal = tl.where(exponent == 255, 2.0, scale * power)
    power = tl.where(scale != scale, scale, power)  # noqa: PLR0124 - triton has no isnan
    return power, normal, tl.math.div_rn(tl.zeros_like(normal) + 1.0, normal)


@triton.jit
def divide(magnitude, power, normal, reciprocal):
    """magnitude / scale, correctly rounded wherever it is below 1024 and normal.

    One division per scale and four fused operations per value, instead of a division per value.
    The residual is exact because `normal` is near 1; the second correction makes the quotient the
    correctly rounded one (Markstein, IBM J. Res. Dev. 34, 1990). Larger quotients, infinity too,
    stay at least 1024; NaN stays NaN.
    """
    scaled = tl.minimum(magnitude * power, 4096.0, propagate_nan=tl.PropagateNan.ALL)
    quotient = scaled * reciprocal
    # A set sign bit: -x is 0 - x here, an operation per value that the compiler may fuse.
    negative = (normal.to(tl.uint32, bitcast=True) | 0x80000000).to(tl.float32, bitcast=True)
    quotient = tl.fma(tl.fma(quotient, negative, scaled), reciprocal, quotient)
    return tl.fma(tl.fma(quotient, negative, scaled), reciprocal, quotient)


@triton.jit
def shared_reciprocal(scale):
    """What `divide_narrow` needs of a positive scale: (power of two, its reciprocal in two parts).

    Infinity and NaN as in `shared_divisor`.
    """
    power, normal, high = shared_divisor(scale)
    rest = tl.fma(-normal, high, tl.zeros_like(normal) + 1.0)
    low = rest * high
    return power, high, tl.fma(tl.fma(-normal, low, rest), high, low)


@triton.jit
def divide_narrow(magnitude, power, high, low):
    """magnitude / scale for magnitudes of 11 significant bits, as float16 and bfloat16 have.

    Beside a threshold of up to 8 significant bits it stands as the correctly rounded quotient does,
    below, equal or above; so what is then rounded to E4M3, E2M1 or INT8, whose thresholds are
    midpoints, is right. The error before the last rounding is below 2**-46 of the quotient. What
    decides are the ends of the interval that float32 rounds to the threshold, and of all scales
    none brings a quotient closer to one than 2**-40; but for powers of two over the scale 2 - 2**-23,
    where all but the last rounding is exact. test_fp8_division.py counts samples of that.
    Large quotients, infinity and NaN as in `divide`.
    """
    scaled = tl.minimum(magnitude * power, 4096.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.fma(scaled, high, scaled * low)


@triton.jit
def magnitude_bits(x):
    """The bits of |x|, int32, which order as the numbers do, infinity and then NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_from_amax(amax, LARGEST: tl.constexpr):
    """amax / LARGEST, 1 where amax is 0, never below 2**-100; infinity and NaN stay."""
    scale = tl.math.div_rn(amax, tl.zeros_like(amax) + LARGEST)
    scale = tl.where(scale < 7.888609052210118e-31, 7.888609052210118e-31, scale)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def with_sign(magnitude, x):
    """The float32 magnitude with the sign of float32 x."""
    sign = x.to(tl.uint32, bitcast=True) & 0x80000000
    return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def sign_bit(x):
    """The sign of float32 `x` as 0x80 or 0, uint32."""
    return (x.to(tl.uint32, bitcast=True) >> 24) & 0x80


@triton.jit
def encode_e4m3(magnitude, HARDWARE: tl.constexpr):
    """E4M3 codes of float32 magnitudes as uint32: nearest, ties to even, saturating; NaN 0x7F."""
    limited = tl.minimum(magnitude, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if HARDWARE:
        code = limited.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)
    else:
        bits = limited.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        # Below the smallest normal number the step is 2**-9, the last bit of 16384.
        subnormal = (limited + 16384.0).to(tl.uint32, bitcast=True) & 0xF
        code = tl.where(limited < 0.015625, subnormal, normal)
        code = tl.where(limited == limited, code, 0x7F)  # noqa: PLR0124
    return code


@triton.jit
def round_e4m3(magnitude, HARDWARE: tl.constexpr):
    """What E4M3 makes of float32 magnitudes, float32: `encode_e4m3` and back; NaN stays NaN."""
    limited = tl.minimum(magnitude, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if HARDWARE:
        value = limited.to(tl.float8e4nv).to(tl.float32)
    else:
        bits = limited.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        normal = bits.to(tl.float32, bitcast=True)
        subnormal = (limited + 16384.0) - 16384.0
        value = tl.where(limited < 0.015625, subnormal, normal)
        value = tl.where(limited == limited, value, limited)  # noqa: PLR0124
    return value


@triton.jit
def decode_e4m3(code, HARDWARE: tl.constexpr):
    """Float32 numbers of E4M3 codes, uint8."""
    if HARDWARE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        code = code.to(tl.uint32)
        bits = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
        # The bits are 2**-120 of the number, so that a code without exponent is normal here too.
        value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    return value
