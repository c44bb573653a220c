"""INT8 weights and inputs as they are: launches of the matrix product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from autoq.kernels._jit import int8_weights as jit
from autoq.kernels._launch.device import blocks_of, on_device_of
from autoq.kernels._launch.int8_variant import DECODE_ROWS
from autoq.kernels._launch.split_k import partial_sums, parts, reduce
from autoq.kernels._launch.tiles import Tile, row_bucket, tuned
from autoq.kernels.targets import Target

_ALIGNMENT = 16
"""Columns whose codes fill the widest load."""

_FEW_ROWS = 16
_FEW: tuple[Tile, ...] = (
    Tile(16, 128, 128, warps=4, stages=4),
    Tile(16, 64, 128, warps=4, stages=4),
)
_DECODE: tuple[Tile, ...] = (
    Tile(64, 64, 128, warps=4, stages=3),
    Tile(64, 128, 64, warps=4, stages=3),
)
_MANY: tuple[Tile, ...] = (
    Tile(128, 128, 64, warps=8, stages=3),
    Tile(64, 128, 64, warps=4, stages=3),
)

# Of other tiles the compiler makes Hopper's matrix instructions wait for one another.
_FEW_ON_HOPPER = _FEW[1:]
_DECODE_ON_HOPPER = (Tile(64, 128, 64, warps=8, stages=3),)
_MANY_ON_HOPPER = _MANY[:1]


def tiles(target: Target, rows: int) -> tuple[Tile, ...]:
    """What to try on a target for a product of so many rows, the best guess first."""
    few, decode, many = _FEW, _DECODE, _MANY
    if target.architecture == 90:
        few, decode, many = _FEW_ON_HOPPER, _DECODE_ON_HOPPER, _MANY_ON_HOPPER
    listed = few if rows <= _FEW_ROWS else decode if rows <= DECODE_ROWS else many
    if target.backend == "hip":
        return tuple(replace(tile, stages=2) for tile in listed)
    return listed


def matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    target: Target,
    tile: Tile | None = None,
) -> Tensor:
    """x [..., K] @ (codes * scale) [N, K].T + bias.

    Args:
        x: bfloat16 or float16.
        codes: int8 [N, K].
        scale: float32 [N, 1].
        bias: [N].
        tile: the one to take, instead of choosing.
    """
    n, k = codes.shape
    out = torch.empty(*x.shape[:-1], n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    m = out.numel() // n
    operands = _aligned(x.reshape(m, k)), _aligned(codes)
    column_scale = scale.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    choices = (tile,) if tile else _with_parts(tiles(target, m), m, n, k)
    split_k = choices[0].split_k
    with on_device_of(out):
        if split_k == 1:
            _launch(*operands, out.view(m, n), column_scale, bias, choices)
        else:
            sums = partial_sums(split_k, m, n, like=out)
            _launch(*operands, sums, None, None, choices)
            reduce(sums, out.view(m, n), column_scale=column_scale, bias=bias)
    return out


def _launch(
    x: Tensor,
    codes: Tensor,
    out: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    choices: Sequence[Tile],
) -> None:
    """With K in parts `out` takes their sums, and scales and bias are for later."""
    (m, k), n = x.shape, len(codes)
    kernel, options = tuned(jit.matmul_kernel, choices, out)

    def grid(meta: Mapping[str, int]) -> tuple[int, int]:
        return blocks_of(m, meta["BLOCK_M"]) * blocks_of(n, meta["BLOCK_N"]), meta["SPLIT_K"]

    kernel[grid](x, codes, out, column_scale, bias, m, n, k, row_bucket(m), **options)


def _with_parts(choices: Sequence[Tile], m: int, n: int, k: int) -> tuple[Tile, ...]:
    """The tiles with K cut, as the first of them wants it, so that all need the same room."""
    if m > DECODE_ROWS:
        return tuple(choices)
    first = choices[0]
    split_k = parts(m, n, k, block_m=first.block_m, block_n=first.block_n)
    return tuple(replace(choice, split_k=split_k) for choice in choices)


def _aligned(matrix: Tensor) -> Tensor:
    """Contiguous, with rows of a multiple of 16 columns, filled up with zeros."""
    missing = -matrix.shape[1] % _ALIGNMENT
    return functional.pad(matrix, (0, missing)) if missing else matrix.contiguous()
