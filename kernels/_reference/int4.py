"""What INT4 group quantisation means: slow, obvious, the truth that fast paths are tested against.

A weight is code * group scale, codes -8..7, one scale per `group_size` columns of a row. The
two-level form stores the product once more in FP8, as an INT4 x FP8 matrix unit sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import EMPTY_GROUP_SCALE, LARGEST_FLOAT16, SMALLEST_SCALE
from autoq.kernels._reference import fp8


def group_scale(weight: Tensor, group_size: int, storage_dtype: torch.dtype) -> Tensor:
    """amax / 7 of each group, rounded to `storage_dtype`, float32 [N, K/g]; never 0."""
    rows, columns = weight.shape
    amax = weight.float().reshape(rows, columns // group_size, group_size).abs().amax(-1)
    scale = (amax / torch.tensor(7.0)).clamp(SMALLEST_SCALE, torch.finfo(storage_dtype).max)
    stored = scale.to(storage_dtype).float()
    return torch.where((amax == 0) | (stored == 0), EMPTY_GROUP_SCALE, stored)


def _spread(group_scale: Tensor, columns: int) -> Tensor:
    return group_scale.repeat_interleave(columns // group_scale.shape[1], dim=1)


def quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """Codes clamp(round_half_even(weight / scale), -8, 7), int8 [N, K]."""
    quotient = weight.float() / _spread(group_scale, weight.shape[1])
    # Python's round() takes ties to even.
    codes = [max(-8, min(7, round(value))) for value in quotient.flatten().tolist()]
    return torch.tensor(codes, dtype=torch.int8).reshape(weight.shape)


def dequantize(codes: Tensor, group_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values code * scale, [N, K]."""
    return (codes.float() * _spread(group_scale, codes.shape[1])).to(dtype)


def fake_quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """What is left of `weight` after quantising and dequantising."""
    return dequantize(quantize(weight, group_scale), group_scale, weight.dtype)


def dequantize_two_level(
    codes: Tensor, group_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values e4m3(code * rate) * tensor scale, rate = fp16(fp16(group scale) / tensor scale)."""
    quotient = group_scale.half().float() / tensor_scale
    rate = quotient.clamp(max=LARGEST_FLOAT16).half().float()
    return fp8.dequantize(fp8.encode(dequantize(codes, rate)), tensor_scale, dtype)


def pack_rows(codes: Tensor) -> Tensor:
    """Two rows per byte, two's complement: row 2i in the low nibble, row 2i + 1 in the high one."""
    rows, columns = codes.shape
    table = codes.tolist()
    packed = [
        [(table[2 * i][k] & 0xF) | (table[2 * i + 1][k] & 0xF) << 4 for k in range(columns)]
        for i in range(rows // 2)
    ]
    return torch.tensor(packed, dtype=torch.uint8).reshape(rows // 2, columns)


def pack_columns(codes: Tensor) -> Tensor:
    """Eight columns per int32 word, code + 8: column 8w + j in bits 4j to 4j + 3."""
    rows, columns = codes.shape
    words = [
        sum((int(codes[n, 8 * word + j]) + 8) << (4 * j) for j in range(8))
        for n in range(rows)
        for word in range(columns // 8)
    ]
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    return torch.tensor(signed, dtype=torch.int32).reshape(rows, columns // 8)
