"""What INT4 group quantisation means: slow, obvious, the truth that fast paths are tested against.

A weight is code * group scale, codes -8..7, one scale per `group_size` columns of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import EMPTY_GROUP_SCALE, SMALLEST_SCALE


def group_scale(weight: Tensor, group_size: int, storage_dtype: torch.dtype) -> Tensor:
    """amax / 7 of each group, rounded to `storage_dtype`, float32 [N, K/g]; never 0."""
    rows, columns = weight.shape
    amax = weight.float().reshape(rows, columns // group_size, group_size).abs().amax(-1)
    scale = (amax / torch.tensor(7.0)).clamp(SMALLEST_SCALE, torch.finfo(storage_dtype).max)
    stored = scale.to(storage_dtype).float()
    return torch.where((amax == 0) | (stored == 0), EMPTY_GROUP_SCALE, stored)


def spread(group_scale: Tensor, columns: int) -> Tensor:
    """Every column's scale, [N, columns]."""
    return group_scale.repeat_interleave(columns // group_scale.shape[1], dim=1)


def codes(weight: Tensor, group_scale: Tensor) -> Tensor:
    """clamp(round_half_even(weight / scale), -8, 7), int8 [N, K]."""
    quotient = weight.float() / spread(group_scale, weight.shape[1])
    # Python's round() takes ties to even.
    rounded = [max(-8, min(7, round(value))) for value in quotient.flatten().tolist()]
    return torch.tensor(rounded, dtype=torch.int8).reshape(weight.shape)


def values(codes: Tensor, group_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale of int8 codes, [N, K]."""
    return (codes.float() * spread(group_scale, codes.shape[1])).to(dtype)


def pack(codes: Tensor, group_size: int) -> Tensor:
    """uint8 [N, K/2]: byte j of a group holds its columns j (low nibble) and j + g/2 (high)."""
    half = group_size // 2
    packed = [
        [
            (row[start + j] & 0xF) | (row[start + j + half] & 0xF) << 4
            for start in range(0, codes.shape[1], group_size)
            for j in range(half)
        ]
        for row in codes.tolist()
    ]
    return torch.tensor(packed, dtype=torch.uint8).reshape(len(codes), codes.shape[1] // 2)


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
    words = [_word(codes[n, 8 * w : 8 * w + 8]) for n in range(rows) for w in range(columns // 8)]
    return torch.tensor(words, dtype=torch.int32).reshape(rows, columns // 8)


def pack_gptq(codes: Tensor) -> Tensor:
    """Eight input features per int32 word: word [w, n] holds columns 8w to 8w + 7 of row n."""
    rows, columns = codes.shape
    words = [_word(codes[n, 8 * w : 8 * w + 8]) for w in range(columns // 8) for n in range(rows)]
    return torch.tensor(words, dtype=torch.int32).reshape(columns // 8, rows)


def pack_awq(codes: Tensor) -> Tensor:
    """Eight output features per int32 word, even ones first: word [k, w] holds column k."""
    rows, columns = codes.shape
    words = [
        _word(torch.cat((codes[8 * w : 8 * w + 8 : 2, k], codes[8 * w + 1 : 8 * w + 8 : 2, k])))
        for k in range(columns)
        for w in range(rows // 8)
    ]
    return torch.tensor(words, dtype=torch.int32).reshape(columns, rows // 8)


def _word(codes: Tensor) -> int:
    """Eight codes as code + 8, the first in the lowest nibble, as a signed 32-bit number."""
    word: int = sum((code + 8) << (4 * j) for j, code in enumerate(codes.tolist()))
    return word - 2**32 if word >= 2**31 else word
