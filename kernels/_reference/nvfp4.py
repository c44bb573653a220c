"""What NVFP4 quantisation means: slow, obvious, the truth that fast paths are tested against.

A value is e2m1(code) * (e4m3(block scale) * global scale), one block scale per 16 values along
the last dimension, one float32 global scale per tensor. E2M1 codes 0..7 are 0, 0.5, 1, 1.5, 2,
3, 4 and 6; bit 3 is the sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import SMALLEST_SCALE
from autoq.kernels._reference import fp8

BLOCK = 16
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode_value(value: float) -> int:
    """The E2M1 code nearest to `value`, ties to even, saturating at 6; -0.0 becomes code 0."""
    magnitude = abs(value)
    if magnitude <= 0.25:
        code = 0
    elif magnitude < 0.75:
        code = 1
    elif magnitude <= 1.25:
        code = 2
    elif magnitude < 1.75:
        code = 3
    elif magnitude <= 2.5:
        code = 4
    elif magnitude < 3.5:
        code = 5
    elif magnitude <= 5.0:
        code = 6
    else:
        code = 7
    return code + 8 if value < 0 else code


def encode(values: Tensor) -> Tensor:
    """E2M1 codes 0..15 of float32 values, uint8, one per byte."""
    codes = [encode_value(value) for value in values.flatten().tolist()]
    return torch.tensor(codes, dtype=torch.uint8).reshape(values.shape)


def decode(codes: Tensor) -> Tensor:
    """Values of E2M1 codes 0..15, float32; code 8 is -0.0."""
    table = torch.tensor([*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES)])
    return table[codes.long()]


def global_scale(amax: float) -> Tensor:
    """amax / (6 * 448) in float32; 1 if amax is 0, never below 2**-100."""
    if amax == 0:
        return torch.tensor(1.0)
    return (torch.tensor(amax) / torch.tensor(6.0 * fp8.LARGEST)).clamp(min=SMALLEST_SCALE)


def block_scale(block_amax: Tensor, global_scale: Tensor) -> Tensor:
    """E4M3 scales of blocks with the float32 maxima `block_amax`."""
    scale = block_amax / (6.0 * global_scale)
    scale = torch.where(scale == 0, 1.0, scale)
    return fp8.encode(scale.clamp(2.0**-9, fp8.LARGEST))


def quantize(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [..., K/2], even element in the low nibble, and block scales [..., K/16]."""
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK)
    scales = block_scale(blocks.abs().amax(-1), global_scale)
    step = fp8.decode(scales) * global_scale
    codes = encode(blocks / step[..., None]).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def dequantize(
    packed: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values e2m1 * (block scale * global scale), [..., K]."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    step = fp8.decode(block_scale) * global_scale
    values = decode(codes).reshape(*step.shape, BLOCK) * step[..., None]
    return values.flatten(-2).to(dtype)


def fake_quantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """What is left of `x` after quantising and dequantising."""
    return dequantize(*quantize(x, global_scale), global_scale, x.dtype)
