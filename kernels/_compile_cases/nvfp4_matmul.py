"""NVFP4, matrix products: every tile of every kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import nvfp4_matmul
from autoq.kernels._launch.nvfp4_tiles import tiles
from autoq.kernels._launch.nvfp4_variant import DECODE_ROWS, FEW_ROWS, Kernel, variant
from autoq.kernels._launch.tiles import Tile
from autoq.kernels.targets import TARGETS, Target

_MANY = 4096
_SIZE = 8192
_TAILED = 8208  # columns: a multiple of 16 only

_SCALED = {
    "sm_100": r"tcgen05\.mma\.\S*mxf4nvf4\.block_scale",
    "sm_120": r"mma\.sync\.\S*mxf4nvf4\.block_scale\.scale_vec::4X.*ue4m3",
}
_FEW_ROWS_OF_16_BITS = r"mma\.sync\.\S*f32\.(bf16\.bf16|f16\.f16)|v_mfma_f32_\w*(bf16|f16)"
_MANY_ROWS = {
    **dict.fromkeys(("sm_80", "sm_89", "sm_120"), r"mma\.sync\.\S*f32\.(bf16\.bf16|f16\.f16)"),
    "sm_90": r"wgmma\.mma_async\S*f32\.(bf16\.bf16|f16\.f16)",
    "sm_100": r"tcgen05\.mma\.\S*kind::f16",
    **dict.fromkeys(("gfx942", "gfx950"), r"v_mfma_f32_\w*(bf16|f16)"),
}
# The sums of the largest tile take all registers: a few addresses of the way out are put aside.
_ALLOWED_SPILLS = {("sm_100", "3.6"): 48}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _packed(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _meta(rows, columns // 2, dtype=torch.uint8),
        _meta(rows, columns // 16, dtype=torch.float8_e4m3fn),
        _meta(),
    )


def _linear(
    m: int,
    k: int,
    dtype: torch.dtype,
    quantized: bool,
    tile: Tile | None,
    target: Target,
) -> object:
    return nvfp4_matmul.linear(
        _meta(m, k, dtype=dtype),
        *_packed(_SIZE, k),
        _meta(_SIZE, dtype=dtype),
        _meta() if quantized else None,
        dtype,
        target=target,
        tile=tile,
    )


def _matmul(m: int, tile: Tile | None, target: Target) -> object:
    return nvfp4_matmul.matmul(
        *_packed(m, _SIZE), *_packed(_SIZE, _SIZE), None, torch.bfloat16, target=target, tile=tile
    )


def _case(
    target: Target,
    m: int,
    what: str,
    *,
    tile: Tile | None = None,
    dtype: torch.dtype = torch.bfloat16,
    k: int = _SIZE,
    quantized: bool = False,
) -> CompileCase:
    kernel = variant(target, m, _SIZE, k, quantized).kernel
    if kernel is Kernel.SCALED:
        instruction = _SCALED[target.name]
    else:
        instruction = _FEW_ROWS_OF_16_BITS if m <= FEW_ROWS else _MANY_ROWS[target.name]
    return CompileCase(
        operation="nvfp4.linear",
        variant=f"{'quantised input' if quantized else 'weight only'}, {m} rows, {what}",
        launch=partial(_linear, m, k, dtype, quantized, tile),
        targets=(target.name,),
        instructions={target.name: instruction},
        allowed_spill_bytes=_ALLOWED_SPILLS if m == _MANY else {},
    )


def _tile_cases(target: Target, m: int, quantized: bool) -> list[CompileCase]:
    """Every tile; K is cut where few rows call for it."""
    chosen = variant(target, m, _SIZE, _SIZE, quantized)
    if quantized and chosen.kernel is Kernel.WEIGHT_ONLY:
        return [_case(target, m, "as bfloat16", quantized=True)]
    return [
        _case(
            target,
            m,
            f"tile {tile.block_m}x{tile.block_n}x{tile.block_k}",
            tile=replace(tile, split_k=4) if m <= DECODE_ROWS else tile,
            quantized=quantized,
        )
        for tile in tiles(target, chosen, m)
    ]


def _other_cases(target: Target) -> list[CompileCase]:
    """One row, tails along K and the other types, each with a tile of its own choosing."""
    cases = []
    for quantized in (False, True):
        for m in (1, _MANY):
            cases.append(_case(target, m, "tail along K", k=_TAILED, quantized=quantized))
    for m in (1, _MANY):
        cases.append(_case(target, m, "float16", dtype=torch.float16))
    return [*cases, _case(target, 1, "float32", dtype=torch.float32)]


CASES = [
    *(
        case
        for target in TARGETS.values()
        for m in (FEW_ROWS, DECODE_ROWS, _MANY)
        for quantized in (False, True)
        for case in _tile_cases(target, m, quantized)
    ),
    *(case for target in TARGETS.values() for case in _other_cases(target)),
    *(
        CompileCase(operation="nvfp4.matmul", variant=f"{m} rows", launch=partial(_matmul, m, None))
        for m in (FEW_ROWS, _MANY)
    ),
]
