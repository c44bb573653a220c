"""E2M1 in triton: every code, every tie and both neighbours of every boundary, against the truth."""

import math

import pytest
import torch
import triton
import triton.language as tl

from autoq.kernels._jit.e2m1 import (
    decode_e2m1,
    encode_e2m1,
    pack_pairs,
    round_e2m1,
    unpack_pairs,
)
from autoq.kernels._reference import nvfp4 as reference


@triton.jit
def _encode_kernel(x_ptr, code_ptr, value_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    x = tl.load(x_ptr + places)
    tl.store(code_ptr + places, encode_e2m1(x).to(tl.uint8))
    tl.store(value_ptr + places, round_e2m1(x))


@triton.jit
def _unpack_kernel(packed_ptr, again_ptr, value_ptr):
    rows = tl.arange(0, 16)[:, None]
    packed = tl.load(packed_ptr + rows * 16 + tl.arange(0, 16)[None, :])
    codes = unpack_pairs(packed, 16, 32)
    tl.store(value_ptr + rows * 32 + tl.arange(0, 32)[None, :], decode_e2m1(codes))
    again = pack_pairs(codes, 16, 32)
    tl.store(again_ptr + rows * 16 + tl.arange(0, 16)[None, :], again)


def _magnitudes() -> torch.Tensor:
    """Numbers round every boundary, of every exponent, and what is no number."""
    boundaries = torch.tensor([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8])
    near = boundaries.view(torch.int32)[:, None] + torch.arange(-8, 9, dtype=torch.int32)
    every = torch.arange(0, 0x7F800000, 0x7F800000 // 3823, dtype=torch.int32)
    special = torch.tensor([0.0, 1e-45, 1e30, 3.4e38, math.inf, math.nan])
    return torch.cat((near.flatten().view(torch.float32), every.view(torch.float32), special))


@pytest.mark.parametrize("sign_of_nan", [1.0, -1.0])
def test_rounding_is_the_reference(device, assert_same_bits, sign_of_nan):
    x = _magnitudes()
    x[-1].copysign_(torch.tensor(sign_of_nan))
    size = triton.next_power_of_2(len(x))
    x = torch.nn.functional.pad(x, (0, size - len(x))).to(device)
    codes = torch.empty(size, dtype=torch.uint8, device=device)
    values = torch.empty(size, device=device)
    _encode_kernel[(1,)](x, codes, values, SIZE=size)
    expected = reference.encode(x)
    assert_same_bits(codes.cpu(), expected)
    assert_same_bits(values.cpu(), reference.decode(expected))


def test_every_byte_unpacks_to_two_values_and_packs_again(device, assert_same_bits):
    packed = torch.arange(256, dtype=torch.uint8, device=device).reshape(16, 16)
    again, values = torch.empty_like(packed), torch.empty(16, 32, device=device)
    _unpack_kernel[(1,)](packed, again, values)
    low, high = reference.decode(packed.cpu() & 0xF), reference.decode(packed.cpu() >> 4)
    assert_same_bits(values.cpu(), torch.stack((low, high), dim=-1).flatten(-2))
    assert_same_bits(again, packed)
