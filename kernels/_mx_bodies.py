"""Which body the microscaling operations take; operands were checked by the contracts."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._mx import Element, MXTensor, ScaleRule
from autoq.kernels._torch import mx as _torch
from autoq.kernels.dispatch import triton_target


def quantize(x: Tensor, element: Element, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """Codes and block scales of `x`."""
    target = triton_target(x.device)
    if target is None:
        return _torch.quantize(x, element, rule)
    from autoq.kernels._launch import mx as launch

    return launch.quantize(x, element, rule, target=target)


def dequantize(packed: MXTensor, dtype: torch.dtype) -> Tensor:
    """Values in `dtype`."""
    target = triton_target(packed.codes.device)
    if target is None:
        return _torch.dequantize(packed.codes, packed.block_scale, packed.element, dtype)
    from autoq.kernels._launch import mx as launch

    return launch.dequantize(packed, dtype, target=target)


def fake_quantize(x: Tensor, element: Element, rule: ScaleRule) -> Tensor:
    """Values of the codes of `x`, in its dtype."""
    target = triton_target(x.device)
    if target is None:
        return _torch.fake_quantize(x, element, rule)
    from autoq.kernels._launch import mx as launch

    return launch.fake_quantize(x, element, rule, target=target)


def linear(
    x: Tensor,
    weight: MXTensor,
    bias: Tensor | None,
    inputs: Element | None,
    rule: ScaleRule,
    out_dtype: torch.dtype,
) -> Tensor:
    """x @ weight.T + bias, `x` quantised to MXFP8 or MXFP4, or as it is."""
    target = triton_target(x.device)
    # Matrix units have no float32: such a product is rarer than it is worth a kernel.
    if target is not None and (inputs is not None or x.dtype != torch.float32):
        from autoq.kernels._launch import mx_matmul as launch

        return launch.linear(x, weight, bias, inputs, rule, out_dtype, target=target)
    dtype = x.dtype if out_dtype == x.dtype else torch.float32
    values = x if inputs is None else fake_quantize(x, inputs, rule)
    return _torch.product(values.to(dtype), dequantize(weight, dtype), bias, out_dtype)


def matmul(a: MXTensor, b: MXTensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """a @ b.T + bias, accumulated in float32."""
    target = triton_target(a.codes.device)
    if target is None:
        left, right = dequantize(a, torch.float32), dequantize(b, torch.float32)
        return _torch.product(left, right, bias, out_dtype)
    from autoq.kernels._launch import mx_matmul as launch

    return launch.matmul(a, b, bias, out_dtype, target=target)
