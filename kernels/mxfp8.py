"""MXFP8: E4M3 values, one power-of-two scale per 32 of them along the last dimension.

A value is e4m3(code) * 2**(byte - 127). The scale comes from the largest magnitude of the block by
a `ScaleRule`; values are divided by it, which is exact, and rounded to nearest, ties to even,
saturating at 448. The sign of zero is kept.

Scales go down to 2**-127, byte 0, which blocks of zeros get too. So a block whose maximum is below
2**-119 is coarser than the rule would have it, and values up to 2**-137 become zero.

A block with NaN or infinity in it gets byte 255, which means NaN, and codes 0: all its values
dequantise to NaN. Neither is looked for beyond that: whoever knows the layer's name checks weights
and activations and reports them.
Source: OCP Microscaling Formats (MX) Specification v1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.kernels import _mx_bodies as _bodies
from autoq.kernels._checks import require_float
from autoq.kernels._mx import (
    BLOCK,
    E4M3,
    MXTensor,
    ScaleRule,
    require_blocks,
    require_packed,
    require_product,
    require_result,
    require_rule,
)

__all__ = [
    "BLOCK",
    "MXFP8Tensor",
    "ScaleRule",
    "dequantize",
    "fake_quantize",
    "linear",
    "matmul",
    "quantize",
]


@dataclass(frozen=True, slots=True, eq=False)
class MXFP8Tensor(MXTensor):
    """A tensor [..., K] in MXFP8: codes float8_e4m3fn [..., K], block scales uint8 [..., K/32]."""


def quantize(x: Tensor, rule: ScaleRule = ScaleRule.OCP) -> MXFP8Tensor:
    """Codes and scales of `x`.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.
        rule: which power of two a block gets.

    Raises:
        InputError: the dtype or shape of `x` is not as above.
    """
    require_blocks(x)
    require_rule(rule)
    return MXFP8Tensor(*_bodies.quantize(x.detach(), E4M3, rule))


def dequantize(packed: MXFP8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [..., K], exact in float32 and rounded once to `dtype`.

    Args:
        packed: from `quantize`, or from a checkpoint.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: a dtype, shape or device is not as above.
    """
    require_packed("packed", packed, E4M3)
    require_result(dtype)
    return _bodies.dequantize(packed, dtype)


def fake_quantize(x: Tensor, rule: ScaleRule = ScaleRule.OCP) -> Tensor:
    """`dequantize(quantize(x, rule), x.dtype)`, bit for bit, in one pass that stores no codes.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    require_blocks(x)
    require_rule(rule)
    return _bodies.fake_quantize(x.detach(), E4M3, rule)


def linear(
    x: Tensor,
    weight: MXFP8Tensor,
    bias: Tensor | None = None,
    *,
    quantize_input: bool = True,
    rule: ScaleRule = ScaleRule.OCP,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias, with the input quantised to MXFP8 too or left as it is.

    Args:
        x: float32, bfloat16 or float16 [..., K], K a multiple of 32.
        weight: [N, K].
        bias: float32, bfloat16 or float16 [N].
        quantize_input: False for weight-only quantisation.
        rule: which power of two a block of the input gets.
        out_dtype: float32, bfloat16 or float16; that of `x` if left out.

    Returns:
        [..., N]. On the CPU exactly functional.linear of the input, fake-quantised to MXFP8 or as
        it is, and the dequantised weight in the dtype of `x`. No gradient flows through it.

    Raises:
        InputError: a dtype, shape or device is not as above.
    """
    require_float("x", x)
    require_rule(rule)
    require_packed("weight", weight, E4M3)
    require_product(tuple(x.shape), x.device, weight, bias)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    require_result(out_dtype)
    return _bodies.linear(
        x.detach(), weight, bias, E4M3 if quantize_input else None, rule, out_dtype
    )


def matmul(
    a: MXFP8Tensor, b: MXFP8Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """a @ b.T + bias of two packed tensors, accumulated in float32 and rounded once.

    Args:
        a: [..., K].
        b: [N, K].
        bias: float32, bfloat16 or float16 [N].
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [..., N].

    Raises:
        InputError: a dtype, shape or device is not as above.
    """
    require_packed("a", a, E4M3)
    require_packed("b", b, E4M3)
    require_product(a.shape, a.codes.device, b, bias)
    require_result(out_dtype)
    return _bodies.matmul(a, b, bias, out_dtype)
