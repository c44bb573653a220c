"""E2M1 codes and values in vectorised torch: rounding to nearest, ties to even, saturating at 6."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoq.kernels._torch.chunks import exponent_part_

LARGEST = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _below(value: float) -> float:
    """The float32 before `value`."""
    return torch.nextafter(torch.tensor(value), torch.tensor(-math.inf)).item()


# A code is the number of thresholds strictly below the magnitude; ties that go up therefore sit
# on the float32 before them.
_THRESHOLDS = (0.25, _below(0.75), 1.25, _below(1.75), 2.5, _below(3.5), 5.0)


def encode(values: Tensor) -> Tensor:
    """Codes 0..15 of float32 values, uint8; bit 3 is the sign, and -0.0 becomes code 0."""
    thresholds = torch.tensor(_THRESHOLDS, device=values.device)
    codes = torch.bucketize(values.abs(), thresholds, out_int32=True).to(torch.uint8)
    return codes.bitwise_or_((values < 0).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """Values of codes 0..15, float32; code 8 is -0.0."""
    table = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], device=codes.device)
    return table[codes.int()]


def pack(codes: Tensor) -> Tensor:
    """Codes [..., K] to uint8 [..., K/2], the even element in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Undo `pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def round_(values: Tensor, scratch: Tensor) -> Tensor:
    """Replace float32 `values` by what E2M1 makes of them; -0.0 becomes 0.0.

    The step under |value| is half of its power of two, between 0.5 and 2. `scratch` has the shape
    of `values` and is overwritten.
    """
    step = exponent_part_(values, scratch).clamp_(1.0, 4.0).mul_(0.5)
    # -0.0 + 0.0 is 0.0, while a negative value that rounds to zero stays negative.
    return values.add_(0.0).div_(step).round_().mul_(step).clamp_(-LARGEST, LARGEST)
