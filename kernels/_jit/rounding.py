"""Division and rounding that give the reference's bits on every target."""

import triton
import triton.language as tl


@triton.jit
def shared_divisor(scale):
    """What `divide` needs of a positive scale: (power of two, scale in [1, 2), its reciprocal)."""
    bits = scale.to(tl.uint32, bitcast=True)
    power = ((254 - (bits >> 23)) << 23).to(tl.float32, bitcast=True)
    normal = scale * power
    return power, normal, tl.math.div_rn(tl.zeros_like(normal) + 1.0, normal)


@triton.jit
def divide(magnitude, power, normal, reciprocal):
    """magnitude / scale, correctly rounded wherever it is below 1024 and normal.

    One division per scale and four fused operations per value, instead of a division per value.
    The residual is exact because `normal` is in [1, 2); the second correction makes the quotient
    the correctly rounded one (Markstein, IBM J. Res. Dev. 34, 1990). Larger quotients stay larger
    than 448, infinity and NaN stay what they are.
    """
    scaled = magnitude * power
    quotient = tl.minimum(scaled * reciprocal, 1024.0)
    quotient = tl.fma(tl.fma(-quotient, normal, scaled), reciprocal, quotient)
    return tl.fma(tl.fma(-quotient, normal, scaled), reciprocal, quotient)


@triton.jit
def sign_bit(x):
    """The sign of float32 `x` as 0x80 or 0, uint32."""
    return (x.to(tl.uint32, bitcast=True) >> 24) & 0x80


@triton.jit
def encode_e4m3(magnitude, HARDWARE: tl.constexpr):
    """E4M3 codes of float32 magnitudes as uint32: nearest, ties to even, saturating; NaN 0x7F."""
    is_nan = magnitude != magnitude  # noqa: PLR0124 - triton has no isnan
    limited = tl.minimum(magnitude, 448.0)
    if HARDWARE:
        code = limited.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.uint32)
    else:
        bits = limited.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        # Below the smallest normal number the step is 2**-9, the last bit of 16384.
        subnormal = (limited + 16384.0).to(tl.uint32, bitcast=True) & 0xF
        code = tl.where(limited < 0.015625, subnormal, normal)
    return tl.where(is_nan, 0x7F, code)


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
