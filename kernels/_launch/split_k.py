"""Products with few rows: the sum over K is cut into parts, so that all of a GPU works.

Each part goes to [parts, M, N] in float32 and a second, small kernel adds them in order: the result
does not depend on which program ends first, as it would with atomic additions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._jit import split_k as jit
from autoq.kernels._launch.device import blocks_of, on_device_of

_WANTED_PROGRAMS = 264
"""Two for each of the 132 multiprocessors of an H200."""
_SHORTEST_PART = 512
"""Columns of K; shorter parts end before their pipeline of loads is full."""
_BLOCK = 512


def parts(m: int, n: int, k: int, *, block_m: int, block_n: int, weight_bits: int = 8) -> int:
    """Into how many parts to cut K, a power of two.

    Enough to occupy a GPU, but not more than pays: writing and reading the partial sums takes
    8 * m * n bytes a part, which shall stay below a quarter of the weight's n * k * bits / 8.
    """
    tiles = blocks_of(m, block_m) * blocks_of(n, block_n)
    most_that_pay = k * weight_bits // (256 * max(1, m))
    most = min(_WANTED_PROGRAMS // max(1, tiles), k // _SHORTEST_PART, most_that_pay)
    return 1 << (max(1, most).bit_length() - 1)


def partial_sums(parts: int, m: int, n: int, like: Tensor) -> Tensor:
    """Room for the sums of the parts, float32 [parts, m, n], on the device of `like`."""
    return torch.empty(parts, m, n, dtype=torch.float32, device=like.device)


def reduce(
    partial: Tensor,
    out: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """Write (sum of the parts) * column_scale * row_scale + bias to `out`.

    Args:
        partial: float32 [parts, M, N], contiguous.
        out: [M, N], contiguous.
        row_scale: float32 of one or M elements, contiguous.
        column_scale: float32 of one or N elements, contiguous.
        bias: [N], contiguous.
    """
    parts, m, n = partial.shape
    with on_device_of(out):
        jit.reduce_kernel[(blocks_of(m * n, _BLOCK),)](
            partial,
            out,
            row_scale,
            column_scale,
            bias,
            m,
            n,
            scale_stride(row_scale),
            scale_stride(column_scale),
            SPLIT_K=parts,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def scale_stride(scale: Tensor | None) -> int:
    """0 for a scale that all rows or columns share, else 1."""
    return 0 if scale is None or scale.numel() == 1 else 1
