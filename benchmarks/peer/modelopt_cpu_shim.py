"""ModelOpt's NVFP4 fake quantisation on CPU, which it refuses by itself.

`install` puts plain torch code in the place of the operation that ModelOpt 0.47 implements for
CUDA only. Same numbers as its Triton kernel: E2M1 with ties to even, block scales
e4m3(min(block amax / (6 * s), 448)) * s with s = amax / (6 * 448), and scales below 1e-5 replaced
by one. The operation's speed on CPU is the speed of this code, not of ModelOpt's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE = 1e-5


def install() -> None:
    """Replace the operation in ModelOpt; call before a model is quantised."""
    from modelopt.torch.quantization import tensor_quant

    def quantize_dequantize(
        inputs: Tensor, block_size: int, amax: Tensor, num_bits: int, exponent_bits: int, *rest: Any
    ) -> Tensor:
        if (num_bits, exponent_bits, *rest) != (4, 2, 8, 4):
            raise NotImplementedError("only NVFP4: E2M1 values with E4M3 block scales")
        return nvfp4_quantize_dequantize(inputs, amax, block_size)

    tensor_quant.dynamic_block_quantize_op = quantize_dequantize


def nvfp4_quantize_dequantize(values: Tensor, amax: Tensor, block_size: int) -> Tensor:
    """Values [..., n] rounded to NVFP4 and back; n must be a multiple of `block_size`."""
    blocks = values.float().unflatten(-1, (-1, block_size))
    magnitudes = blocks.abs()
    top = (amax.float().amax() / (6.0 * 448.0)).clamp(min=1e-30)
    scale = (magnitudes.amax(-1, keepdim=True) / (6.0 * top)).clamp(max=448.0)
    scale = scale.to(torch.float8_e4m3fn).float() * top
    scale = torch.where(scale >= SMALLEST_SCALE, scale, torch.ones_like(scale))
    rounded = _round_to_e2m1(magnitudes / scale) * scale
    return (torch.sign(blocks) * rounded).flatten(-2).to(values.dtype)


def _round_to_e2m1(magnitudes: Tensor) -> Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go to the even code."""
    small = (magnitudes * 2).round() * 0.5
    large = (magnitudes * 0.5).round() * 2
    middle_or_large = torch.where(magnitudes < 4, magnitudes.round(), large)
    return torch.where(magnitudes < 2, small, middle_or_large).clamp(max=6.0)
