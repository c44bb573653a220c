"""INT8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import int8, int8_matmul, int8_weights
from autoq.kernels._launch.tiles import Tile
from autoq.kernels.targets import TARGETS, Target

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _quantize(dtype: torch.dtype, columns: int, target: Target) -> object:
    x = torch.empty(4096, columns, dtype=dtype, device="meta")
    return int8.quantize(x, None, target=target)


def _fake_quantize(dtype: torch.dtype, target: Target) -> object:
    x = torch.empty(4096, 4096, dtype=dtype, device="meta")
    return int8.fake_quantize(x, None, target=target)


def _quantize_under_given_scales(target: Target) -> object:
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    return int8.quantize(x, torch.empty(4096, 1, device="meta"), target=target)


def _dequantize(dtype: torch.dtype, target: Target) -> object:
    codes = torch.empty(4096, 4096, dtype=torch.int8, device="meta")
    return int8.dequantize(codes, torch.empty(4096, 1, device="meta"), dtype, target=target)


def _matmul(m: int, tile: Tile, target: Target) -> object:
    def codes(rows: int) -> torch.Tensor:
        return torch.empty(rows, 4096, dtype=torch.int8, device="meta")

    return int8_matmul.matmul(
        codes(m),
        torch.empty(m, 1, device="meta"),
        codes(4096),
        torch.empty(4096, 1, device="meta"),
        torch.empty(4096, dtype=torch.bfloat16, device="meta"),
        torch.bfloat16,
        target=target,
        tile=tile,
    )


_MATRIX_UNITS = {
    "sm_80": r"mma\.sync.*\.s32\.s8\.s8\.s32",
    "sm_89": r"mma\.sync.*\.s32\.s8\.s8\.s32",
    "sm_90": r"wgmma\.mma_async.*\.s32\.s8\.s8",
    # Triton uses Blackwell's own instruction from 3.9 on.
    "sm_100": r"mma\.sync.*\.s32\.s8\.s8\.s32|tcgen05\.mma.*kind::i8",
    "sm_120": r"mma\.sync.*\.s32\.s8\.s8\.s32",
    "gfx942": r"v_mfma_i32_\d+x\d+x\d+_i8",
    "gfx950": r"v_mfma_i32_\d+x\d+x\d+_i8",
}


def _weights(dtype: torch.dtype, m: int, tile: Tile, target: Target) -> object:
    return int8_weights.matmul(
        torch.empty(m, 4096, dtype=dtype, device="meta"),
        torch.empty(4096, 4096, dtype=torch.int8, device="meta"),
        torch.empty(4096, 1, device="meta"),
        torch.empty(4096, dtype=dtype, device="meta"),
        dtype,
        target=target,
        tile=tile,
    )


def _matmul_case(m: int, tile: Tile, targets: list[str]) -> CompileCase:
    units = dict(_MATRIX_UNITS)
    if tile.block_m < 64:
        # Hopper's own instruction takes 64 rows.
        units["sm_90"] = units["sm_89"]
    shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return CompileCase(
        operation="int8.matmul",
        variant=f"{m} rows, {shape} in {tile.split_k} parts",
        launch=partial(_matmul, m, tile),
        targets=tuple(targets),
        instructions={target: units[target] for target in targets},
        allowed_spill_bytes={("sm_100", "3.6"): 8} if tile.block_m == 64 else {},
    )


def _matmul_cases() -> Iterator[CompileCase]:
    """Every tile on every target that lists it, whole and in parts."""
    for m, split_k in ((4096, 1), (64, 1), (64, 2), (32, 1), (32, 2), (16, 1), (16, 4)):
        targets_of: dict[Tile, list[str]] = {}
        for name, target in TARGETS.items():
            for tile in int8_matmul.tiles(target, m):
                targets_of.setdefault(replace(tile, split_k=split_k), []).append(name)
        for tile, names in targets_of.items():
            yield _matmul_case(m, tile, names)


def _units_of_16_bit(ptx: str, hip: str) -> dict[str, str]:
    """What multiplies 16-bit numbers: names of a type in PTX, and in AMD's assembly."""
    ampere = rf"mma\.sync.*\.f32\.{ptx}\.{ptx}\.f32"
    return {
        **dict.fromkeys(("sm_80", "sm_89", "sm_120"), ampere),
        "sm_90": rf"wgmma\.mma_async.*\.f32\.{ptx}\.{ptx}|{ampere}",
        "sm_100": rf"tcgen05\.mma.*kind::f16|{ampere}",
        **dict.fromkeys(("gfx942", "gfx950"), rf"v_mfma_f32_\d+x\d+x\d+_{hip}"),
    }


_SPILLS = {(64, 64, 2): {("sm_89", "3.9"): 8, ("sm_100", "3.6"): 16}}
"""Rows, rows of the weight in a tile, parts -> what triton spills of 16-bit inputs there."""


def _weight_cases() -> Iterator[CompileCase]:
    """Every tile on every target that lists it, whole, and where rows are few in parts."""
    dtypes = ((torch.bfloat16, "bf16", "bf16"), (torch.float16, "f16", "f16"))
    for m, split_k in ((4096, 1), (64, 1), (64, 2), (16, 1), (16, 4)):
        targets_of: dict[Tile, list[str]] = {}
        for name, target in TARGETS.items():
            for tile in int8_weights.tiles(target, m):
                targets_of.setdefault(replace(tile, split_k=split_k), []).append(name)
        for tile, names in targets_of.items():
            for dtype, ptx, hip in dtypes if split_k == 1 else dtypes[:1]:
                units = _units_of_16_bit(ptx, hip)
                shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
                yield CompileCase(
                    operation="int8.linear",
                    variant=f"{m} rows of {ptx}, {shape} in {split_k} parts, {tile.stages} stages",
                    launch=partial(_weights, dtype, m, tile),
                    targets=tuple(names),
                    instructions={name: units[name] for name in names},
                    allowed_spill_bytes=_SPILLS.get((m, tile.block_n, split_k), {}),
                )


CASES = [
    *(
        CompileCase(
            operation="int8.quantize",
            variant=f"{name}, {columns} columns",
            launch=partial(_quantize, dtype, columns),
        )
        for name, dtype in _DTYPES.items()
        for columns in (512, 4096, 14336)
    ),
    CompileCase(
        operation="int8.quantize",
        variant="bfloat16, given scales",
        launch=_quantize_under_given_scales,
    ),
    *(
        CompileCase(
            operation="int8.fake_quantize", variant=name, launch=partial(_fake_quantize, dtype)
        )
        for name, dtype in _DTYPES.items()
    ),
    *(
        CompileCase(operation="int8.dequantize", variant=name, launch=partial(_dequantize, dtype))
        for name, dtype in _DTYPES.items()
    ),
    *_matmul_cases(),
    *_weight_cases(),
]
