"""Block scales chosen by the error that they leave, in vectorised torch, on any device.

Every step is one correctly rounded operation per value, and errors are added in a written order:
every device, number of threads and piece of the weight chooses the same scales.

Blocks are columns here: what is done with a block and its scale is then done with long rows. Signs
are left out, because rounding is the same on both sides of zero, but for INT4's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoq.kernels._mx import BLOCK, E2M1, ScaleRule
from autoq.kernels._torch import e2m1, int4, mx, nvfp4
from autoq.kernels._torch.chunks import exponent_part_, rows_per_piece
from autoq.kernels._torch.fp8 import decode_e4m3

NVFP4_OFFSETS = (-2, -1, 1, 2, 3, 4, 5, 6, 7, 8)
"""Steps of E4M3 from the scale of the largest magnitude; eight double a scale."""

INT4_FACTORS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Shares of the scale of the largest magnitude."""

MXFP4_OFFSETS = (-1, 1)
"""Powers of two beside that of the largest magnitude."""

_SMALLEST_CODE, _LARGEST_CODE = 1, 126  # E4M3: 2**-9 and 448
_LARGEST_BYTE = 252  # E8M0: 6 * 2**125 is the largest that float32 has

_ROUND_TO_INTEGER = 2.0**22
"""Times a power of two p and added, it rounds a magnitude to steps of p / 2, ties to even."""

_INFINITY_BITS = 0x7F800000
_PIECES_AT_ONCE = 4
"""Candidates are many short operations, of which the calls cost more than the memory."""


def nvfp4_block_scale(x: Tensor, global_scale: Tensor, importance: Tensor) -> Tensor:
    """float8_e4m3fn [N, K/16] of a matrix [N, K]."""

    def choose(values: Tensor, weights: Tensor | None) -> Tensor:
        magnitudes = values.abs_()
        base = nvfp4.stored_block_scale(_largest(magnitudes), global_scale).view(torch.uint8)
        codes = _candidates(base.int(), NVFP4_OFFSETS, _SMALLEST_CODE, _LARGEST_CODE)
        codes = codes.to(torch.uint8)
        steps = decode_e4m3(codes.view(torch.float8_e4m3fn)) * global_scale
        scratch = torch.empty(2, *magnitudes.shape, device=magnitudes.device)

        def error(number: int) -> Tensor:
            torch.div(magnitudes, steps[number], out=scratch[0])
            rounded = _round_magnitudes_(*scratch).mul_(steps[number])
            return _weighted_error(rounded, magnitudes, weights)

        return _best(codes, error)

    return _by_blocks(x, nvfp4.BLOCK, importance, choose).view(torch.float8_e4m3fn)


def mxfp4_block_scale(x: Tensor, rule: ScaleRule, importance: Tensor) -> Tensor:
    """uint8 [N, K/32] of a matrix [N, K]."""

    def choose(values: Tensor, weights: Tensor | None) -> Tensor:
        magnitudes = values.abs_()
        base = mx.scale_bytes(_largest(magnitudes), E2M1, rule)
        # The last exponent is infinity's, and NaN keeps its byte: no error is smaller than NaN.
        scales = _candidates(base, MXFP4_OFFSETS, 0, _LARGEST_BYTE)
        inverse, steps = mx.inverse_scale(scales), mx.decode_scale(scales)
        scratch = torch.empty(2, *magnitudes.shape, device=magnitudes.device)

        def error(number: int) -> Tensor:
            torch.mul(magnitudes, inverse[number], out=scratch[0])
            rounded = _round_magnitudes_(*scratch).mul_(steps[number])
            return _weighted_error(rounded, magnitudes, weights)

        return _best(scales, error).to(torch.uint8)

    return _by_blocks(x, BLOCK, importance, choose)


def int4_group_scale(
    weight: Tensor, group_size: int, storage_dtype: torch.dtype, importance: Tensor
) -> Tensor:
    """float32 [N, K/g]."""

    def choose(values: Tensor, weights: Tensor | None) -> Tensor:
        base = int4.stored_scale(_largest(values.abs()), storage_dtype)
        smaller = [_stored(base * factor, base, storage_dtype) for factor in INT4_FACTORS]
        scales = torch.stack((base, *smaller))
        scratch = torch.empty_like(values)

        def error(number: int) -> Tensor:
            codes = int4.codes_(values, scales[number], scratch)
            return _weighted_error(codes.mul_(scales[number]), values, weights)

        return _best(scales, error)

    return _by_blocks(weight, group_size, importance, choose)


def _largest(magnitudes: Tensor) -> Tensor:
    """The maximum of each column; of NaN that is one without a sign, which torch's has on CPUs."""
    return magnitudes.amax(0).abs_()


def _stored(scale: Tensor, base: Tensor, storage_dtype: torch.dtype) -> Tensor:
    """The scale as it will be stored; `base` where it is too small for that."""
    stored = scale.to(storage_dtype).float()
    return torch.where(stored == 0, base, stored)


def _candidates(base: Tensor, offsets: tuple[int, ...], lowest: int, highest: int) -> Tensor:
    """The base, as it is, and what lies beside it, int32 [1 + offsets, ...]."""
    beside = torch.tensor(offsets, dtype=torch.int32, device=base.device)
    return torch.cat((base[None], (base + beside[:, None]).clamp_(lowest, highest)))


def _round_magnitudes_(values: Tensor, scratch: Tensor) -> Tensor:
    """Replace float32 magnitudes by what E2M1 makes of them."""
    values.clamp_(max=e2m1.LARGEST)
    power = exponent_part_(values, scratch).clamp_(min=1.0)
    values.add_(power, alpha=_ROUND_TO_INTEGER)
    return values.sub_(power, alpha=_ROUND_TO_INTEGER)


def _best(candidates: Tensor, error: Callable[[int], Tensor]) -> Tensor:
    """Of each block's candidates [number, blocks] that with the smallest error, of equals the first.

    Where the first one's error is NaN it stays; other NaN are larger than any number. Errors are
    compared by their bits, with operations that are vectorised where choosing by a mask is not.
    """
    numbers = range(len(candidates))
    errors = torch.stack([error(number) for number in numbers]).abs_().view(torch.int32)
    errors[0].masked_fill_(errors[0] > _INFINITY_BITS, 0)
    differs = errors.sub_(errors.amin(0)).clamp_(max=1)
    order = torch.tensor(numbers, dtype=torch.int32, device=errors.device)
    chosen = torch.add(order[:, None], differs, alpha=len(candidates)).amin(0)
    return candidates.gather(0, chosen.long()[None])[0]


def _weighted_error(values: Tensor, exact: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of weights * (values - exact)**2 over the first dimension; `values` is lost."""
    values.sub_(exact)
    values.mul_(values)
    if weights is not None:
        values.view(len(values), -1, weights.shape[-1]).mul_(weights)
    return _pairwise_sum(values)


def _pairwise_sum(values: Tensor) -> Tensor:
    """Sum over the first dimension, in place: the second half is added to the first, again and again."""
    width = len(values)
    while width > 1:
        half = width // 2
        values[:half] += values[width - half : width]
        width -= half
    return values[0].clone()


def _by_blocks(
    matrix: Tensor,
    block: int,
    importance: Tensor,
    choose: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """`choose` on cache-sized pieces of a matrix [N, K], blocks as columns, in float32.

    Args:
        choose: (values [block, N' * K / block], of which it may dispose; weights [block, 1, K / block],
            None where all are 1) -> [N' * K / block].
    """
    columns = matrix.shape[1]
    weights = importance.view(-1, block).t()[:, None].contiguous()
    own = None if bool((weights == 1).all()) else weights

    def chosen(piece: Tensor) -> Tensor:
        lying = piece.float().reshape(-1, block).t()
        blocks = torch.empty(lying.shape, device=piece.device).copy_(lying)
        return choose(blocks, own).view(len(piece), columns // block)

    if not matrix.numel():
        return chosen(matrix)
    step = _PIECES_AT_ONCE * rows_per_piece(matrix)
    return torch.cat([chosen(piece) for piece in torch.split(matrix, step)])
