"""FP8 E4M3 with one scale per tensor, or per token for activations.

A value is code * scale with scale = amax / 448. All arithmetic is float32: values are divided by
the scale, clamped to 448 and rounded to nearest, ties to even.

Infinity saturates and NaN stays NaN; neither is looked for, because that costs a pass: whoever
knows the layer's name checks weights and activations and reports them.
Source: OCP 8-bit Floating Point Specification (OFP8) v1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import (
    FLOAT_DTYPES,
    checked_amax,
    require_dtype,
    require_float,
    require_scale,
)
from autoq.kernels._torch import fp8 as _torch
from autoq.kernels._torch.chunks import scale_from_amax

LARGEST = _torch.LARGEST
"""The largest E4M3 magnitude."""


def tensor_scale(amax: float | Tensor) -> Tensor:
    """The scale of a tensor whose largest magnitude is `amax`: amax / 448.

    Args:
        amax: one number, not negative.

    Returns:
        float32 scalar on the device of `amax`; 1 if amax is 0, and never below 2**-100.

    Raises:
        InputError: amax is negative, NaN, infinite or not one number.
    """
    return scale_from_amax(checked_amax(amax), LARGEST)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of `x` under `scale`.

    Args:
        x: float32, bfloat16 or float16, any shape but a scalar.
        scale: float32 scalar from `tensor_scale`.

    Returns:
        float8_e4m3fn, shape of `x`.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    require_float("x", x)
    require_scale("scale", scale)
    return _torch.quantize(x.detach(), scale.to(x.device))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale, computed in float32 and rounded once to `dtype`.

    Args:
        codes: float8_e4m3fn.
        scale: float32 scalar.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    require_dtype("codes", codes, torch.float8_e4m3fn)
    require_scale("scale", scale)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    return _torch.dequantize(codes, scale.to(codes.device), dtype)


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """`dequantize(quantize(x, scale), scale, x.dtype)`, bit for bit, without storing codes.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    require_float("x", x)
    require_scale("scale", scale)
    return _torch.fake_quantize(x, scale.to(x.device))


def fake_quantize_per_token(x: Tensor) -> Tensor:
    """Fake-quantise each row along the last dimension under its own scale, amax(row) / 448.

    Args:
        x: float32, bfloat16 or float16 [..., K]. A row with NaN or infinity in it becomes NaN
            where the scale makes it so; such rows are the caller's to find.

    Returns:
        Shape and dtype of `x`; no gradient flows through it.

    Raises:
        InputError: x has another dtype or is a scalar.
    """
    require_float("x", x)
    return _torch.fake_quantize_per_token(x)
