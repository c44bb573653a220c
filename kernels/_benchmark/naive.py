"""What one would write first in vectorised torch: the formulas on whole tensors, cast by cast.

This is what the speed of the CPU path is compared with. It gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp8_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Codes, float8_e4m3fn."""
    return (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def fp8_dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [..., K]."""
    return (codes.float() * scale).to(dtype)


def nvfp4_quantize(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [..., K/2], the even element low, and E4M3 block scales [..., K/16]."""
    blocks = _blocks(x.float(), x.shape[-1] // 16)
    amax = blocks.abs().amax(-1)
    block_scale = (amax / (6.0 * global_scale)).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
    values = blocks / (block_scale.float() * global_scale)[..., None]
    # Halfway between neighbours, moved up by a hair where the tie goes down to the even code.
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    goes_up = torch.tensor([False, True, False, True, False, True, False])
    middles = torch.where(goes_up, torch.nextafter(middles, torch.zeros(())), middles)
    codes = torch.bucketize(values.abs(), middles.to(x.device)).to(torch.uint8)
    codes = (codes | (values < 0).to(torch.uint8) << 3).flatten(-2)
    return codes[..., 0::2] | codes[..., 1::2] << 4, block_scale


def nvfp4_dequantize(
    codes: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Values [..., K]."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2)
    blocks = _blocks(table[nibbles.long()], block_scale.shape[-1])
    return (blocks * (block_scale.float() * global_scale)[..., None]).flatten(-2).to(dtype)


def int4_quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """Codes, int8 [N, K]."""
    groups = _blocks(weight.float(), group_scale.shape[-1])
    return (groups / group_scale[..., None]).round().clamp(-8, 7).to(torch.int8).flatten(-2)


def int4_dequantize(codes: Tensor, group_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values [N, K]."""
    groups = _blocks(codes.float(), group_scale.shape[-1])
    return (groups * group_scale[..., None]).flatten(-2).to(dtype)


def _blocks(x: Tensor, count: int) -> Tensor:
    """[..., K] as [..., count, K/count]."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)
