"""INT8, symmetric, one float32 scale per row: output channel of a weight, token of an input.

A value is code * scale with codes -127 to 127 and scale = amax(row) / 127; 1 where amax is 0, and
never below 2**-100. All arithmetic is float32: values are divided by the scale, clamped to 127 and
rounded to nearest, ties to even; zero has one sign.

NaN has no code. A row that holds NaN keeps it in its scale, so all of it dequantises to NaN; a row
with infinity does too under a computed scale, while under a given one infinity saturates. Neither
is looked for beyond that: whoever knows the layer's name checks and reports them. The largest
float32 itself becomes infinity, because 127 * (it / 127) rounds up.

Products of two INT8 tensors are sums of integers, exact in int32 for K up to 131071, and therefore
the same bits on every device and in every order.
Source: symmetric per-channel weights and per-token inputs as vLLM and TensorRT-LLM load them (W8A8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels._checks import (
    FLOAT_DTYPES,
    require_bias,
    require_dtype,
    require_float,
    require_matrix,
    require_record,
    require_same_device,
    require_scales,
)
from autoq.kernels._int8_containers import pack_columns, unpack_columns
from autoq.kernels._packed import PackedTensor
from autoq.kernels._torch import int8 as _torch
from autoq.kernels.dispatch import triton_target

__all__ = [
    "LARGEST",
    "LARGEST_K",
    "INT8Tensor",
    "dequantize",
    "fake_quantize",
    "linear",
    "matmul",
    "pack_columns",
    "quantize",
    "row_scale",
    "unpack_columns",
]

LARGEST = 127
"""The largest magnitude of a code."""

LARGEST_K = (2**31 - 1) // 128**2
"""Longest rows that can be multiplied: any int8 codes then sum to less than 2**31."""


@dataclass(frozen=True, slots=True, eq=False)
class INT8Tensor(PackedTensor):
    """A tensor [..., K] as codes and scales."""

    codes: Tensor
    """int8 [..., K]."""
    scale: Tensor
    """float32 [..., 1]."""


def row_scale(weight: Tensor, *, storage_dtype: torch.dtype = torch.float32) -> Tensor:
    """Scales of the rows of `weight`: amax / 127, rounded to the dtype they will be stored in.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        storage_dtype: float32, bfloat16 or float16.

    Returns:
        float32 [N, 1], exact in `storage_dtype`; 1 where the maximum is 0, and 2**-24 where it is
        too small for float16.

    Raises:
        InputError: a dtype or shape is not as above.
    """
    require_float("weight", weight)
    require_matrix("weight", weight)
    require_dtype("the stored scale", torch.empty(0, dtype=storage_dtype), *FLOAT_DTYPES)
    return _torch.row_scale(weight.detach(), storage_dtype)


def quantize(x: Tensor, scale: Tensor | None = None) -> INT8Tensor:
    """Codes round(x / scale) and the scales.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        scale: float32 [..., 1]; amax(row) / 127 if left out.

    Raises:
        InputError: a dtype, shape, scale or device is not as above.
    """
    _require_operand(x, scale)
    x = x.detach()
    if target := triton_target(x.device):
        from autoq.kernels._launch import int8 as launch

        return INT8Tensor(*launch.quantize(x, scale, target=target))
    return INT8Tensor(*_torch.quantize(x, scale))


def dequantize(packed: INT8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale [..., K], computed in float32 and rounded once to `dtype`.

    Args:
        packed: from `quantize`, or from a checkpoint.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: a dtype, shape, scale or device is not as above.
    """
    _require_packed("packed", packed)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    if target := triton_target(packed.codes.device):
        from autoq.kernels._launch import int8 as launch

        return launch.dequantize(packed.codes, packed.scale, dtype, target=target)
    return _torch.dequantize(packed.codes, packed.scale, dtype)


def fake_quantize(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """`dequantize(quantize(x, scale), x.dtype)`, bit for bit, without storing codes.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    _require_operand(x, scale)
    x = x.detach()
    if target := triton_target(x.device):
        from autoq.kernels._launch import int8 as launch

        return launch.fake_quantize(x, scale, target=target)
    return _torch.fake_quantize(x, scale)


def linear(
    x: Tensor,
    weight: INT8Tensor,
    bias: Tensor | None = None,
    *,
    quantize_input: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias, every row of the input quantised to INT8 under its own scale.

    Args:
        x: float32, bfloat16 or float16 [..., K], K at most 131071.
        weight: [N, K].
        bias: float32, bfloat16 or float16 [N].
        quantize_input: False takes the input as it is (W8A16).
        out_dtype: float32, bfloat16 or float16; that of `x` if left out.

    Returns:
        [..., N]. On CPUs bit for bit `functional.linear` of what `fake_quantize` and `dequantize`
        return in the dtype of `x`, or of `x` as it is; with kernels `matmul(quantize(x), weight,
        bias)`. An input as it is, unless float32, meets the codes there, and the scale their float32
        sums: the weight is not rounded to the dtype of `x`. No gradient flows through it.

    Raises:
        InputError: a dtype, shape, scale or device is not as above.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _require_operand(x, None)
    _require_product("x", x, weight, bias, out_dtype)
    if not quantize_input:
        return _with_input_as_it_is(x.detach(), weight, bias, out_dtype)
    if triton_target(x.device) is not None:
        return matmul(quantize(x), weight, bias, out_dtype=out_dtype)
    return _torch.linear(x.detach(), weight.codes, weight.scale, bias, out_dtype)


def _with_input_as_it_is(
    x: Tensor, weight: INT8Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    target = None if x.dtype == torch.float32 else triton_target(x.device)
    if target is None:
        return _torch.product(x, dequantize(weight, x.dtype), bias, out_dtype)
    from autoq.kernels._launch import int8_weights as launch

    return launch.matmul(x, *_parts(weight), bias, out_dtype, target=target)


def matmul(
    a: INT8Tensor, b: INT8Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """a @ b.T + bias of packed operands: the same bits on every device.

    The exact sum of products of codes is rounded to float32, multiplied by the scale of b's row,
    then by that of a's; the bias is added in float32.

    Args:
        a: [..., K], K at most 131071.
        b: [N, K].
        bias: float32, bfloat16 or float16 [N].
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [..., N].

    Raises:
        InputError: a dtype, shape, scale or device is not as above.
    """
    _require_packed("a", a)
    _require_product("a", a.codes, b, bias, out_dtype)
    if target := triton_target(a.codes.device):
        from autoq.kernels._launch import int8_matmul as launch

        return launch.matmul(*_parts(a), *_parts(b), bias, out_dtype, target=target)
    return _torch.matmul(*_parts(a), *_parts(b), bias, out_dtype)


def _parts(packed: INT8Tensor) -> tuple[Tensor, Tensor]:
    return packed.codes, packed.scale


def _require_operand(x: Tensor, scale: Tensor | None) -> None:
    require_float("x", x)
    if scale is not None:
        require_scales("scale", scale, (*x.shape[:-1], 1))
        require_same_device(x, scale)


def _require_packed(name: str, packed: INT8Tensor) -> None:
    require_record(name, packed, INT8Tensor)
    require_dtype(f"{name}'s codes", packed.codes, torch.int8)
    if packed.codes.ndim == 0:
        raise InputError(f"{name} must have at least one dimension, got a scalar; give it one")
    require_scales(f"{name}'s scale", packed.scale, (*packed.codes.shape[:-1], 1))
    require_same_device(packed.codes, packed.scale)


def _require_product(
    name: str, left: Tensor, right: INT8Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    _require_packed("the right operand", right)
    require_matrix("the right operand", right.codes)
    rows, columns = right.codes.shape
    if left.shape[-1] != columns:
        raise InputError(
            f"{name} must have {columns} columns as the right operand has, got {left.shape[-1]}; "
            "take the input of this very layer"
        )
    if columns > LARGEST_K:
        raise InputError(
            f"{name} must have at most {LARGEST_K} columns, so that sums fit int32, got {columns}; "
            "split it along them or use fp8"
        )
    require_bias(bias, rows)
    require_dtype("the result", torch.empty(0, dtype=out_dtype), *FLOAT_DTYPES)
    require_same_device(left, right.codes, bias)
