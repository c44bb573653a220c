"""INT8 with one scale per row: launches of the element-wise kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._jit import int8 as jit
from autoq.kernels._launch.device import blocks_of, on_device_of
from autoq.kernels.targets import Target

_WARPS = 8
_TILE_ELEMENTS = 4096
_LONGEST_BLOCK = 8192
_DEQUANTIZE_BLOCK = 1024


def quantize(x: Tensor, scale: Tensor | None, *, target: Target) -> tuple[Tensor, Tensor]:
    """(codes, scales) of `x` [..., K], scales computed where none are given."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if not x.numel():
        return codes, scales.fill_(1.0) if scale is None else scale
    _quantize(x, scale, codes, scales, fake=False)
    return codes, scales


def fake_quantize(x: Tensor, scale: Tensor | None, *, target: Target) -> Tensor:
    """Codes times scales of `x` [..., K], in its dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _quantize(x, scale, out, None, fake=True)
    return out


def _quantize(
    x: Tensor, scale: Tensor | None, out: Tensor, scales: Tensor | None, *, fake: bool
) -> None:
    x = x.contiguous()
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    block, rows_per_program = _row_tile(columns, _LONGEST_BLOCK)
    with on_device_of(x):
        jit.quantize_kernel[(blocks_of(rows, rows_per_program),)](
            x,
            x if scale is None else scale.contiguous(),
            out,
            x if scales is None else scales,
            rows,
            columns,
            ROWS=rows_per_program,
            BLOCK_K=block,
            ONE_BLOCK=columns <= block,
            HAS_SCALE=scale is not None,
            FAKE=fake,
            num_warps=_WARPS,
        )


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, *, target: Target) -> Tensor:
    """Values of codes [..., K]."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not codes.numel():
        return out
    codes = codes.contiguous()
    rows, columns = codes.numel() // codes.shape[-1], codes.shape[-1]
    block, rows_per_program = _row_tile(columns, _DEQUANTIZE_BLOCK)
    grid = (blocks_of(rows, rows_per_program), blocks_of(columns, block))
    with on_device_of(codes):
        jit.dequantize_kernel[grid](
            codes,
            scale.contiguous(),
            out,
            rows,
            columns,
            ROWS=rows_per_program,
            BLOCK_K=block,
            num_warps=_WARPS,
        )
    return out


def _row_tile(columns: int, longest: int) -> tuple[int, int]:
    """(columns, rows) of a tile: powers of two, whole rows where they are short."""
    block = min(longest, max(64, 1 << (columns - 1).bit_length()))
    return block, max(1, _TILE_ELEMENTS // block)
