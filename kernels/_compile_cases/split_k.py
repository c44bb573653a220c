"""The second half of products that are cut along K."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import split_k
from autoq.kernels.targets import Target


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _reduce_scaled(_: Target) -> None:
    split_k.reduce(
        _meta(4, 16, 4096),
        _meta(16, 4096, dtype=torch.bfloat16),
        row_scale=_meta(16, 1),
        column_scale=_meta(),
        bias=_meta(4096, dtype=torch.bfloat16),
    )


def _reduce_plain(_: Target) -> None:
    split_k.reduce(_meta(32, 1, 4096), _meta(1, 4096, dtype=torch.float16))


CASES = [
    CompileCase(
        operation="split_k.reduce", variant="scales, bias, bfloat16", launch=_reduce_scaled
    ),
    CompileCase(operation="split_k.reduce", variant="32 parts, float16", launch=_reduce_plain),
]
