"""Products with INT4 weights of FP8 inputs and, for it is one kernel, of 16-bit inputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import int4, int4_matmul
from autoq.kernels._launch.int4_tiles import FEW_ROWS, listed
from autoq.kernels._launch.int4_variant import DECODE_ROWS, Product
from autoq.kernels._launch.tiles import Tile
from autoq.kernels.targets import TARGETS, Target

_N = _K = 8192
_MANY_ROWS = 4096
_PARTS = 4

_16_BIT_UNITS = {
    "sm_80": r"mma\.sync.*\.f32\.b?f16\.b?f16",
    "sm_89": r"mma\.sync.*\.f32\.b?f16\.b?f16",
    "sm_90": r"wgmma\.mma_async.*\.f32\.b?f16\.b?f16",
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::f16",
    "sm_120": r"mma\.sync.*\.f32\.b?f16\.b?f16",
    "gfx942": r"v_mfma_f32_\d+x\d+x\d+_b?f16",
    "gfx950": r"v_mfma_f32_\d+x\d+x\d+_b?f16",
}
_FP8_UNITS = {
    **_16_BIT_UNITS,
    "sm_89": r"mma\.sync.*\.f32\.e4m3\.e4m3",
    "sm_90": r"wgmma\.mma_async.*\.f32\.e4m3\.e4m3",
    "sm_100": r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4",
    "sm_120": r"mma\.sync.*\.f32\.e4m3\.e4m3",
    "gfx950": r"v_mfma_f32_\d+x\d+x\d+_(fp8_fp8|f8f6f4)",
}
# Four bytes at a time are looked up in the table of the first one's row, so the layout must put
# bytes of one row together. The PTX names the registers of all four tables in a comment.
_ONE_ROW = r"(?s)\A(?!.*// one row: (%\w+) (?!\1 \1 \1, (%\w+) \2 \2 \2\s)).*// one row.*"
_TWO_LEVEL_UNITS = {
    name: f"{_ONE_ROW}{unit}" if name in ("sm_89", "sm_90", "sm_100", "sm_120") else unit
    for name, unit in _FP8_UNITS.items()
}
_UNITS = {
    Product.W4A16: _16_BIT_UNITS,
    Product.W4A8: _FP8_UNITS,
    Product.TWO_LEVEL: _TWO_LEVEL_UNITS,
}
_OPERATIONS = {
    Product.W4A16: "int4.linear",
    Product.W4A8: "w4a8.linear",
    Product.TWO_LEVEL: "w4a8.linear",
}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _matmul(
    product: Product, dtype: torch.dtype, m: int, group_size: int, tile: Tile, target: Target
) -> object:
    return int4_matmul.matmul(
        _empty(m, _K, dtype=dtype),
        _empty(_N, _K // 2, dtype=torch.uint8),
        _empty(_N, _K // group_size),
        _empty(_N, dtype=torch.bfloat16),
        torch.bfloat16,
        row_scale=None if product is Product.W4A16 else _empty(m, 1),
        tensor_scale=_empty() if product is Product.TWO_LEVEL else None,
        target=target,
        tile=tile,
    )


def _case(
    product: Product,
    m: int,
    tile: Tile,
    targets: tuple[str, ...],
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    group_size: int = 128,
) -> CompileCase:
    units = _UNITS[product]
    if tile.warps == 2:  # fewer than Hopper's instructions need
        units = dict.fromkeys(units, _16_BIT_UNITS["sm_80"])
    name = str(dtype).removeprefix("torch.")
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.warps} warps"
    return CompileCase(
        operation=_OPERATIONS[product],
        variant=f"{product}, {name}, {m} rows, groups of {group_size}, {shape}",
        launch=partial(_matmul, product, dtype, m, group_size, tile),
        targets=targets,
        instructions=units,
    )


def _products() -> Iterator[CompileCase]:
    for product in Product:
        dtype = torch.bfloat16 if product is Product.W4A16 else torch.float8_e4m3fn
        for m in (FEW_ROWS, DECODE_ROWS, _MANY_ROWS):
            targets = defaultdict(list)
            for name, target in TARGETS.items():
                for tile in listed(target, product, m):
                    targets[tile].append(name)
            for tile, names in targets.items():
                split_k = 1 if m > DECODE_ROWS else _PARTS
                yield _case(product, m, replace(tile, split_k=split_k), tuple(names), dtype=dtype)
        # Half a group is narrower than the narrowest dot.
        for name in ("sm_89", "gfx942"):
            first = listed(TARGETS[name], product, FEW_ROWS)[0]
            yield _case(product, FEW_ROWS, first, (name,), dtype=dtype, group_size=32)
    first = listed(TARGETS["sm_120"], Product.W4A16, DECODE_ROWS)[1]
    yield _case(Product.W4A16, DECODE_ROWS, first, ("sm_80", "sm_120"), dtype=torch.float16)


def _to_e4m3(target: Target) -> object:
    codes, scale = _empty(_N, _K // 2, dtype=torch.uint8), _empty(_N, _K // 128)
    return int4.to_e4m3(codes, scale, _empty(), target=target)


CASES = [
    *_products(),
    CompileCase(operation="w4a8.linear", variant="weight unpacked to E4M3", launch=_to_e4m3),
]
