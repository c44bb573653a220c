"""MXFP8 and MXFP4: element-wise kernels, and their E8M0 scales.

Tensors are contiguous and rows whole blocks, so a tensor is a list of blocks of 32. E4M3 codes
travel as bytes, because sm_80 has no type for them.
"""

import triton
import triton.language as tl

from autoq.kernels._jit.e2m1 import (
    decode_e2m1,
    encode_e2m1,
    pack_pairs,
    round_e2m1,
    unpack_pairs,
)
from autoq.kernels._jit.rounding import decode_e4m3, encode_e4m3, round_e4m3, sign_bit


@triton.jit
def decode_e8m0(byte):
    """2**(byte - 127) of uint32 bytes: byte 0 is a subnormal float32, 255 is NaN."""
    bits = tl.where(byte == 255, 0x7FC00000, tl.maximum(byte << 23, 0x00400000))
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def scale_of_block(x, INCREMENT: tl.constexpr, LARGEST_EXPONENT: tl.constexpr):
    """E8M0 bytes, uint32 [blocks, 1], of float32 [blocks, 32].

    The bits of magnitudes order as the numbers do, infinity and NaN above all; INCREMENT carries
    into the exponent where the rule rounds up.
    """
    bits = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(bits, axis=1)[:, None]
    exponent = tl.minimum((amax + INCREMENT) >> 23, 254)
    byte = tl.maximum(exponent, LARGEST_EXPONENT) - LARGEST_EXPONENT
    return tl.where(amax >= 0x7F800000, 255, byte)


@triton.jit
def scaled(x, byte):
    """x / 2**(byte - 127), exact but for results near zero; 0 where the byte is 255."""
    inverse = ((254 - tl.minimum(byte, 253)) << 23).to(tl.float32, bitcast=True)
    return tl.where(byte == 255, 0.0, x * inverse)


@triton.jit
def places_of(BLOCKS: tl.constexpr, blocks):
    """Numbers [BLOCKS, 1] of this program's blocks, and which of them there are."""
    numbers = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    return numbers, numbers < blocks


@triton.jit
def load_blocks(x_ptr, numbers, inside):
    """Float32 [blocks, 32]."""
    offsets = numbers * 32 + tl.arange(0, 32)[None, :]
    return tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    blocks,
    INCREMENT: tl.constexpr,
    E2M1: tl.constexpr,
    BLOCKS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Codes and E8M0 bytes of BLOCKS blocks."""
    numbers, inside = places_of(BLOCKS, blocks)
    x = load_blocks(x_ptr, numbers, inside)
    byte = scale_of_block(x, INCREMENT, 2 if E2M1 else 8)
    x = scaled(x, byte)
    if E2M1:
        codes = encode_e2m1(tl.abs(x)) | tl.where(x < 0, 8, 0)
        offsets = numbers * 16 + tl.arange(0, 16)[None, :]
        tl.store(codes_ptr + offsets, pack_pairs(codes.to(tl.uint32), BLOCKS, 32), mask=inside)
    else:
        codes = encode_e4m3(tl.abs(x), HARDWARE) | sign_bit(x)
        offsets = numbers * 32 + tl.arange(0, 32)[None, :]
        tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=inside)
    tl.store(scale_ptr + numbers, byte.to(tl.uint8), mask=inside)


@triton.jit
def fake_quantize_kernel(
    x_ptr,
    out_ptr,
    blocks,
    INCREMENT: tl.constexpr,
    E2M1: tl.constexpr,
    BLOCKS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """What BLOCKS blocks are after quantising and dequantising."""
    numbers, inside = places_of(BLOCKS, blocks)
    x = load_blocks(x_ptr, numbers, inside)
    byte = scale_of_block(x, INCREMENT, 2 if E2M1 else 8)
    x = scaled(x, byte)
    # The sign as a bit: triton's -x is 0 - x, which has no -0.0.
    if E2M1:
        sign = tl.where(x < 0, 1 << 31, 0).to(tl.uint32)
        magnitude = round_e2m1(tl.abs(x))
    else:
        sign = x.to(tl.uint32, bitcast=True) & (1 << 31)
        magnitude = round_e4m3(tl.abs(x), HARDWARE)
    value = (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    value = (value * decode_e8m0(byte)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + numbers * 32 + tl.arange(0, 32)[None, :], value, mask=inside)


@triton.jit
def dequantize_kernel(
    codes_ptr,
    scale_ptr,
    out_ptr,
    blocks,
    E2M1: tl.constexpr,
    BLOCKS: tl.constexpr,
    HARDWARE: tl.constexpr,
):
    """Values element * scale of BLOCKS blocks."""
    numbers, inside = places_of(BLOCKS, blocks)
    byte = tl.load(scale_ptr + numbers, mask=inside, other=0).to(tl.uint32)
    if E2M1:
        offsets = numbers * 16 + tl.arange(0, 16)[None, :]
        packed = tl.load(codes_ptr + offsets, mask=inside, other=0)
        value = decode_e2m1(unpack_pairs(packed, BLOCKS, 32))
    else:
        offsets = numbers * 32 + tl.arange(0, 32)[None, :]
        value = decode_e4m3(tl.load(codes_ptr + offsets, mask=inside, other=0), HARDWARE)
    value = (value * decode_e8m0(byte)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + numbers * 32 + tl.arange(0, 32)[None, :], value, mask=inside)
