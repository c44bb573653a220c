"""INT4 in groups, and what its two-level form has in common with it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import int4
from autoq.kernels.targets import Target

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _quantize(dtype: torch.dtype, given: bool, target: Target) -> object:
    scale = _empty(4096, 32) if given else None
    return int4.quantize(_empty(4096, 4096, dtype=dtype), scale, 128, dtype, target=target)


def _fake_quantize(dtype: torch.dtype, given: bool, levels: int, target: Target) -> object:
    return int4.fake_quantize(
        _empty(4096, 4096, dtype=dtype),
        _empty(4096, 32) if given else None,
        _empty() if levels == 2 else None,
        128,
        torch.bfloat16,
        target=target,
    )


def _dequantize(dtype: torch.dtype, levels: int, target: Target) -> object:
    codes, scale = _empty(4096, 2048, dtype=torch.uint8), _empty(4096, 32)
    return int4.dequantize(codes, scale, _empty() if levels == 2 else None, dtype, target=target)


def _largest(target: Target) -> object:
    codes, scale = _empty(4096, 2048, dtype=torch.uint8), _empty(4096, 32)
    return int4.largest(codes, scale, target=target)


def _element_wise() -> Iterator[CompileCase]:
    for name, dtype in _DTYPES.items():
        for given in (False, True):
            scales = "given" if given else "computed"
            yield CompileCase(
                operation="int4.quantize",
                variant=f"{name}, scales {scales}",
                launch=partial(_quantize, dtype, given),
            )
            for levels, family in ((1, "int4"), (2, "w4a8")):
                yield CompileCase(
                    operation=f"{family}.fake_quantize",
                    variant=f"{name}, scales {scales}",
                    launch=partial(_fake_quantize, dtype, given, levels),
                )
        for levels, family in ((1, "int4"), (2, "w4a8")):
            yield CompileCase(
                operation=f"{family}.dequantize",
                variant=name,
                launch=partial(_dequantize, dtype, levels),
            )
    yield CompileCase(
        operation="w4a8.tensor_scale", variant="largest of the programs", launch=_largest
    )


CASES = list(_element_wise())
