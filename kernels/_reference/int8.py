"""What symmetric INT8 means: slow, obvious, the truth that fast paths are tested against.

A value is code * scale, codes -127 to 127, one float32 scale per row. Sums of products of codes
are integers of any size here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoq.kernels._checks import SMALLEST_SCALE

LARGEST = 127


def row_scale(amax: float) -> Tensor:
    """amax / 127 in float32; 1 if amax is 0, never below 2**-100; NaN and infinity stay."""
    if amax == 0:
        return torch.tensor(1.0)
    return (torch.tensor(amax) / torch.tensor(float(LARGEST))).clamp(min=SMALLEST_SCALE)


def encode_value(quotient: float) -> int:
    """The integer nearest to `quotient`, ties to even, within -127 and 127; 0 for NaN."""
    if math.isnan(quotient):
        return 0
    return round(max(-LARGEST, min(LARGEST, quotient)))


def scales(x: Tensor) -> Tensor:
    """The scale of every row, float32 [..., 1]."""
    rows = x.float().reshape(-1, x.shape[-1]).tolist()
    amax = [math.nan if any(map(math.isnan, row)) else max(map(abs, row)) for row in rows]
    return torch.stack([row_scale(value) for value in amax]).reshape(*x.shape[:-1], 1)


def quantize(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scale): the nearest integers to x / scale; NaN where a row holds NaN."""
    own = scales(x)
    scale = own if scale is None else torch.where(own.isnan(), math.nan, scale)
    codes = [encode_value(quotient) for quotient in (x.float() / scale).flatten().tolist()]
    return torch.tensor(codes, dtype=torch.int8).reshape(x.shape), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values codes * scale."""
    return (codes.float() * scale).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """What is left of `x` after quantising and dequantising."""
    return dequantize(*quantize(x, scale), x.dtype)


def matmul(
    a_codes: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """a @ b.T + bias of [M, K] and [N, K]: the exact integer sum, rounded to float32, then scaled."""
    columns = b_codes.tolist()
    sums = [
        [sum(x * y for x, y in zip(row, column, strict=True)) for column in columns]
        for row in a_codes.tolist()
    ]
    out = torch.tensor(sums, dtype=torch.int64).reshape(len(a_codes), len(b_codes)).float()
    out = out * b_scale.flatten() * a_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)
