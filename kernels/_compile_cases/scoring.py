"""Scoring's sums."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import scoring
from autoq.kernels._scheme import Scheme
from autoq.kernels.targets import Target

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _input_statistics(dtype: torch.dtype, target: Target) -> object:
    return scoring.input_statistics(_empty(4096, 4096, dtype=dtype), target=target)


def _fake_quantize_with_statistics(dtype: torch.dtype, scheme: Scheme, target: Target) -> object:
    x = _empty(4096, 4096, dtype=dtype)
    scale = None if scheme is Scheme.FP8_ROW else _empty()
    return scoring.fake_quantize_with_statistics(x, scheme, scale, target=target)


def _project(rows: int, dtype: torch.dtype, scheme: Scheme | None, target: Target) -> object:
    gradient, weight = _empty(rows, 4096, dtype=dtype), _empty(4096, 4096, dtype=dtype)
    inputs = (_empty(rows, 4096), _empty(rows, 4096), _empty(rows, 4096, dtype=dtype))
    if scheme is None:
        return scoring.project(gradient, weight, *inputs, target=target)
    return scoring.project_weight(gradient, weight, scheme, _empty(), *inputs, target=target)


_MATRIX_UNITS = {
    "bfloat16": {
        **dict.fromkeys(("sm_80", "sm_89", "sm_120"), r"mma\.sync.*\.f32\.bf16\.bf16\.f32"),
        "sm_90": r"wgmma\.mma_async.*\.f32\.bf16\.bf16",
        "sm_100": r"tcgen05\.mma.*kind::f16",
        **dict.fromkeys(("gfx942", "gfx950"), r"v_mfma_f32_\d+x\d+x\d+_?bf16"),
    },
    "float32": {
        **dict.fromkeys(("sm_80", "sm_89", "sm_120"), r"mma\.sync.*\.f32\.tf32\.tf32\.f32"),
        "sm_90": r"wgmma\.mma_async.*\.f32\.tf32\.tf32",
        "sm_100": r"tcgen05\.mma.*kind::tf32",
        **dict.fromkeys(("gfx942", "gfx950"), r"v_mfma_f32_\d+x\d+x\d+_?f32"),
    },
}


def _projections() -> Iterator[CompileCase]:
    for name, dtype in _DTYPES.items():
        for rows in (4096, 64):
            for scheme in (None, Scheme.FP8_TENSOR, Scheme.NVFP4):
                yield CompileCase(
                    operation="scoring.project" if scheme is None else "scoring.project_weight",
                    variant=f"{name}, {rows} rows" + ("" if scheme is None else f", {scheme}"),
                    launch=partial(_project, rows, dtype, scheme),
                    instructions=_MATRIX_UNITS[name],
                )


CASES = [
    *(
        CompileCase(
            operation="scoring.input_statistics",
            variant=name,
            launch=partial(_input_statistics, dtype),
        )
        for name, dtype in _DTYPES.items()
    ),
    *(
        CompileCase(
            operation="scoring.fake_quantize_with_statistics",
            variant=f"{name}, {scheme}",
            launch=partial(_fake_quantize_with_statistics, dtype, scheme),
        )
        for name, dtype in _DTYPES.items()
        for scheme in Scheme
    ),
    *_projections(),
]
