"""FP8 E4M3 in vectorised torch, on any device; operands were checked by `autoq.kernels.fp8`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from autoq.kernels._scaling import BLOCK, Scaling
from autoq.kernels._torch import fused
from autoq.kernels._torch.chunks import (
    exponent_part_,
    float32_pieces,
    map_rows,
    row_amax,
    scale_from_amax,
)
from autoq.kernels._torch.programs import Offer

LARGEST = 448.0
_SMALLEST_NORMAL = 2.0**-6
_MANTISSA_STEP = 2.0**-3


def round_e4m3_(values: Tensor, scratch: Tensor) -> Tensor:
    """Clamp float32 `values` to 448 and round them to E4M3, in place, the sign of zero kept.

    Equal to a cast to float8_e4m3fn and back, of which torch does the way back at a seventh of
    the speed of this on CPUs. `scratch` has the shape of `values` and is overwritten.
    """
    values.clamp_(-LARGEST, LARGEST)
    step = exponent_part_(values, scratch).clamp_(min=_SMALLEST_NORMAL).mul_(_MANTISSA_STEP)
    return values.div_(step).round_().mul_(step)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Float32 values of float8_e4m3fn codes; by a table on CPUs, in half the time of torch's cast."""
    if codes.device.type != "cpu":
        return codes.float()
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return table.index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)


def scales(x: Tensor, scaling: Scaling) -> Tensor:
    """Scales in the shape of `scaling`."""
    shape = scaling.scale_shape(x.shape)
    if not x.numel():
        return torch.ones(shape, dtype=torch.float32, device=x.device)
    return scale_from_amax(_amax(x, scaling).float(), LARGEST).reshape(shape)


def quantize(x: Tensor, scale: Tensor, scaling: Scaling) -> Tensor:
    """Codes, float8_e4m3fn."""
    if not x.numel():
        return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    blocks = _rows(x, scaling)
    rows = blocks.reshape(-1, blocks.shape[-1])
    steps = _row_scales(scale, x.shape, scaling).expand(*blocks.shape[:-1], 1).reshape(-1, 1)
    codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=x.device)
    for piece, values in float32_pieces(rows):
        codes[piece] = values.div_(steps[piece]).clamp_(-LARGEST, LARGEST)
    return _unpadded(codes.view(blocks.shape), x.shape)


def dequantize(codes: Tensor, scale: Tensor, scaling: Scaling, dtype: torch.dtype) -> Tensor:
    """Values codes * scale."""
    values = _rows(decode_e4m3(codes), scaling) * _row_scales(scale, codes.shape, scaling)
    return _unpadded(values.to(dtype), codes.shape)


def fake_quantize(x: Tensor, scale: Tensor | None, scaling: Scaling) -> Tensor:
    """Quantise and dequantise without storing codes; scales are computed where none are given."""
    if scale is None and scaling in (Scaling.TENSOR, Scaling.BLOCK_128X128):
        scale = scales(x.detach(), scaling)
    rows = _rows(x, scaling)
    own = None if scale is None else _row_scales(scale, x.shape, scaling).reshape(-1, 1)

    def body(source: Tensor, values: Tensor, scratch: Tensor, piece: slice) -> None:
        if own is None:
            amax = torch.abs(source, out=scratch).amax(-1, keepdim=True)
            step = scale_from_amax(amax, LARGEST)
        else:
            step = own if scaling is Scaling.TENSOR else own[piece]
        torch.div(source, step, out=values)
        round_e4m3_(values, scratch).mul_(step)

    def operands(rows: Tensor) -> tuple[Tensor, ...]:
        if own is None:
            return (scales(rows, Scaling.ROW),)
        return (own[0, 0],) if scaling is Scaling.TENSOR else (own,)

    program = fused.FP8_TENSOR if scaling is Scaling.TENSOR else fused.FP8_ROWS
    offer = Offer(program, operands)
    return _unpadded(map_rows(rows, rows.shape[-1], body, offer), x.shape)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """functional.linear in the dtype of `x`, then `out_dtype`."""
    bias = None if bias is None else bias.detach().to(x.dtype)
    return functional.linear(x, weight, bias).to(out_dtype)


def _amax(x: Tensor, scaling: Scaling) -> Tensor:
    """Largest magnitudes, flat; NaN where there is one. `x` is not empty."""
    if scaling is Scaling.TENSOR:
        # Ten times as fast as abs().amax() on CPUs, and no copy.
        lowest, highest = x.aminmax()
        return torch.maximum(-lowest, highest)
    rows = _rows(x, scaling)
    amax = row_amax(rows.reshape(-1, rows.shape[-1]))
    if scaling is not Scaling.BLOCK_128X128:
        return amax
    padded = functional.pad(amax.view(len(x), -1), (0, 0, 0, -len(x) % BLOCK))
    return padded.view(-1, BLOCK, padded.shape[1]).amax(1)


def _rows(x: Tensor, scaling: Scaling) -> Tensor:
    """`x` with the elements of a row under one scale: itself, or [..., 128] with zeros added."""
    if scaling in (Scaling.TENSOR, Scaling.ROW):
        return x
    missing = -x.shape[-1] % BLOCK
    padded = functional.pad(x.detach(), (0, missing)) if missing else x
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // BLOCK, BLOCK)


def _row_scales(scale: Tensor, shape: torch.Size, scaling: Scaling) -> Tensor:
    """The scale of each row of `_rows`, broadcastable to it."""
    if scaling in (Scaling.TENSOR, Scaling.ROW):
        return scale
    if scaling is Scaling.BLOCK_128X128:
        scale = scale.repeat_interleave(BLOCK, dim=0)[: shape[0]]
    return scale[..., None]


def _unpadded(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_rows`."""
    if blocks.shape == shape:
        return blocks
    return blocks.flatten(-2)[..., : shape[-1]].contiguous()
