"""FP8 E4M3, element by element."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import fp8
from autoq.kernels._scaling import Scaling
from autoq.kernels.targets import Target

_CONVERTS = dict.fromkeys(("sm_90", "sm_100", "sm_120"), r"cvt\.rn\.satfinite\.e4m3x2\.f32")
_WIDE_LOADS = dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"), r"ld\.global\S*\.v4")
_WIDE_LOADS_AND_CONVERTS = _WIDE_LOADS | {
    name: rf"(?s)(?=.*{_WIDE_LOADS[name]})(?=.*{convert})" for name, convert in _CONVERTS.items()
}
_SHAPES = {"": (4096, 4096), ", long rows": (4096, 53248), ", unaligned rows": (4096, 517)}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _scales(scaling: Scaling, dtype: torch.dtype, shape: tuple[int, ...], target: Target) -> object:
    return fp8.scales(_meta(shape, dtype), scaling, target=target)


def _quantize(
    scaling: Scaling, given: bool, dtype: torch.dtype, shape: tuple[int, ...], target: Target
) -> object:
    scale = _meta(scaling.scale_shape(shape)) if given else None
    return fp8.quantize(_meta(shape, dtype), scale, scaling, target=target)


def _fake_quantize(
    scaling: Scaling, given: bool, dtype: torch.dtype, shape: tuple[int, ...], target: Target
) -> object:
    scale = _meta(scaling.scale_shape(shape)) if given else None
    return fp8.fake_quantize(_meta(shape, dtype), scale, scaling, target=target)


def _dequantize(
    scaling: Scaling, dtype: torch.dtype, shape: tuple[int, ...], target: Target
) -> object:
    codes = _meta(shape, torch.float8_e4m3fn)
    return fp8.dequantize(codes, _meta(scaling.scale_shape(shape)), scaling, dtype, target=target)


def _cases_of(scaling: Scaling, dtype: torch.dtype, place: str = "") -> list[CompileCase]:
    shape = _SHAPES[place]
    name = f"{scaling}, {str(dtype).removeprefix('torch.')}{place}"
    cases = [
        CompileCase(
            operation=f"fp8.{operation}",
            variant=f"{name}, {'given' if given else 'own'} scales",
            launch=partial(launch, scaling, given, dtype, shape),
            instructions=_CONVERTS if "unaligned" in place else _WIDE_LOADS_AND_CONVERTS,
            allowed_spill_bytes={("sm_120", "3.6"): 8} if "unaligned" in place else {},
        )
        for operation, launch in (("quantize", _quantize), ("fake_quantize", _fake_quantize))
        for given in (False, True)
    ]
    values = CompileCase(
        operation="fp8.dequantize",
        variant=name,
        launch=partial(_dequantize, scaling, dtype, shape),
        instructions={} if "unaligned" in place else _WIDE_LOADS,
    )
    return [*cases, values]


CASES = [
    *(case for scaling in Scaling for case in _cases_of(scaling, torch.bfloat16)),
    *_cases_of(Scaling.ROW, torch.float32),
    *_cases_of(Scaling.ROW, torch.float16)[:3],
    # The kernels of those above with other masks and alignments, or rows in several pieces.
    *_cases_of(Scaling.ROW, torch.bfloat16, ", long rows")[:3],
    *_cases_of(Scaling.BLOCK_1X128, torch.bfloat16, ", unaligned rows"),
    *(
        CompileCase(
            operation="fp8.scales",
            variant=f"{scaling}, bfloat16",
            launch=partial(_scales, scaling, torch.bfloat16, _SHAPES[""]),
            instructions=_WIDE_LOADS,
        )
        for scaling in Scaling
    ),
]
