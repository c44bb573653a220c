"""E2M1, the 4-bit element of NVFP4 and MXFP4, by integer arithmetic that any target has.

Codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4 and 6; bit 3 is the sign.
"""

import triton
import triton.language as tl


@triton.jit
def limit_to_six(magnitude):
    """min(magnitude, 6) of float32 that is not negative; NaN becomes 6 on every target.

    As integers, because targets disagree on what the smaller of NaN and a number is.
    """
    bits = tl.minimum(magnitude.to(tl.uint32, bitcast=True), 0x40C00000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode_limited(limited):
    """`encode_e2m1` of magnitudes that are in 0..6 already.

    The code is 2x up to 2, x + 2 up to 4 and x / 2 + 4 up to 6, rounded: always the least of the
    three. Adding 2**23 rounds to integers, ties to even, and an even code is an even integer.
    """
    first = tl.fma(limited, 2.0, 8388608.0).to(tl.uint32, bitcast=True)
    second = (limited + 8388610.0).to(tl.uint32, bitcast=True)
    third = tl.fma(limited, 0.5, 8388612.0).to(tl.uint32, bitcast=True)
    return tl.minimum(tl.minimum(first, second), third) - 0x4B000000


@triton.jit
def encode_e2m1(magnitude):
    """E2M1 codes 0..7 of float32 magnitudes as uint32: ties to even, saturating; NaN is 7."""
    return encode_limited(limit_to_six(magnitude))


@triton.jit
def round_limited(limited):
    """`round_e2m1` of magnitudes that are in 0..6 already.

    The addend is 1.5 * 2**22 times the power of two at the magnitude, between 1 and 4: its last
    bit is the step there, half that power.
    """
    power = tl.maximum(limited.to(tl.uint32, bitcast=True) & 0x7F800000, 0x3F800000)
    addend = (power + 0x0B400000).to(tl.float32, bitcast=True)
    return (limited + addend) - addend


@triton.jit
def round_e2m1(magnitude):
    """The E2M1 numbers nearest to float32 magnitudes, ties to even, saturating; NaN becomes 6."""
    return round_limited(limit_to_six(magnitude))


@triton.jit
def decode_e2m1(code):
    """Float32 numbers of E2M1 codes 0..15, uint32; code 8 is -0.0."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    # The bits are 2**-126 of the number; 0.5 is a subnormal number here, which no target flushes.
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def pack_pairs(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """uint32 codes [ROWS, COLUMNS] as uint8 [ROWS, COLUMNS / 2], the even one in the low nibble."""
    even, odd = tl.split(tl.reshape(codes, (ROWS, COLUMNS // 2, 2)))
    return (even | (odd << 4)).to(tl.uint8)


@triton.jit
def unpack_pairs(packed, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Undo `pack_pairs`: uint8 [ROWS, COLUMNS / 2] to uint32 codes [ROWS, COLUMNS]."""
    packed = packed.to(tl.uint32)
    return tl.reshape(tl.join(packed & 0xF, packed >> 4), (ROWS, COLUMNS))
