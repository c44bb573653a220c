"""NVFP4: launches of the element-wise kernels. Operands were checked by `autoq.kernels.nvfp4`."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._jit import nvfp4 as jit
from autoq.kernels._launch.device import blocks_of, on_device_of
from autoq.kernels.targets import Target

BLOCK = 16
_WARPS = 4
_STEPS = 4
_MOST_PROGRAMS_OF_ONE_STEP = 2048
"""More than a GPU runs at a time. Longer tensors give each program more steps, which share the
division that all blocks need."""
_MOST_PARTIAL_MAXIMA = 1024
_ELEMENTS_OF_A_MAXIMUM = 4096


def global_scale(x: Tensor, *, target: Target) -> Tensor:
    """amax / (6 * 448) of `x`, float32 scalar, without waiting for the device.

    1 if all is zero, at least 2**-100, and NaN if `x` holds NaN or infinity.
    """
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    parts = max(1, min(_MOST_PARTIAL_MAXIMA, blocks_of(x.numel(), _ELEMENTS_OF_A_MAXIMUM)))
    partial = torch.empty(parts, dtype=torch.int32, device=x.device)
    with on_device_of(x):
        jit.amax_kernel[(parts,)](
            x.contiguous(), partial, x.numel(), BLOCK=_ELEMENTS_OF_A_MAXIMUM, num_warps=8
        )
        jit.global_scale_kernel[(1,)](
            partial, scale, parts, MOST_PARTS=_MOST_PARTIAL_MAXIMA, num_warps=4
        )
    return scale


def quantize(x: Tensor, global_scale: Tensor, *, target: Target) -> tuple[Tensor, Tensor]:
    """Codes uint8 [..., K/2] and block scales float8_e4m3fn [..., K/16]."""
    *leading, columns = x.shape
    codes = torch.empty(*leading, columns // 2, dtype=torch.uint8, device=x.device)
    block_scale = torch.empty(
        *leading, columns // BLOCK, dtype=torch.float8_e4m3fn, device=x.device
    )
    if not x.numel():
        return codes, block_scale
    blocks, threads = x.numel() // BLOCK, _WARPS * target.threads_per_warp
    steps = _steps(blocks, threads)
    with on_device_of(x):
        jit.quantize_kernel[(blocks_of(blocks, threads * steps),)](
            x.contiguous(),
            codes.view(torch.int64),
            block_scale.view(torch.uint8),
            global_scale,
            blocks,
            THREADS=threads,
            STEPS=steps,
            WIDTH=_elements_of_a_load(x.dtype),
            HARDWARE=target.nvfp4_matmul,
            num_warps=_WARPS,
        )
    return codes, block_scale


def fake_quantize(x: Tensor, global_scale: Tensor, *, target: Target) -> Tensor:
    """What `quantize` leaves of `x`, in its dtype."""
    return _fake_quantize(x, global_scale, x.dtype, with_global=True, target=target)


def unscaled_values(
    x: Tensor, global_scale: Tensor, dtype: torch.dtype, *, target: Target
) -> Tensor:
    """What `quantize` leaves of `x` divided by the global scale: exact in bfloat16 and float16."""
    return _fake_quantize(x, global_scale, dtype, with_global=False, target=target)


def dequantize(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    dtype: torch.dtype,
    *,
    target: Target,
) -> Tensor:
    """Values [..., K]."""
    return _dequantize(codes, block_scale, global_scale, dtype, target)


def unscaled_dequantize(
    codes: Tensor, block_scale: Tensor, dtype: torch.dtype, *, target: Target
) -> Tensor:
    """Values [..., K] without the global scale: exact in bfloat16 and float16."""
    return _dequantize(codes, block_scale, None, dtype, target)


def _fake_quantize(
    x: Tensor, global_scale: Tensor, dtype: torch.dtype, *, with_global: bool, target: Target
) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if not x.numel():
        return out
    blocks, blocks_per_program = x.numel() // BLOCK, _WARPS * target.threads_per_warp
    with on_device_of(x):
        jit.fake_quantize_kernel[(blocks_of(blocks, blocks_per_program),)](
            x.contiguous(),
            out,
            global_scale,
            blocks,
            BLOCKS=blocks_per_program,
            WITH_GLOBAL=with_global,
            num_warps=_WARPS,
        )
    return out


def _dequantize(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor | None,
    dtype: torch.dtype,
    target: Target,
) -> Tensor:
    *leading, halves = codes.shape
    out = torch.empty(*leading, 2 * halves, dtype=dtype, device=codes.device)
    if not out.numel():
        return out
    width = _elements_of_a_load(dtype)
    words, threads = out.numel() // width, _WARPS * target.threads_per_warp
    steps = _steps(words, threads)
    with on_device_of(codes):
        jit.dequantize_kernel[(blocks_of(words, threads * steps),)](
            as_words(codes, torch.int32 if width == 8 else torch.int16),
            block_scale.contiguous().view(torch.uint8),
            global_scale,
            out,
            words,
            THREADS=threads,
            STEPS=steps,
            WIDTH=width,
            num_warps=_WARPS,
        )
    return out


def as_words(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as words of a wider type, copied where it does not lie on addresses of those."""
    if not tensor.numel():
        columns = tensor.shape[-1] * tensor.element_size() // dtype.itemsize
        return tensor.new_empty((*tensor.shape[:-1], columns), dtype=dtype)
    tensor = tensor.contiguous()
    offset = tensor.storage_offset() * tensor.element_size()
    if offset % dtype.itemsize or tensor.data_ptr() % dtype.itemsize:
        tensor = tensor.clone()
    # Flat first: a single row counts as contiguous whatever its stride, which view would look at.
    return tensor.reshape(-1).view(dtype).view(*tensor.shape[:-1], -1)


def _elements_of_a_load(dtype: torch.dtype) -> int:
    """Of 16 bytes."""
    return 16 // dtype.itemsize


def _steps(size: int, threads: int) -> int:
    return _STEPS if size > threads * _MOST_PROGRAMS_OF_ONE_STEP else 1
