"""FP8 E4M3."""

from __future__ import annotations

import torch

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import fp8
from autoq.kernels.targets import Target


def _quantize(target: Target) -> object:
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    return fp8.quantize(x, torch.empty((), device="meta"), target=target)


CASES = [
    CompileCase(
        operation="fp8.quantize",
        variant="per tensor, bfloat16",
        launch=_quantize,
        instructions={"sm_90": r"cvt\.rn\.satfinite\.e4m3x2"},
    )
]
