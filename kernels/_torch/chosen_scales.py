"""Block scales chosen by the error that they leave, in vectorised torch, on any device.

Every step is one correctly rounded operation per value, and errors are added in a written order:
every device, number of threads and piece of the weight chooses the same scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from autoq.kernels._mx import BLOCK, E2M1, ScaleRule
from autoq.kernels._torch import e2m1, int4, mx, nvfp4
from autoq.kernels._torch.chunks import rows_per_piece
from autoq.kernels._torch.fp8 import decode_e4m3

NVFP4_OFFSETS = (-2, -1, 1, 2, 3, 4, 5, 6, 7, 8)
"""Steps of E4M3 from the scale of the largest magnitude; eight double a scale."""

INT4_FACTORS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Shares of the scale of the largest magnitude."""

MXFP4_OFFSETS = (-1, 1)
"""Powers of two beside that of the largest magnitude."""

_SMALLEST_CODE, _LARGEST_CODE = 1, 126  # E4M3: 2**-9 and 448
_LARGEST_BYTE = 252  # E8M0: 6 * 2**125 is the largest that float32 has


def nvfp4_block_scale(x: Tensor, global_scale: Tensor, importance: Tensor) -> Tensor:
    """float8_e4m3fn [N, K/16] of a matrix [N, K]."""
    weights = importance.view(-1, nvfp4.BLOCK)

    def choose(piece: Tensor) -> Tensor:
        blocks = piece.view(len(piece), -1, nvfp4.BLOCK)
        base = nvfp4.block_scale(blocks, global_scale).squeeze(-1).to(torch.float8_e4m3fn)
        codes = base.view(torch.uint8).int()
        scratch, values = torch.empty_like(blocks), torch.empty_like(blocks)

        def error(candidate: Tensor) -> Tensor:
            scale = decode_e4m3(candidate.to(torch.uint8).view(torch.float8_e4m3fn))
            step = (scale * global_scale)[..., None]
            torch.div(blocks, step, out=values)
            e2m1.round_(values, scratch).mul_(step)
            return _weighted_error(values, blocks, weights)

        steps = ((codes + offset).clamp_(_SMALLEST_CODE, _LARGEST_CODE) for offset in NVFP4_OFFSETS)
        return _best(codes, steps, error).to(torch.uint8)

    return _by_rows(x, choose).view(torch.float8_e4m3fn)


def mxfp4_block_scale(x: Tensor, rule: ScaleRule, importance: Tensor) -> Tensor:
    """uint8 [N, K/32] of a matrix [N, K]."""
    weights = importance.view(-1, BLOCK)

    def choose(piece: Tensor) -> Tensor:
        blocks = piece.view(len(piece), -1, BLOCK)
        base = mx.scale_bytes(blocks.abs().amax(-1), E2M1, rule)
        scratch, values = torch.empty_like(blocks), torch.empty_like(blocks)

        def error(candidate: Tensor) -> Tensor:
            torch.mul(blocks, mx.inverse_scale(candidate)[..., None], out=values)
            e2m1.round_(values, scratch).mul_(mx.decode_scale(candidate)[..., None])
            return _weighted_error(values, blocks, weights)

        # The last exponent is infinity's, and NaN keeps its byte: no error is smaller than NaN.
        steps = ((base + offset).clamp_(0, _LARGEST_BYTE) for offset in MXFP4_OFFSETS)
        return _best(base, steps, error).to(torch.uint8)

    return _by_rows(x, choose)


def int4_group_scale(
    weight: Tensor, group_size: int, storage_dtype: torch.dtype, importance: Tensor
) -> Tensor:
    """float32 [N, K/g]."""
    weights = importance.view(-1, group_size)

    def choose(piece: Tensor) -> Tensor:
        groups = piece.view(len(piece), -1, group_size)
        base = int4.group_scale(piece, group_size, storage_dtype)
        values = torch.empty_like(groups)

        def error(scale: Tensor) -> Tensor:
            int4.codes_(groups, scale[..., None], values).mul_(scale[..., None])
            return _weighted_error(values, groups, weights)

        smaller = (_stored(base * factor, base, storage_dtype) for factor in INT4_FACTORS)
        return _best(base, smaller, error)

    return _by_rows(weight, choose)


def _stored(scale: Tensor, base: Tensor, storage_dtype: torch.dtype) -> Tensor:
    """The scale as it will be stored; `base` where it is too small for that."""
    stored = scale.to(storage_dtype).float()
    return torch.where(stored == 0, base, stored)


def _best(base: Tensor, others: Iterable[Tensor], error: Callable[[Tensor], Tensor]) -> Tensor:
    """For every block the candidate that leaves the smallest error, and of equals the first."""
    best, best_error = base, error(base)
    for candidate in others:
        found = error(candidate)
        smaller = found < best_error
        best = torch.where(smaller, candidate, best)
        best_error = torch.where(smaller, found, best_error)
    return best


def _weighted_error(values: Tensor, exact: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights * (values - exact)**2 over the last dimension; `values` is lost."""
    values.sub_(exact)
    values.mul_(values).mul_(weights)
    return _pairwise_sum(values)


def _pairwise_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, in place: the second half is added to the first, again and again."""
    width = values.shape[-1]
    while width > 1:
        half = width // 2
        values[..., :half] += values[..., width - half : width]
        width -= half
    return values[..., 0].clone()


def _by_rows(matrix: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """`choose` on cache-sized pieces of a matrix, in float32."""
    if not matrix.numel():
        return choose(matrix.float())
    step = rows_per_piece(matrix)
    return torch.cat([choose(piece.float().contiguous()) for piece in torch.split(matrix, step)])
