"""INT4 in groups: launches of the element-wise kernels, those of its two-level form included."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from autoq.kernels._jit import int4 as jit
from autoq.kernels._launch.device import blocks_of, on_device_of, rounds_to_e4m3
from autoq.kernels.targets import Target

_WARPS = 8
_BYTES_PER_PROGRAM = 2048
_STORAGE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def quantize(
    weight: Tensor,
    group_scale: Tensor | None,
    group_size: int,
    storage_dtype: torch.dtype,
    *,
    target: Target,
) -> tuple[Tensor, Tensor]:
    """(codes by halves, group scales) of `weight` [N, K]; scales computed where none are given."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scale = group_scale
    if scale is None:
        shape = (rows, columns // group_size)
        scale = torch.empty(shape, dtype=torch.float32, device=weight.device)
    if codes.numel():
        with on_device_of(weight):
            jit.quantize_kernel[_grid(weight, group_size)](
                weight.contiguous(),
                None if group_scale is None else group_scale.contiguous(),
                codes,
                scale,
                weight.numel() // group_size,
                group_size,
                LARGEST=torch.finfo(storage_dtype).max,
                STORAGE=_STORAGE[storage_dtype],
                **_block(group_size),
                num_warps=_WARPS,
            )
    return codes, scale


def fake_quantize(
    weight: Tensor,
    group_scale: Tensor | None,
    tensor_scale: Tensor | None,
    group_size: int,
    storage_dtype: torch.dtype,
    *,
    target: Target,
) -> Tensor:
    """Values of the codes of `weight` [N, K], in two levels where there is a tensor scale."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    if out.numel():
        with on_device_of(weight):
            jit.fake_quantize_kernel[_grid(weight, group_size)](
                weight.contiguous(),
                None if group_scale is None else group_scale.contiguous(),
                tensor_scale,
                out,
                weight.numel() // group_size,
                group_size,
                LARGEST=torch.finfo(storage_dtype).max,
                STORAGE=_STORAGE[storage_dtype],
                **_block(group_size),
                HARDWARE=rounds_to_e4m3(target),
                num_warps=_WARPS,
            )
    return out


def dequantize(
    codes: Tensor,
    group_scale: Tensor,
    tensor_scale: Tensor | None,
    dtype: torch.dtype,
    *,
    target: Target,
) -> Tensor:
    """Values [N, K] of packed codes, in two levels where there is a tensor scale."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    if out.numel():
        group_size = columns // group_scale.shape[1]
        with on_device_of(codes):
            jit.dequantize_kernel[_grid(out, group_size)](
                codes.contiguous(),
                group_scale.contiguous(),
                tensor_scale,
                out,
                out.numel() // group_size,
                group_size,
                **_block(group_size),
                HARDWARE=rounds_to_e4m3(target),
                num_warps=_WARPS,
            )
    return out


def to_e4m3(codes: Tensor, group_scale: Tensor, tensor_scale: Tensor, *, target: Target) -> Tensor:
    """What matrix units see of a weight in two levels but for its tensor scale, float8_e4m3fn."""
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    out = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=codes.device)
    if out.numel():
        group_size = columns // group_scale.shape[1]
        with on_device_of(codes):
            jit.e4m3_kernel[_grid(out, group_size)](
                codes.contiguous(),
                group_scale.contiguous(),
                tensor_scale,
                out.view(torch.uint8),
                out.numel() // group_size,
                group_size,
                **_block(group_size),
                HARDWARE=rounds_to_e4m3(target),
                num_warps=_WARPS,
            )
    return out


def largest(codes: Tensor, group_scale: Tensor, *, target: Target) -> Tensor:
    """The largest |code * scale| of every program; the largest of them is that of the weight."""
    size, group_size = 2 * codes.numel(), 2 * codes.shape[1] // group_scale.shape[1]
    groups = size // group_size
    programs = blocks_of(groups, _block(group_size)["GROUPS"])
    found = torch.empty(programs, dtype=torch.float32, device=codes.device)
    if programs:
        with on_device_of(codes):
            jit.largest_kernel[(programs,)](
                codes.contiguous(),
                group_scale.contiguous(),
                found,
                groups,
                group_size,
                **_block(group_size),
                num_warps=_WARPS,
            )
    return found


def _grid(weight: Tensor, group_size: int) -> tuple[int]:
    return (blocks_of(weight.numel() // group_size, _block(group_size)["GROUPS"]),)


def _block(group_size: int) -> dict[str, int]:
    """Groups of a program, and columns of half a group filled up to a power of two."""
    half = 1 << (group_size // 2 - 1).bit_length()
    return {"GROUPS": max(1, _BYTES_PER_PROGRAM // half), "HALF": half}
