"""FP8 E4M3: launches of the element-wise kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._jit import fp8 as jit
from autoq.kernels._launch.device import blocks_of, on_device_of
from autoq.kernels.targets import Target

_BLOCK = 4096


def quantize(x: Tensor, scale: Tensor, *, target: Target) -> Tensor:
    """Codes, float8_e4m3fn, of a contiguous `x` under one scale."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    with on_device_of(x):
        jit.quantize_tensor_kernel[(blocks_of(x.numel(), _BLOCK),)](
            x,
            codes.view(torch.uint8),
            scale,
            x.numel(),
            BLOCK=_BLOCK,
            HARDWARE=target.fp8_type,
            num_warps=8,
        )
    return codes
