"""NVFP4."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import nvfp4
from autoq.kernels.targets import Target

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Long enough for several steps a program, and a decoded token, for which a program has one.
_SHAPES = {"": (8192, 8192), ", one row": (1, 8192)}

_CONVERTS = dict.fromkeys(("sm_100", "sm_120"), r"cvt\.rn\.satfinite\.e2m1x2\.f32")


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _packed(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales, global scale."""
    return (
        _meta(rows, columns // 2, dtype=torch.uint8),
        _meta(rows, columns // 16, dtype=torch.float8_e4m3fn),
        _meta(),
    )


def _quantize(shape: tuple[int, int], dtype: torch.dtype, target: Target) -> object:
    return nvfp4.quantize(_meta(*shape, dtype=dtype), _meta(), target=target)


def _fake_quantize(shape: tuple[int, int], dtype: torch.dtype, target: Target) -> object:
    return nvfp4.fake_quantize(_meta(*shape, dtype=dtype), _meta(), target=target)


def _dequantize(shape: tuple[int, int], dtype: torch.dtype, target: Target) -> object:
    return nvfp4.dequantize(*_packed(*shape), dtype, target=target)


def _global_scale(shape: tuple[int, int], dtype: torch.dtype, target: Target) -> object:
    return nvfp4.global_scale(_meta(*shape, dtype=dtype), target=target)


def _unscaled_values(dtype: torch.dtype, target: Target) -> object:
    x = _meta(8192, 8192, dtype=dtype)
    return nvfp4.unscaled_values(x, _meta(), dtype, target=target)


def _unscaled_dequantize(dtype: torch.dtype, target: Target) -> object:
    codes, block_scale, _ = _packed(8192, 8192)
    return nvfp4.unscaled_dequantize(codes, block_scale, dtype, target=target)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = [
    *(
        CompileCase(
            operation=f"nvfp4.{operation}",
            variant=f"{_name(dtype)}{place}",
            launch=partial(launch, shape, dtype),
            instructions=_CONVERTS if operation == "quantize" else {},
        )
        for operation, launch in (
            ("quantize", _quantize),
            ("fake_quantize", _fake_quantize),
            ("dequantize", _dequantize),
            ("global_scale", _global_scale),
        )
        for dtype in _DTYPES
        for place, shape in _SHAPES.items()
    ),
    *(
        CompileCase(
            operation=f"nvfp4.{operation}",
            variant=f"{_name(dtype)}, without the global scale",
            launch=partial(launch, dtype),
        )
        for operation, launch in (
            ("fake_quantize", _unscaled_values),
            ("dequantize", _unscaled_dequantize),
        )
        for dtype in (torch.bfloat16, torch.float16)
    ),
]
