"""What two-level INT4 means: slow, obvious, the truth that fast paths are tested against.

The product code * group scale is stored once more in FP8, as an INT4 x FP8 matrix unit sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import LARGEST_FLOAT16
from autoq.kernels._reference import fp8, int4


def rate(group_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """fp16(fp16(group scale) / tensor scale), limited to what float16 holds, as float32."""
    quotient = group_scale.half().float() / tensor_scale
    return quotient.clamp(max=LARGEST_FLOAT16).half().float()


def values(
    codes: Tensor, group_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """e4m3(code * rate) * tensor scale of int8 codes, [N, K]."""
    products = int4.values(codes, rate(group_scale, tensor_scale))
    return fp8.dequantize(fp8.encode(products), tensor_scale, dtype)
