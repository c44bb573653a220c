"""Symmetric INT8 in vectorised torch, on any device; `autoq.kernels.int8` checked the operands."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from autoq.kernels._torch import fused
from autoq.kernels._torch.chunks import empty, map_rows, row_amax, rows_per_piece, scale_from_amax
from autoq.kernels._torch.programs import Offer

LARGEST = 127.0

_SMALLEST_STORED = 2.0**-24


def row_scale(weight: Tensor, storage_dtype: torch.dtype) -> Tensor:
    """Scales [N, 1] of the rows, exact in the dtype."""
    scale = scale_from_amax(row_amax(weight)[:, None].float(), LARGEST).to(storage_dtype).float()
    # Below 2**-25 float16 has nothing but zero.
    return torch.where(scale == 0, _SMALLEST_STORED, scale)


def quantize(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(codes, scale)."""
    if not x.numel():
        scale = torch.ones(*x.shape[:-1], 1, device=x.device) if scale is None else scale
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale
    rows = x.reshape(-1, x.shape[-1])
    codes = empty(rows.shape, torch.int8, x.device)
    scales = torch.empty(len(rows), 1, dtype=torch.float32, device=x.device)
    given = None if scale is None else scale.reshape(-1, 1)
    step = rows_per_piece(rows)
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        values = rows[piece].float()
        scales[piece] = _scale(values.abs(), None if given is None else given[piece])
        values = _round_(values / scales[piece])
        codes[piece] = values.nan_to_num_(nan=0.0).to(torch.int8)
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Values codes * scale."""
    return (codes.float() * scale).to(dtype)


def fake_quantize(x: Tensor, scale: Tensor | None) -> Tensor:
    """Quantise and dequantise without storing codes."""
    given = None if scale is None else scale.reshape(-1, 1)

    def body(source: Tensor, values: Tensor, scratch: Tensor, rows: slice) -> None:
        magnitudes = torch.abs(source, out=scratch)
        scale = _scale(magnitudes, None if given is None else given[rows])
        torch.div(source, scale, out=values)
        # Codes have one zero; adding it makes -0.0 that one.
        _round_(values).mul_(scale).add_(0.0)

    def operands(rows: Tensor) -> tuple[Tensor, ...]:
        amax = row_amax(rows)[:, None].float()
        return (_scale_of(amax, None if given is None else given[: len(rows)]),)

    return map_rows(x, x.shape[-1], body, Offer(fused.INT8, operands))


def linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """x @ weight.T + bias in the dtype of `x`, the input quantised row by row."""
    return product(fake_quantize(x, None), dequantize(codes, scale, x.dtype), bias, out_dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias in the dtype of `x`, which is the weight's as well."""
    bias = None if bias is None else bias.detach().to(x.dtype)
    return functional.linear(x, weight, bias).to(out_dtype)


def matmul(
    a_codes: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """a @ b.T + bias: the exact integer sum, rounded to float32, times b's scale, times a's."""
    # Below 2**53 all partial sums are exact in float64, whatever their order.
    out = functional.linear(a_codes.double(), b_codes.double()).float()
    out.mul_(b_scale.flatten()).mul_(a_scale)
    if bias is not None:
        out.add_(bias.detach().float())
    return out.to(out_dtype)


def _scale(magnitudes: Tensor, given: Tensor | None) -> Tensor:
    """Row scales [rows, 1] of float32 magnitudes [rows, K]."""
    return _scale_of(magnitudes.amax(-1, keepdim=True), given)


def _scale_of(amax: Tensor, given: Tensor | None) -> Tensor:
    """Row scales from the rows' largest magnitudes; both [rows, 1]."""
    if given is None:
        return scale_from_amax(amax, LARGEST)
    # NaN has no code: a row that holds one keeps it in its scale.
    return torch.where(amax.isnan(), math.nan, given)


def _round_(quotients: Tensor) -> Tensor:
    return quotients.clamp_(-LARGEST, LARGEST).round_()
