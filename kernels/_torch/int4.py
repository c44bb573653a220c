"""INT4 groups in vectorised torch, on any device; operands were checked by `autoq.kernels.int4`."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import EMPTY_GROUP_SCALE, LARGEST_FLOAT16
from autoq.kernels._torch.chunks import map_rows, scale_from_amax
from autoq.kernels._torch.fp8 import round_e4m3_

LARGEST = 7.0
LOWEST_CODE, HIGHEST_CODE = -8, 7


def group_scale(weight: Tensor, group_size: int, storage_dtype: torch.dtype) -> Tensor:
    """Scales rounded to `storage_dtype`, float32 [N, K/g]."""
    groups = weight.detach().reshape(len(weight), weight.shape[1] // group_size, group_size)
    amax = groups.abs().amax(-1).float()
    scale = scale_from_amax(amax, LARGEST).clamp_(max=torch.finfo(storage_dtype).max)
    stored = scale.to(storage_dtype).float()
    return torch.where((amax == 0) | (stored == 0), EMPTY_GROUP_SCALE, stored)


def quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """Codes, int8 [N, K]."""
    groups = _groups(weight.detach().float(), group_scale)
    quotient = groups / group_scale[..., None]
    return quotient.round_().clamp_(LOWEST_CODE, HIGHEST_CODE).to(torch.int8).flatten(-2)


def dequantize(codes: Tensor, group_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values code * scale."""
    return _scaled(codes, group_scale).to(dtype)


def dequantize_two_level(
    codes: Tensor, group_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Values e4m3(code * rate) * tensor scale."""
    values = _scaled(codes, _rate(group_scale, tensor_scale))
    return round_e4m3_(values, torch.empty_like(values)).mul_(tensor_scale).to(dtype)


def fake_quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """Quantise and dequantise without storing codes."""
    scales = group_scale.reshape(-1, 1)

    def body(source: Tensor, values: Tensor, _: Tensor, rows: slice) -> None:
        _codes(source, scales[rows], values).mul_(scales[rows])

    return map_rows(weight, weight.shape[1] // group_scale.shape[1], body)


def fake_quantize_two_level(weight: Tensor, group_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """Quantise and dequantise through the second, FP8 level without storing codes."""
    scales = group_scale.reshape(-1, 1)
    rates = _rate(scales, tensor_scale)

    def body(source: Tensor, values: Tensor, scratch: Tensor, rows: slice) -> None:
        _codes(source, scales[rows], values).mul_(rates[rows])
        round_e4m3_(values, scratch).mul_(tensor_scale)

    return map_rows(weight, weight.shape[1] // group_scale.shape[1], body)


def _codes(source: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Codes of `source` as float32 numbers; adding zero drops the sign that integers lack."""
    torch.div(source, scales, out=out)
    return out.round_().clamp_(LOWEST_CODE, HIGHEST_CODE).add_(0.0)


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    return _groups(codes.float(), scales).mul_(scales[..., None]).flatten(-2)


def _groups(matrix: Tensor, scales: Tensor) -> Tensor:
    """[N, K] as [N, groups, K/groups]."""
    rows, groups = scales.shape
    return matrix.reshape(rows, groups, matrix.shape[1] // groups)


def _rate(group_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """What a code counts under the FP8 level, with the two float16 roundings of the engine."""
    quotient = group_scale.half().float() / tensor_scale
    return quotient.clamp_(max=LARGEST_FLOAT16).half().float()


def pack_rows(codes: Tensor) -> Tensor:
    """uint8 [N/2, K]."""
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[0::2] | nibbles[1::2] << 4


def unpack_rows(packed: Tensor) -> Tensor:
    """int8 [N, K]."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten(0, 1)
    return _signed(nibbles)


def pack_columns(codes: Tensor) -> Tensor:
    """int32 [N, K/8]."""
    offset = (codes.int() + 8).reshape(len(codes), codes.shape[1] // 8, 8)
    words = offset[..., 0].clone()
    for position in range(1, 8):
        words.bitwise_or_(offset[..., position] << 4 * position)
    return words


def unpack_columns(packed: Tensor) -> Tensor:
    """int8 [N, K]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    # The arithmetic shift copies the sign bit; the mask removes it.
    offset = (packed[..., None] >> shifts) & 0xF
    return (offset - 8).to(torch.int8).flatten(-2)


def _signed(nibbles: Tensor) -> Tensor:
    """Two's complement nibbles 0..15 (uint8) as int8 -8..7."""
    return (nibbles ^ 8).view(torch.int8) - 8
