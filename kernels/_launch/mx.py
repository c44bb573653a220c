"""MXFP8 and MXFP4: launches of the element-wise kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._jit import mx as jit
from autoq.kernels._launch.device import blocks_of, on_device_of, rounds_to_e4m3
from autoq.kernels._mx import BLOCK, E2M1, Element, MXTensor, ScaleRule
from autoq.kernels.targets import Target

_BLOCKS_PER_PROGRAM = 128
_WARPS = 4


def quantize(
    x: Tensor, element: Element, rule: ScaleRule, *, target: Target
) -> tuple[Tensor, Tensor]:
    """Codes and block scales of `x` [..., K]."""
    *leading, columns = x.shape
    codes = torch.empty(
        *leading, columns // element.codes_per_byte, dtype=element.dtype, device=x.device
    )
    scale = torch.empty(*leading, columns // BLOCK, dtype=torch.uint8, device=x.device)
    if x.numel():
        with on_device_of(x):
            jit.quantize_kernel[_grid(scale)](
                x.contiguous(),
                codes.view(torch.uint8),
                scale,
                scale.numel(),
                INCREMENT=element.increment(rule),
                E2M1=element is E2M1,
                BLOCKS=_BLOCKS_PER_PROGRAM,
                HARDWARE=rounds_to_e4m3(target),
                num_warps=_WARPS,
            )
    return codes, scale


def fake_quantize(
    x: Tensor,
    element: Element,
    rule: ScaleRule,
    dtype: torch.dtype | None = None,
    *,
    target: Target,
) -> Tensor:
    """What is left of `x` [..., K], in `dtype` or its own."""
    out = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if x.numel():
        blocks = x.numel() // BLOCK
        with on_device_of(x):
            jit.fake_quantize_kernel[(blocks_of(blocks, _BLOCKS_PER_PROGRAM),)](
                x.contiguous(),
                out,
                blocks,
                INCREMENT=element.increment(rule),
                E2M1=element is E2M1,
                BLOCKS=_BLOCKS_PER_PROGRAM,
                HARDWARE=rounds_to_e4m3(target),
                num_warps=_WARPS,
            )
    return out


def dequantize(packed: MXTensor, dtype: torch.dtype, *, target: Target) -> Tensor:
    """Values [..., K]."""
    out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    if out.numel():
        scale = packed.block_scale.contiguous()
        with on_device_of(out):
            jit.dequantize_kernel[_grid(scale)](
                packed.codes.contiguous().view(torch.uint8),
                scale,
                out,
                scale.numel(),
                E2M1=packed.element is E2M1,
                BLOCKS=_BLOCKS_PER_PROGRAM,
                HARDWARE=target.fp8_type,
                num_warps=_WARPS,
            )
    return out


def _grid(scale: Tensor) -> tuple[int]:
    return (blocks_of(scale.numel(), _BLOCKS_PER_PROGRAM),)
