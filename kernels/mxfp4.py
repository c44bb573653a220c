"""MXFP4: E2M1 values, one power-of-two scale per 32 of them along the last dimension.

A value is e2m1(code) * 2**(byte - 127). The scale comes from the largest magnitude of the block by
a `ScaleRule`; values are divided by it, which is exact, and rounded to nearest, ties to even,
saturating at 6. -0.0 becomes 0.0, a small negative number -0.0.

Scales go down to 2**-127, byte 0, which blocks of zeros get too. So a block whose maximum is below
2**-125 is coarser than the rule would have it, and values up to 2**-129 become zero.

A block with NaN or infinity in it gets byte 255, which means NaN, and codes 0: all its values
dequantise to NaN. Neither is looked for beyond that: whoever knows the layer's name checks weights
and activations and reports them.
Source: OCP Microscaling Formats (MX) Specification v1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels import _mx_bodies as _bodies
from autoq.kernels._checks import (
    require_dtype,
    require_float,
    require_importance,
    require_matrix,
    require_same_device,
    require_shape,
)
from autoq.kernels._mx import (
    BLOCK,
    E2M1,
    E4M3,
    MXTensor,
    ScaleRule,
    require_blocks,
    require_packed,
    require_product,
    require_result,
    require_rule,
)
from autoq.kernels._torch import chosen_scales
from autoq.kernels._torch import mx as _torch
from autoq.kernels.mxfp8 import MXFP8Tensor

__all__ = [
    "BLOCK",
    "MXFP4Tensor",
    "ScaleRule",
    "choose_block_scale",
    "dequantize",
    "fake_quantize",
    "linear",
    "matmul",
    "quantize",
]


@dataclass(frozen=True, slots=True, eq=False)
class MXFP4Tensor(MXTensor):
    """A tensor [..., K] in MXFP4: codes uint8 [..., K/2], the even element in the low nibble; block
    scales uint8 [..., K/32]."""


_INPUTS = {MXFP8Tensor: E4M3, MXFP4Tensor: E2M1}


def choose_block_scale(x: Tensor, importance: Tensor, rule: ScaleRule = ScaleRule.OCP) -> Tensor:
    """Block scales that leave less error than those of the largest magnitudes.

    For every block the sum over its columns of importance * (quantised - exact)**2 is computed
    under the power of two that `rule` gives, under half of it and under twice as much; the smallest
    wins, and of equals the one named first. See `autoq.kernels.nvfp4.choose_block_scale`.

    Args:
        x: float32, bfloat16 or float16 [N, K], K a multiple of 32.
        importance: float32 [K], not negative.
        rule: which power of two a block gets at first.

    Returns:
        uint8 [N, K/32], the same bits on every device.

    Raises:
        InputError: a dtype or shape is not as above.
    """
    require_matrix("x", x)
    require_blocks(x)
    require_importance(importance, x)
    require_rule(rule)
    return chosen_scales.mxfp4_block_scale(x.detach(), rule, importance.detach().to(x.device))


def quantize(
    x: Tensor, rule: ScaleRule = ScaleRule.OCP, block_scale: Tensor | None = None
) -> MXFP4Tensor:
    """Codes and scales of `x`.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.
        rule: which power of two a block gets.
        block_scale: uint8 [..., K/32] from `choose_block_scale`, in the place of the rule's. With
            it, torch computes on every device.

    Raises:
        InputError: the dtype or shape of an argument is not as above.
    """
    require_blocks(x)
    require_rule(rule)
    if block_scale is None:
        return MXFP4Tensor(*_bodies.quantize(x.detach(), E2M1, rule))
    require_dtype("block_scale", block_scale, torch.uint8)
    require_shape("block_scale", block_scale, (*x.shape[:-1], x.shape[-1] // BLOCK))
    require_same_device(x, block_scale)
    return MXFP4Tensor(_torch.quantize_under(x.detach(), block_scale), block_scale)


def dequantize(packed: MXFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., K], exact in float32 and rounded once to `dtype`.

    Args:
        packed: from `quantize`, or from a checkpoint.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: a dtype, shape or device is not as above.
    """
    require_packed("packed", packed, E2M1)
    require_result(dtype)
    return _bodies.dequantize(packed, dtype)


def fake_quantize(x: Tensor, rule: ScaleRule = ScaleRule.OCP) -> Tensor:
    """`dequantize(quantize(x, rule), x.dtype)`, bit for bit, in one pass that stores no codes.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    require_blocks(x)
    require_rule(rule)
    return _bodies.fake_quantize(x.detach(), E2M1, rule)


def linear(
    x: Tensor,
    weight: MXFP4Tensor,
    bias: Tensor | None = None,
    *,
    quantize_input: bool = True,
    input_type: type[MXTensor] = MXFP8Tensor,
    rule: ScaleRule = ScaleRule.OCP,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias, with the input quantised to MXFP8 or MXFP4, or left as it is.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.
        weight: [N, K].
        bias: float32, bfloat16 or float16 [N].
        quantize_input: False for weight-only quantisation.
        input_type: what the input is quantised to, MXFP8Tensor or MXFP4Tensor.
        rule: which power of two a block of the input gets.
        out_dtype: float32, bfloat16 or float16; that of `x` if left out.

    Returns:
        [..., N]. On the CPU exactly functional.linear of the input, fake-quantised or as it is, and
        the dequantised weight in the dtype of `x`. No gradient flows through it.

    Raises:
        InputError: a dtype, shape or device is not as above.
    """
    require_float("x", x)
    require_rule(rule)
    if input_type not in _INPUTS:
        raise InputError(f"input_type must be MXFP8Tensor or MXFP4Tensor, got {input_type!r}")
    require_packed("weight", weight, E2M1)
    require_product(tuple(x.shape), x.device, weight, bias)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    require_result(out_dtype)
    return _bodies.linear(
        x.detach(), weight, bias, _INPUTS[input_type] if quantize_input else None, rule, out_dtype
    )


def matmul(
    a: MXFP8Tensor | MXFP4Tensor,
    b: MXFP4Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """a @ b.T + bias of two packed tensors, accumulated in float32 and rounded once.

    Args:
        a: [..., K], in MXFP8 or MXFP4.
        b: [N, K].
        bias: float32, bfloat16 or float16 [N].
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [..., N].

    Raises:
        InputError: a dtype, shape or device is not as above.
    """
    require_packed("a", a, E4M3, E2M1)
    require_packed("b", b, E2M1)
    require_product(a.shape, a.codes.device, b, bias)
    require_result(out_dtype)
    return _bodies.matmul(a, b, bias, out_dtype)
