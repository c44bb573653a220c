"""Scoring's sums: launches."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._jit import scoring as jit
from autoq.kernels._launch import fp8
from autoq.kernels._launch.device import blocks_of, on_device_of, rounds_to_e4m3
from autoq.kernels._launch.tiles import Tile
from autoq.kernels._scaling import Scaling
from autoq.kernels._scheme import Scheme
from autoq.kernels.targets import Target

_ROWS, _COLUMNS = 16, 128
"""Tile of the statistics: 8 numbers for each of 256 threads, four sums for each of them."""
_WANTED_PROGRAMS = 528
"""Four for each of the 132 multiprocessors of an H200."""
_MOST_STEPS = 16
_BLOCK = 256
_FEW_ROWS = 64
_MUCH_SHARED_MEMORY = 200_000

# Errors are differences of rounded numbers: a product fused with the subtraction is not rounded.
_SEPARATE_OPERATIONS = {"enable_fp_fusion": False}


def fake_quantize_with_statistics(
    x: Tensor, scheme: Scheme, scale: Tensor | None, *, target: Target
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, amax [K], float64 sums [3, K])."""
    x = x.contiguous()
    values = torch.empty_like(x)
    if scheme is Scheme.FP8_ROW:
        scale = fp8.scales(x, Scaling.ROW, target=target)
    amax, sums = _statistics(x, values, scale, scheme, target)
    return values, amax, sums


def input_statistics(x: Tensor, *, target: Target) -> tuple[Tensor, Tensor]:
    """(amax [K], float64 sum of |x| [K])."""
    amax, sums = _statistics(x.contiguous(), None, None, Scheme.FP8_TENSOR, target)
    return amax, sums[0]


def _statistics(
    x: Tensor, values: Tensor | None, scale: Tensor | None, scheme: Scheme, target: Target
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    sums = torch.empty(1 if values is None else 3, columns, dtype=torch.float64, device=x.device)
    amax = torch.empty(columns, dtype=torch.float32, device=x.device)
    if not columns:
        return amax, sums
    tiles = blocks_of(rows, _ROWS) * blocks_of(columns, _COLUMNS)
    steps = max(1, min(_MOST_STEPS, tiles // _WANTED_PROGRAMS))
    programs = blocks_of(rows, _ROWS * steps)
    partial = torch.empty(len(sums) + 1, programs, columns, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        if programs:
            jit.statistics_kernel[(programs, blocks_of(columns, _COLUMNS))](
                x,
                values,
                scale,
                partial,
                rows,
                columns,
                steps,
                ROWS=_ROWS,
                COLUMNS=_COLUMNS,
                ROW_SCALES=scheme is Scheme.FP8_ROW,
                NVFP4=scheme is Scheme.NVFP4,
                HARDWARE=rounds_to_e4m3(target),
                num_warps=8,
                **_SEPARATE_OPERATIONS,
            )
        jit.add_statistics_kernel[(blocks_of(columns, _BLOCK), len(partial))](
            partial, amax, sums, programs, columns, BLOCK=_BLOCK, num_warps=4
        )
    return amax, sums


def tile_of(target: Target, rows: int, dtype: torch.dtype, scheme: Scheme | None) -> Tile:
    """The tile of a projection.

    One, not several for the autotuner to measure: another tile sums in another order, and a study
    that is continued must get the bits that it would have got without the interruption.
    """
    if rows <= _FEW_ROWS:
        return Tile(64, 64, 32, warps=4, stages=3)
    if dtype == torch.float32:
        return Tile(128, 64, 32, warps=8, stages=3)
    deep = scheme is None and target.shared_memory_bytes >= _MUCH_SHARED_MEMORY
    return Tile(128, 128, 64 if deep else 32, warps=8, stages=3)


def project(
    output_gradient: Tensor,
    weight_error: Tensor,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
    *,
    target: Target,
) -> Tensor:
    """Projections [T]."""
    return _project(
        output_gradient, weight_error, None, None, changed, exact, input_gradient, target
    )


def project_weight(
    output_gradient: Tensor,
    weight: Tensor,
    scheme: Scheme,
    scale: Tensor | None,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
    *,
    target: Target,
) -> Tensor:
    """Projections [T] with the error that `scheme` makes of a weight."""
    return _project(output_gradient, weight, scheme, scale, changed, exact, input_gradient, target)


def _project(
    output_gradient: Tensor,
    weight: Tensor,
    scheme: Scheme | None,
    scale: Tensor | None,
    changed: Tensor,
    exact: Tensor,
    input_gradient: Tensor,
    target: Target,
) -> Tensor:
    (m, k), n = output_gradient.shape, weight.shape[1]
    out = torch.empty(m, dtype=torch.float32, device=weight.device)
    if not m:
        return out
    tile = tile_of(target, m, output_gradient.dtype, scheme)
    parts = blocks_of(n, tile.block_n)
    partial = torch.empty(parts, m, dtype=torch.float32, device=out.device)
    with on_device_of(out):
        if parts:
            jit.project_kernel[(blocks_of(m, tile.block_m) * parts,)](
                output_gradient.contiguous(),
                weight.contiguous(),
                scale,
                changed.contiguous(),
                exact.contiguous(),
                input_gradient.contiguous(),
                partial,
                m,
                n,
                k,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                BLOCK_K=tile.block_k,
                GROUP_M=tile.group_m,
                NVFP4=scheme is Scheme.NVFP4,
                HARDWARE=rounds_to_e4m3(target),
                PRECISION=_precision(target),
                num_warps=tile.warps,
                num_stages=tile.stages,
                **_SEPARATE_OPERATIONS,
            )
        jit.add_projections_kernel[(blocks_of(m, _BLOCK),)](
            partial, out, m, parts, BLOCK=_BLOCK, num_warps=4
        )
    return out


def _precision(target: Target) -> str:
    """How float32 operands are multiplied; narrower ones are exact in any case."""
    return "ieee" if target.backend == "hip" else "tf32x3"
