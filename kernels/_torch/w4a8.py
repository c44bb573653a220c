"""Two-level INT4 in vectorised torch, on any device; `autoq.kernels.w4a8` checked the operands."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import LARGEST_FLOAT16
from autoq.kernels._torch import fp8, fused
from autoq.kernels._torch.chunks import map_rows, scale_from_amax
from autoq.kernels._torch.int4 import codes_, scaled
from autoq.kernels._torch.programs import Offer


def tensor_scale(codes: Tensor, group_scale: Tensor) -> Tensor:
    """Largest |code * group scale| / 448, float32 scalar."""
    if not codes.numel():
        return torch.ones((), device=codes.device)
    return scale_from_amax(scaled(codes, group_scale).abs_().amax(), fp8.LARGEST)


def rate(group_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """What a code counts under the FP8 level, with the two float16 roundings of the engine."""
    quotient = group_scale.half().float() / tensor_scale
    return quotient.clamp_(max=LARGEST_FLOAT16).half().float()


def dequantize(
    codes: Tensor, group_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Values e4m3(code * rate) * tensor scale of packed codes."""
    values = scaled(codes, rate(group_scale, tensor_scale))
    return fp8.round_e4m3_(values, torch.empty_like(values)).mul_(tensor_scale).to(dtype)


def fake_quantize(weight: Tensor, group_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """Quantise and dequantise through the second, FP8 level without storing codes."""
    scales = group_scale.reshape(-1, 1)
    rates = rate(scales, tensor_scale)

    def body(source: Tensor, values: Tensor, scratch: Tensor, rows: slice) -> None:
        codes_(source, scales[rows], values).mul_(rates[rows])
        fp8.round_e4m3_(values, scratch).mul_(tensor_scale)

    offer = Offer(fused.W4A8, lambda _: (scales, rates, tensor_scale))
    return map_rows(weight, weight.shape[1] // group_scale.shape[1], body, offer)
