"""NVFP4: E2M1 values, an E4M3 scale per 16 of them, a float32 scale per tensor.

A value is e2m1(code) * (e4m3(block scale) * global scale), blocks along the last dimension. All
arithmetic is float32; rounding is to nearest, ties to even, saturating at 6.

Infinity saturates, and a block with a NaN in it becomes NaN altogether; neither is looked for,
because that costs a pass: whoever knows the layer's name checks and reports them.
Source: the recipe of the NVFP4 checkpoints that vLLM, SGLang and TensorRT-LLM load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import (
    FLOAT_DTYPES,
    checked_amax,
    require_dtype,
    require_float,
    require_multiple,
    require_scale,
    require_shape,
)
from autoq.kernels._torch import nvfp4 as _torch
from autoq.kernels._torch.chunks import scale_from_amax

BLOCK = _torch.BLOCK
"""Values that share a block scale."""

_LARGEST_VALUE = 6.0 * 448.0


def global_scale(amax: float | Tensor) -> Tensor:
    """The second-level scale of a tensor whose largest magnitude is `amax`: amax / (6 * 448).

    Args:
        amax: one number, not negative; over a whole fusion set where engines fuse layers.

    Returns:
        float32 scalar on the device of `amax`; 1 if amax is 0, and never below 2**-100.

    Raises:
        InputError: amax is negative, NaN, infinite or not one number.
    """
    return scale_from_amax(checked_amax(amax), _LARGEST_VALUE)


def quantize(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and block scales of `x`.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 16.
        global_scale: float32 scalar from `global_scale`.

    Returns:
        Codes uint8 [..., K/2], the even element in the low nibble, and block scales
        float8_e4m3fn [..., K/16].

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    _require_blocks(x, global_scale)
    return _torch.quantize(x.detach(), global_scale.to(x.device))


def dequantize(
    packed: Tensor, block_scale: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values [..., K], computed in float32 and rounded once to `dtype`.

    Args:
        packed: uint8 [..., K/2].
        block_scale: float8_e4m3fn [..., K/16].
        global_scale: float32 scalar.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    require_dtype("packed", packed, torch.uint8)
    require_dtype("block_scale", block_scale, torch.float8_e4m3fn)
    require_multiple("the last dimension of packed", packed.shape[-1], BLOCK // 2)
    blocks = (*packed.shape[:-1], packed.shape[-1] * 2 // BLOCK)
    require_shape("block_scale", block_scale, blocks)
    require_scale("global_scale", global_scale)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    return _torch.dequantize(packed, block_scale, global_scale.to(packed.device), dtype)


def fake_quantize(x: Tensor, global_scale: Tensor) -> Tensor:
    """`dequantize(*quantize(x, global_scale), global_scale, x.dtype)`, bit for bit, in one go.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    _require_blocks(x, global_scale)
    return _torch.fake_quantize(x, global_scale.to(x.device))


def _require_blocks(x: Tensor, global_scale: Tensor) -> None:
    require_float("x", x)
    require_multiple("the last dimension of x", x.shape[-1], BLOCK)
    require_scale("global_scale", global_scale)
