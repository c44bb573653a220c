"""INT8: launches of the matrix product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from autoq.kernels._jit import int8_matmul as jit
from autoq.kernels._jit import split_k as split_k_jit
from autoq.kernels._launch.device import blocks_of, on_device_of
from autoq.kernels._launch.split_k import parts
from autoq.kernels._launch.tiles import Tile, row_bucket, tuned
from autoq.kernels.targets import Target

DECODE_ROWS = 64
"""Products of at most so many rows take the tiles of decoding and may be cut along K."""

_ALIGNMENT = 16
_REDUCE_BLOCK = 512

# In the contract scales and bias are operations of their own, each rounded.
_SEPARATE_OPERATIONS = {"enable_fp_fusion": False}


_HOPPER = (
    Tile(128, 256, 128, warps=8, stages=3),
    Tile(256, 128, 128, warps=8, stages=3),
    Tile(128, 128, 128, warps=8, stages=4),
    Tile(64, 128, 128, warps=4, stages=3),
)
_OTHERS = (
    Tile(128, 128, 128, warps=8, stages=3),
    Tile(128, 128, 64, warps=8, stages=4),
    Tile(64, 128, 128, warps=4, stages=3),
)


def tiles(target: Target, rows: int) -> tuple[Tile, ...]:
    """What to try on a target for a product of so many rows."""
    if rows <= DECODE_ROWS:
        block_m = row_bucket(rows)
        return (
            Tile(block_m, 64, 128, warps=4, stages=4),
            Tile(block_m, 128, 64, warps=8, stages=4),
            Tile(block_m, 32, 256, warps=4, stages=3),
        )
    return _HOPPER if target.architecture == 90 else _OTHERS


def matmul(
    a_codes: Tensor,
    a_scale: Tensor,
    b_codes: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    target: Target,
    tile: Tile | None = None,
) -> Tensor:
    """a [..., K] @ b [N, K].T + bias."""
    n, k = b_codes.shape
    out = torch.empty(*a_codes.shape[:-1], n, dtype=out_dtype, device=a_codes.device)
    if not out.numel():
        return out
    m = out.numel() // n
    a, b = _aligned(a_codes.reshape(m, k)), _aligned(b_codes)
    row_scale, column_scale = a_scale.contiguous(), b_scale.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    choices = (tile,) if tile else _with_parts(tiles(target, m), m, n, k)
    split_k = choices[0].split_k
    sums = out if split_k == 1 else torch.empty(split_k, m, n, dtype=torch.int32, device=a.device)
    with on_device_of(a):
        _launch(a, b, sums, row_scale, column_scale, bias, choices)
        if split_k > 1:
            _reduce(sums, out, row_scale, column_scale, bias)
    return out


def _launch(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    bias: Tensor | None,
    choices: Sequence[Tile],
) -> None:
    (m, k), n = a.shape, len(b)
    kernel, options = tuned(jit.matmul_kernel, choices, a)

    def grid(meta: Mapping[str, int]) -> tuple[int, int]:
        return blocks_of(m, meta["BLOCK_M"]) * blocks_of(n, meta["BLOCK_N"]), meta["SPLIT_K"]

    kernel[grid](
        a,
        b,
        out,
        row_scale,
        column_scale,
        bias,
        m,
        n,
        k,
        row_bucket(m),
        **options,
        **_SEPARATE_OPERATIONS,
    )


def _reduce(
    sums: Tensor, out: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None
) -> None:
    split_k, m, n = sums.shape
    split_k_jit.reduce_kernel[(blocks_of(m * n, _REDUCE_BLOCK),)](
        sums,
        out,
        row_scale,
        column_scale,
        bias,
        m,
        n,
        1,
        1,
        SPLIT_K=split_k,
        BLOCK=_REDUCE_BLOCK,
        num_warps=4,
        **_SEPARATE_OPERATIONS,
    )


def _with_parts(choices: Sequence[Tile], m: int, n: int, k: int) -> tuple[Tile, ...]:
    """The tiles with K cut, as the first of them wants it, so that all need the same room."""
    if m > DECODE_ROWS:
        return tuple(choices)
    first = choices[0]
    split_k = parts(m, n, k, block_m=first.block_m, block_n=first.block_n)
    return tuple(replace(choice, split_k=split_k) for choice in choices)


def _aligned(codes: Tensor) -> Tensor:
    """Contiguous codes whose rows are a multiple of 16 bytes, filled up with zeros."""
    missing = -codes.shape[1] % _ALIGNMENT
    return functional.pad(codes, (0, missing)) if missing else codes.contiguous()
