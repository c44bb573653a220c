"""FP8 E4M3: matrix products, every tile of every list."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import fp8_matmul as launch
from autoq.kernels._launch.fp8_tiles import IN_BLOCKS, SCALED, Lists
from autoq.kernels._launch.tiles import Tile
from autoq.kernels._scaling import FP8Tensor, Scaling
from autoq.kernels.targets import TARGETS, Target

_UNITS = {
    "sm_80": r"mma\.sync\S*f32\.f16\.f16",
    "sm_89": r"mma\.sync\S*e4m3\.e4m3",
    "sm_90": r"wgmma\.mma_async\S*e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma\S*kind::f8f6f4",
    "sm_120": r"mma\.sync\S*mxf8f6f4\S*e4m3\.e4m3",
    "gfx942": r"v_mfma_f32_\w+_f16",
    "gfx950": r"v_mfma_f32_\w+_f8f6f4",
}
_BULK_UNITS = {
    name: rf"(?s)(?=.*cp\.async\.bulk\.tensor)(?=.*{_UNITS[name]})"
    for name in ("sm_90", "sm_100", "sm_120")
}
_K = 4096
_N = 4096


def _meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _packed(shape: tuple[int, int], scaling: Scaling) -> FP8Tensor:
    codes = _meta(shape, torch.float8_e4m3fn)
    return FP8Tensor(codes, _meta(scaling.scale_shape(shape)), scaling)


def _launch(
    shape: tuple[int, int, int],
    scalings: tuple[Scaling, Scaling],
    chosen: launch.Variant | None,
    out_dtype: torch.dtype,
    target: Target,
) -> object:
    m, n, k = shape
    a, b = _packed((m, k), scalings[0]), _packed((n, k), scalings[1])
    bias = _meta((n,), out_dtype)
    return launch.matmul(a, b, bias, out_dtype, target=target, chosen=chosen)


def _tile_cases(
    name: str, lists: Lists, scalings: tuple[Scaling, Scaling]
) -> Iterator[CompileCase]:
    """A case for each tile, at the sizes for which it is meant."""
    for target in TARGETS:
        for rows in (16, 32, 64):
            for tile in lists.decode[target]:
                tile = replace(tile, block_m=rows, split_k=4)
                yield _case(name, launch.Kernel.DECODE, target, tile, rows, scalings)
        for tile in lists.tiled[target]:
            yield _case(name, launch.Kernel.TILED, target, tile, 512, scalings)
        for tile in lists.persistent.get(target, ()):
            yield _case(name, launch.Kernel.PERSISTENT, target, tile, 8192, scalings)


def _case(
    name: str,
    kernel: launch.Kernel,
    target: str,
    tile: Tile,
    rows: int,
    scalings: tuple[Scaling, Scaling],
) -> CompileCase:
    persistent = kernel is launch.Kernel.PERSISTENT
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.warps} warps"
    chosen = launch.Variant(kernel, (tile,), "to be compiled")
    return CompileCase(
        operation="fp8.matmul",
        variant=f"{name}, {kernel}, {shape}, {tile.stages} stages",
        launch=partial(_launch, (rows, _N, _K), scalings, chosen, torch.bfloat16),
        targets=(target,),
        instructions=_BULK_UNITS if persistent else _UNITS,
        allowed_spill_bytes={("sm_120", "3.6"): 8} if persistent else {},
    )


def _first_tile_case(
    name: str, shape: tuple[int, int, int], b_scaling: Scaling, out_dtype: torch.dtype
) -> CompileCase:
    """What the first tile of every list makes of other operands."""
    a_scaling = Scaling.BLOCK_1X128 if b_scaling.in_blocks else Scaling.TENSOR
    return CompileCase(
        operation="fp8.matmul",
        variant=name,
        launch=partial(_launch, shape, (a_scaling, b_scaling), None, out_dtype),
        instructions=_UNITS,
        allowed_spill_bytes={("sm_120", "3.6"): 8},
    )


CASES = [
    *_tile_cases("scaled", SCALED, (Scaling.ROW, Scaling.ROW)),
    *_tile_cases("in blocks", IN_BLOCKS, (Scaling.BLOCK_1X128, Scaling.BLOCK_128X128)),
    *(
        _first_tile_case(f"{scaling} weight, {name}", shape, scaling, dtype)
        for scaling in (Scaling.TENSOR, Scaling.BLOCK_128X128)
        for name, shape, dtype in (
            ("one part of K", (8, 65536, 4096), torch.float16),
            ("tail of K, few rows", (8, 4096, 4112), torch.bfloat16),
            ("tail of K", (512, 4096, 4112), torch.bfloat16),
            ("float32", (8192, 4096, 4096), torch.float32),
        )
    ),
    _first_tile_case("1x128 weight", (512, 4096, 4096), Scaling.BLOCK_1X128, torch.bfloat16),
]
