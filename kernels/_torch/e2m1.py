"""E2M1 codes and values in vectorised torch: rounding to nearest, ties to even, saturating at 6."""

from __future__ import annotations

import math
from functools import cache

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


def decode_packed(packed: Tensor) -> Tensor:
    """Values, float32 [..., K], of codes packed two to a byte, uint8 [..., K/2]; code 8 is -0.0.

    A byte selects a pair of values, moved as one number of 64 bits: eight times as fast on CPUs as
    taking the codes apart.
    """
    pairs = _pairs(packed.device).view(torch.float64).view(-1)
    values = pairs.index_select(0, packed.reshape(-1).int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two values of every byte, float32 [256, 2]."""
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], device=device)
    return torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)


def pack(codes: Tensor) -> Tensor:
    """Codes [..., K] to uint8 [..., K/2], the even element in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def round_(values: Tensor, scratch: Tensor) -> Tensor:
    """Replace float32 `values` by what E2M1 makes of them; -0.0 becomes 0.0.

    The step under |value| is half of its power of two, between 0.5 and 2. `scratch` has the shape
    of `values` and is overwritten.
    """
    step = exponent_part_(values, scratch).clamp_(1.0, 4.0).mul_(0.5)
    # -0.0 + 0.0 is 0.0, while a negative value that rounds to zero stays negative.
    return values.add_(0.0).div_(step).round_().mul_(step).clamp_(-LARGEST, LARGEST)
