"""FP8 E4M3 with one scale per tensor, per row, per 1x128 or per 128x128 block.

A value is code * scale with scale = amax / 448 over the elements that share it; 1 where amax is 0,
and never below 2**-100. All arithmetic is float32: values are divided by the scale, clamped to 448
and rounded to nearest, ties to even.

Under a given scale infinity saturates and NaN stays NaN. Under a computed one, all elements that
share it become NaN. Neither is looked for, because that costs a pass: whoever knows the layer's
name checks weights and activations and reports them. The sign of a NaN's code is not specified.

Sources: OCP 8-bit Floating Point Specification (OFP8) v1.0; the block scalings are those of the
DeepSeek-V3 technical report, section 3.3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels._checks import (
    FLOAT_DTYPES,
    checked_amax,
    require_bias,
    require_dtype,
    require_float,
    require_matrix,
    require_member,
    require_record,
    require_same_device,
    require_scale,
    require_scales,
    require_shape,
)
from autoq.kernels._scaling import FP8Tensor, Scaling
from autoq.kernels._torch import fp8 as _torch
from autoq.kernels._torch.chunks import scale_from_amax
from autoq.kernels.dispatch import triton_target
from autoq.kernels.targets import Target

__all__ = [
    "LARGEST",
    "FP8Tensor",
    "Scaling",
    "dequantize",
    "fake_quantize",
    "linear",
    "matmul",
    "quantize",
    "scales",
    "tensor_scale",
]

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


def scales(x: Tensor, scaling: Scaling) -> Tensor:
    """The scales of `x`: amax / 448 over the elements that share one.

    Args:
        x: float32, bfloat16 or float16 [..., K]; a matrix [N, K] for BLOCK_128X128.
        scaling: which elements share a scale.

    Returns:
        float32 in the shape that `scaling` gives; NaN or infinity where such an element is.

    Raises:
        InputError: the dtype or shape of `x` is not as above.
    """
    _require_operand(x, scaling)
    return _scales(x.detach(), scaling)


def quantize(
    x: Tensor, scale: Tensor | None = None, *, scaling: Scaling = Scaling.TENSOR
) -> FP8Tensor:
    """Codes e4m3(x / scale) and the scale.

    Args:
        x: float32, bfloat16 or float16 [..., K]; a matrix [N, K] for BLOCK_128X128.
        scale: float32 in the shape that `scaling` gives; `scales(x, scaling)` if left out.
        scaling: which elements share a scale.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    return _packed(x, _checked_scale(x, scale, scaling), scaling)


def dequantize(packed: FP8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale [..., K], computed in float32 and rounded once to `dtype`.

    Args:
        packed: from `quantize`, or from a checkpoint.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: a dtype or shape is not as above.
    """
    _require_packed("packed", packed)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    codes, scale, scaling = packed.codes, packed.scale.to(packed.codes.device), packed.scaling
    target = triton_target(codes.device)
    if target is None:
        return _torch.dequantize(codes, scale, scaling, dtype)
    from autoq.kernels._launch import fp8 as launch

    return launch.dequantize(codes, scale, scaling, dtype, target=target)


def fake_quantize(
    x: Tensor, scale: Tensor | None = None, *, scaling: Scaling = Scaling.TENSOR
) -> Tensor:
    """`dequantize(quantize(x, scale, scaling=scaling), x.dtype)`, bit for bit, storing no codes.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    return _fake_quantize(x.detach(), _checked_scale(x, scale, scaling), scaling)


def linear(
    x: Tensor,
    weight: FP8Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias with the input quantised to FP8 too.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: [N, K] in any scaling.
        bias: float32, bfloat16 or float16 [N].
        input_scale: float32 scalar from calibration; not for weights in blocks. If left out, each
            row of `x` gets its own scale, or each 128 columns of it where the weight is in blocks.
        out_dtype: float32, bfloat16 or float16; that of `x` if left out.

    Returns:
        [..., N]. On the CPU exactly functional.linear of the fake-quantised input and the
        dequantised weight in the dtype of `x`. No gradient flows through it.

    Raises:
        InputError: a dtype, shape, scale or device is not as above.
    """
    require_float("x", x)
    _require_weight(weight, x)
    scaling = _input_scaling(weight, input_scale)
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _require_product(x, weight.codes, bias, out_dtype)
    scale = _checked_scale(x, input_scale, scaling)
    target = triton_target(x.device)
    if target is not None:
        return _launch_product(_packed(x, scale, scaling), weight, bias, out_dtype, target)
    values = _torch.fake_quantize(x, scale, scaling)
    dtype = x.dtype if out_dtype == x.dtype else torch.float32
    return _torch.product(values.to(dtype), dequantize(weight, dtype), bias, out_dtype)


def matmul(
    a: FP8Tensor, b: FP8Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """a @ b.T + bias of two packed tensors, accumulated in float32 and rounded once.

    Args:
        a: [..., K], TENSOR or ROW; BLOCK_1X128 if b is in blocks.
        b: [N, K], TENSOR or ROW; BLOCK_128X128 or BLOCK_1X128 if a is in blocks.
        bias: float32, bfloat16 or float16 [N].
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [..., N].

    Raises:
        InputError: a dtype, shape, scaling or device is not as above.
    """
    _require_packed("a", a)
    _require_weight(b, a.codes, name="b")
    if b.scaling.in_blocks != a.scaling.in_blocks or a.scaling is Scaling.BLOCK_128X128:
        raise InputError(
            f"a must be {'1x128' if b.scaling.in_blocks else 'tensor or row'} where b is {b.scaling}, "
            f"got {a.scaling}; quantise it so"
        )
    _require_product(a.codes, b.codes, bias, out_dtype)
    target = triton_target(a.codes.device)
    if target is not None:
        return _launch_product(a, b, bias, out_dtype, target)
    return _torch.product(dequantize(a), dequantize(b), bias, out_dtype)


def _scales(x: Tensor, scaling: Scaling) -> Tensor:
    target = triton_target(x.device)
    if target is None:
        return _torch.scales(x, scaling)
    from autoq.kernels._launch import fp8 as launch

    return launch.scales(x, scaling, target=target)


def _packed(x: Tensor, scale: Tensor | None, scaling: Scaling) -> FP8Tensor:
    x, target = x.detach(), triton_target(x.device)
    if target is None:
        scale = _torch.scales(x, scaling) if scale is None else scale
        return FP8Tensor(_torch.quantize(x, scale, scaling), scale, scaling)
    from autoq.kernels._launch import fp8 as launch

    return FP8Tensor(*launch.quantize(x, scale, scaling, target=target), scaling)


def _fake_quantize(x: Tensor, scale: Tensor | None, scaling: Scaling) -> Tensor:
    target = triton_target(x.device)
    if target is None:
        return _torch.fake_quantize(x, scale, scaling)
    from autoq.kernels._launch import fp8 as launch

    return launch.fake_quantize(x, scale, scaling, target=target)


def _launch_product(
    a: FP8Tensor, b: FP8Tensor, bias: Tensor | None, out_dtype: torch.dtype, target: Target
) -> Tensor:
    from autoq.kernels._launch import fp8_matmul as launch

    device = a.codes.device  # scalar scales may have stayed on the CPU
    return launch.matmul(a.to(device), b.to(device), bias, out_dtype, target=target)


def _input_scaling(weight: FP8Tensor, input_scale: Tensor | None) -> Scaling:
    if not weight.scaling.in_blocks:
        return Scaling.ROW if input_scale is None else Scaling.TENSOR
    if input_scale is not None:
        raise InputError(
            f"input_scale must be left out where the weight is {weight.scaling}, got one; "
            "the input is quantised in blocks"
        )
    return Scaling.BLOCK_1X128


def _checked_scale(x: Tensor, scale: Tensor | None, scaling: Scaling) -> Tensor | None:
    """Check the operands of quantising; the scale, if one was given, on the device of `x`."""
    _require_operand(x, scaling)
    if scale is None:
        return None
    if scaling is Scaling.TENSOR:
        require_scale("scale", scale)
    else:
        require_scales("scale", scale, scaling.scale_shape(x.shape))
    return scale.to(x.device)


def _require_operand(x: Tensor, scaling: Scaling) -> None:
    require_float("x", x)
    require_member("scaling", scaling, Scaling)
    if scaling is Scaling.BLOCK_128X128:
        require_matrix("x", x)


def _require_packed(name: str, packed: FP8Tensor) -> None:
    require_record(name, packed, FP8Tensor)
    require_dtype(f"the codes of {name}", packed.codes, torch.float8_e4m3fn)
    require_dtype(f"the scale of {name}", packed.scale, torch.float32)
    if packed.scaling is Scaling.BLOCK_128X128:
        require_matrix(f"the codes of {name}", packed.codes)
    shape = packed.scaling.scale_shape(packed.codes.shape)
    require_shape(f"the scale of {name}", packed.scale, shape)


def _require_weight(weight: FP8Tensor, x: Tensor, name: str = "weight") -> None:
    _require_packed(name, weight)
    require_matrix(f"the codes of {name}", weight.codes)
    if x.ndim == 0 or x.shape[-1] != weight.codes.shape[1]:
        raise InputError(
            f"{name} must have as many columns as its input, got shapes "
            f"{tuple(weight.codes.shape)} and {tuple(x.shape)}; transpose one or take another"
        )


def _require_product(x: Tensor, codes: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    require_bias(bias, codes.shape[0])
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    require_same_device(x, codes, bias)
