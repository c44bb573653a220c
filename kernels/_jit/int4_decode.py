"""INT4 codes as operands of matrix units: E4M3, bfloat16 or float16 numbers, all exact.

On NVIDIA targets PTX works on four packed bytes at a time, because every instruction per weight
shows in products with few rows: 13 for eight weights, where triton's own conversions take 32 to 44.
Elsewhere, and where E4M3 numbers have to be float16, triton's operations do the same.

E4M3 takes a table of eight bytes through the byte permutation instruction. A nibble as it is would
be an E4M3 number too, of 2**-9 of the magnitude, and a tenth cheaper; but its numbers are subnormal,
nobody has proved that all matrix units here honour those, and in two levels a table is needed anyway.
"""

import triton
import triton.language as tl

from autoq.kernels._jit.int4 import unpacked, with_sign_of
from autoq.kernels._jit.rounding import encode_e4m3, round_e4m3, sign_bit

_PAIR = """
prmt.b32 pair, {source}, 0, {bytes};
lop3.b32 pair, pair, {mask}, magic, 0x6A;
fma.rn.{type}x2 {out}, pair, factor, offset;"""

# A nibble in the last bits of 128 is 128 + 8 + code once its sign bit is flipped.
BFLOAT16_PTX = tl.constexpr(
    """{
.reg .b32 pair, high, magic, factor, offset;
mov.b32 magic, 0x43084308;
mov.b32 factor, 0x3F803F80;
mov.b32 offset, 0xC308C308;
shr.u32 high, $4, 4;"""
    + "".join(
        _PAIR.format(source=source, bytes=two, mask="0x000F000F", type="bf16", out=f"${place}")
        for place, (source, two) in enumerate(
            [("$4", "0x4140"), ("$4", "0x4342"), ("high", "0x4140"), ("high", "0x4342")]
        )
    )
    + "\n}"
)

# In the last bits of 1024 there is room for the other nibble too, as 16 * (8 + code).
FLOAT16_PTX = tl.constexpr(
    """{
.reg .b32 pair, magic, factor, offset;
mov.b32 magic, 0x64086408;
mov.b32 factor, 0x3C003C00;
mov.b32 offset, 0xE408E408;"""
    + "".join(
        _PAIR.format(source="$4", bytes=two, mask="0x000F000F", type="f16", out=f"${place}")
        for place, two in enumerate(["0x4140", "0x4342"])
    )
    + """
mov.b32 magic, 0x64806480;
mov.b32 factor, 0x2C002C00;
mov.b32 offset, 0xD480D480;"""
    + "".join(
        _PAIR.format(source="$4", bytes=two, mask="0x00F000F0", type="f16", out=f"${place + 2}")
        for place, two in enumerate(["0x4140", "0x4342"])
    )
    + "\n}"
)

# Every nibble becomes 8 - |code|, 0 to 8. The permutation takes the table's byte of that number;
# for 8 it repeats the sign of byte 0, which is 0. Nibbles come out in the order of memory, first and
# second half of the group in turn.
_LOOKUP = """{{
.reg .b32 place, flip, first, second, sign;
// one row: {rows}
shr.u32 flip, $2, 3;
not.b32 flip, flip;
and.b32 flip, flip, 0x11111111;
mul.lo.u32 place, flip, 15;
xor.b32 place, place, 0x88888888;
xor.b32 place, place, $2;
add.u32 place, place, flip;
prmt.b32 first, {table}, place;
shr.u32 place, place, 16;
prmt.b32 second, {table}, place;
prmt.b32 place, first, second, 0x6420;
prmt.b32 flip, first, second, 0x7531;
shl.b32 sign, $2, 4;
and.b32 sign, sign, 0x80808080;
or.b32 $0, place, sign;
and.b32 sign, $2, 0x80808080;
or.b32 $1, flip, sign;
}}"""
# E4M3 of 8, 7, 6, 5 and of 4, 3, 2, 1, the first in the lowest byte.
E4M3_PTX = tl.constexpr(_LOOKUP.format(table="0x4A4C4E50, 0x38404448", rows="any"))
# Operands 3 to 6 and 7 to 10 are the table of each of the four bytes; tests see to it that they are
# the same.
E4M3_TABLE_PTX = tl.constexpr(_LOOKUP.format(table="$3, $7", rows="$3 $4 $5 $6, $7 $8 $9 $10"))

# Products of a 4-bit number and a float16 are exact in float32.
TABLE_PTX = tl.constexpr(
    """{
.reg .f32 even, odd;
.reg .b16 low, high;"""
    + "".join(
        f"""
mul.f32 even, $2, {even};
mul.f32 odd, $2, {odd};
cvt.rn.satfinite.e4m3x2.f32 {half}, odd, even;"""
        + (f"\nmov.b32 {out}, {{low, high}};" if half == "high" else "")
        for even, odd, half, out in [
            ("0f41000000", "0f40E00000", "low", ""),
            ("0f40C00000", "0f40A00000", "high", "$0"),
            ("0f40800000", "0f40400000", "low", ""),
            ("0f40000000", "0f3F800000", "high", "$1"),
        ]
    )
    + "\n}"
)


@triton.jit
def decoded(packed, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """(first half, second half) of packed codes as numbers of DTYPE."""
    if not PTX:
        low, high = unpacked(packed)
        low, high = low.to(tl.float32).to(DTYPE), high.to(tl.float32).to(DTYPE)
    elif DTYPE is tl.float8e4nv:
        low, high = tl.inline_asm_elementwise(
            E4M3_PTX, "=r,=r,r", [packed], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
        low, high = low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)
    elif DTYPE is tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            BFLOAT16_PTX,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low, high = tl.inline_asm_elementwise(
            FLOAT16_PTX,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def decoded_two_level(packed, rate, DTYPE: tl.constexpr, PTX: tl.constexpr, HARDWARE: tl.constexpr):
    """(first half, second half) of e4m3(code * rate), float32 rate [rows, 1], as DTYPE.

    PTX: only where DTYPE is E4M3.
    """
    if PTX:
        # A table of negative numbers would be read wrongly.
        rate = tl.where(rate >= 0.0, rate, float("nan"))
        eight_to_five, four_to_one = tl.inline_asm_elementwise(
            TABLE_PTX, "=r,=r,r", [rate], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1
        )
        low, high = tl.inline_asm_elementwise(
            E4M3_TABLE_PTX,
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, eight_to_five, four_to_one],
            dtype=(tl.uint8, tl.uint8),
            is_pure=True,
            pack=4,
        )
        low, high = low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)
    else:
        low, high = unpacked(packed)
        low = _rounded(low.to(tl.float32) * rate, DTYPE, HARDWARE)
        high = _rounded(high.to(tl.float32) * rate, DTYPE, HARDWARE)
    return low, high


@triton.jit
def _rounded(product, DTYPE: tl.constexpr, HARDWARE: tl.constexpr):
    """E4M3 numbers as DTYPE, E4M3 itself or float16."""
    if DTYPE is tl.float8e4nv:
        code = encode_e4m3(tl.abs(product), HARDWARE) | sign_bit(product)
        number = code.to(tl.uint8).to(DTYPE, bitcast=True)
    else:
        number = with_sign_of(product, round_e4m3(tl.abs(product), HARDWARE)).to(DTYPE)
    return number
