"""INT4 groups in vectorised torch, on any device; operands were checked by `autoq.kernels.int4`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from autoq.kernels._checks import EMPTY_GROUP_SCALE
from autoq.kernels._torch import fused
from autoq.kernels._torch.chunks import (
    empty,
    float32_pieces,
    map_rows,
    row_amax,
    rows_per_piece,
    scale_from_amax,
)
from autoq.kernels._torch.programs import Offer

LARGEST = 7.0
LOWEST_CODE, HIGHEST_CODE = -8, 7
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def group_scale(weight: Tensor, group_size: int, storage_dtype: torch.dtype) -> Tensor:
    """Scales rounded to `storage_dtype`, float32 [N, K/g]."""
    groups = weight.shape[1] // group_size
    amax = row_amax(_groups(weight.detach(), groups).flatten(0, 1)).float().view(-1, groups)
    return stored_scale(amax, storage_dtype)


def stored_scale(amax: Tensor, storage_dtype: torch.dtype) -> Tensor:
    """Scales of groups with the float32 maxima `amax`, rounded to `storage_dtype`, float32."""
    scale = scale_from_amax(amax, LARGEST).clamp_(max=torch.finfo(storage_dtype).max)
    stored = scale.to(storage_dtype).float()
    return torch.where((amax == 0) | (stored == 0), EMPTY_GROUP_SCALE, stored)


def quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """Codes by halves, uint8 [N, K/2]."""
    return pack(plain_codes(weight, group_scale), group_scale.shape[1])


def plain_codes(weight: Tensor, group_scale: Tensor) -> Tensor:
    """Codes int8 [N, K]."""
    codes = empty(weight.shape, torch.int8, weight.device)
    if not codes.numel():
        return codes
    rows = _groups(weight.detach(), group_scale.shape[1]).flatten(0, 1)
    scales, out = group_scale.reshape(-1, 1), codes.view(rows.shape)
    for piece, values in float32_pieces(rows):
        out[piece] = values.div_(scales[piece]).round_().clamp_(LOWEST_CODE, HIGHEST_CODE)
    return codes


def pack(codes: Tensor, groups: int) -> Tensor:
    """int8 codes [N, K] by halves of their group, uint8 [N, K/2]."""
    low, high = _groups(codes, groups).contiguous().view(torch.uint8).tensor_split(2, dim=-1)
    return (low & 0xF | high << 4).flatten(-2)


def unpack(codes: Tensor, groups: int) -> Tensor:
    """Undo `pack`: int8 [N, K]."""
    return torch.cat(_halves(codes, groups), dim=-1).flatten(-2)


def _halves(codes: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Both halves of the groups, int8 [N, groups, K/groups/2]."""
    halves = _groups(codes, groups)
    # Arithmetic shifts copy the nibble's sign.
    return (halves << 4).view(torch.int8) >> 4, halves.view(torch.int8) >> 4


def dequantize(codes: Tensor, group_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values code * scale of packed codes."""
    return scaled(codes, group_scale).to(dtype)


def scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Packed codes times what their group counts, float32 [N, K]."""
    rows, groups = scales.shape
    values = torch.empty(rows, groups, 2, codes.shape[1] // groups, device=codes.device)
    step = rows_per_piece(values.flatten(1))
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        part = values[piece]
        part[:, :, 0], part[:, :, 1] = _halves(codes[piece], groups)
        part.mul_(scales[piece, :, None, None])
    return values.flatten(1)


def fake_quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """Quantise and dequantise without storing codes."""
    scales = group_scale.reshape(-1, 1)

    def body(source: Tensor, values: Tensor, _: Tensor, rows: slice) -> None:
        codes_(source, scales[rows], values).mul_(scales[rows])

    offer = Offer(fused.INT4, lambda _: (scales,))
    return map_rows(weight, weight.shape[1] // group_scale.shape[1], body, offer)


def codes_(source: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Codes of `source` as float32 numbers; adding zero drops the sign that integers lack."""
    torch.div(source, scales, out=out)
    return out.round_().clamp_(LOWEST_CODE, HIGHEST_CODE).add_(0.0)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias in the dtype of x, then in `out_dtype`."""
    return functional.linear(x, weight, bias if bias is None else bias.to(x.dtype)).to(out_dtype)


def _groups(matrix: Tensor, groups: int) -> Tensor:
    """[N, columns] as [N, groups, columns/groups]."""
    rows, columns = matrix.shape
    return matrix.reshape(rows, groups, columns // groups)


def pack_rows(codes: Tensor) -> Tensor:
    """uint8 [N/2, K]."""
    packed = torch.empty(len(codes) // 2, codes.shape[1], dtype=torch.uint8, device=codes.device)
    if not packed.numel():
        return packed
    even, odd = codes.view(torch.uint8)[0::2], codes.view(torch.uint8)[1::2]
    step = rows_per_piece(packed)
    for start in range(0, len(packed), step):
        low, high = even[start : start + step], odd[start : start + step]
        torch.bitwise_or(low & 0xF, high << 4, out=packed[start : start + step])
    return packed


def unpack_rows(packed: Tensor) -> Tensor:
    """int8 [N, K]."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten(0, 1)
    return _signed(nibbles)


def pack_columns(codes: Tensor) -> Tensor:
    """int32 [N, K/8]."""
    if not codes.numel():
        return torch.empty(len(codes), codes.shape[1] // 8, dtype=torch.int32, device=codes.device)
    packed = torch.empty(len(codes), codes.shape[1] // 2, dtype=torch.uint8, device=codes.device)
    step = rows_per_piece(codes)
    for start in range(0, len(codes), step):
        # The even column is the low byte.
        pairs = (codes[start : start + step] + 8).contiguous().view(torch.int16)
        packed[start : start + step] = pairs | pairs >> 4
    return packed.view(torch.int32)


def unpack_columns(packed: Tensor) -> Tensor:
    """int8 [N, K]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    # The arithmetic shift copies the sign bit; the mask removes it.
    offset = (packed[..., None] >> shifts) & 0xF
    return (offset - 8).to(torch.int8).flatten(-2)


def pack_gptq(codes: Tensor) -> Tensor:
    """int32 [K/8, N]: the words of `pack_columns`, transposed."""
    return pack_columns(codes).T.contiguous()


def unpack_gptq(packed: Tensor) -> Tensor:
    """int8 [N, K]."""
    return unpack_columns(packed.T)


def pack_awq(codes: Tensor) -> Tensor:
    """int32 [K, N/8]."""
    eights = codes.T.reshape(codes.shape[1], codes.shape[0] // 8, 8)
    return pack_columns(eights[..., _AWQ_ORDER].flatten(-2))


def unpack_awq(packed: Tensor) -> Tensor:
    """int8 [N, K]."""
    eights = unpack_columns(packed).reshape(*packed.shape, 8)
    columns = torch.empty_like(eights)
    columns[..., _AWQ_ORDER] = eights
    return columns.flatten(-2).T.contiguous()


def _signed(nibbles: Tensor) -> Tensor:
    """Two's complement nibbles 0..15 (uint8) as int8 -8..7."""
    return (nibbles ^ 8).view(torch.int8) - 8
