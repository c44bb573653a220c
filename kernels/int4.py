"""INT4 weights in groups along the input dimension, and their checkpoint packings.

A weight is code * group scale, codes -8..7, scale = amax(group) / 7, so that -8 does not occur.
All arithmetic is float32; rounding is to nearest, ties to even. Scales are rounded to the dtype
they will be stored in *before* they are used, or codes and scales would not belong together.

`linear` computes with the input as it is (W4A16). `autoq.kernels.w4a8` has the products with FP8
inputs, and the two-level form of the weight.

NaN and infinity are not looked for, because that costs a pass, and have no INT4 code: whoever
knows the layer's name checks weights and reports them.
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
    require_importance,
    require_matrix,
    require_multiple,
    require_record,
    require_same_device,
)
from autoq.kernels._int4_containers import (
    pack_awq,
    pack_columns,
    pack_gptq,
    pack_rows,
    require_codes,
    unpack_awq,
    unpack_columns,
    unpack_gptq,
    unpack_rows,
)
from autoq.kernels._packed import PackedTensor
from autoq.kernels._torch import chosen_scales
from autoq.kernels._torch import int4 as _torch
from autoq.kernels.dispatch import triton_target
from autoq.kernels.targets import Target

__all__ = [
    "GROUP_SIZE",
    "INT4Tensor",
    "choose_group_scale",
    "dequantize",
    "fake_quantize",
    "group_scale",
    "linear",
    "pack",
    "pack_awq",
    "pack_columns",
    "pack_gptq",
    "pack_rows",
    "quantize",
    "quantize_plain",
    "unpack",
    "unpack_awq",
    "unpack_columns",
    "unpack_gptq",
    "unpack_rows",
]

GROUP_SIZE = 128
"""Columns that share a scale in the AWQ checkpoints engines load."""

_LARGEST_KERNEL_GROUP = 32768
"""One program holds a group in registers."""


@dataclass(frozen=True, slots=True, eq=False)
class INT4Tensor(PackedTensor):
    """A weight [N, K] in INT4, groups of g columns sharing a scale."""

    codes: Tensor
    """uint8 [N, K/2], two's complement: byte j of a group holds its columns j (low nibble) and
    j + g/2 (high nibble), so that each nibble plane meets a contiguous half of the input."""
    group_scale: Tensor
    """float32 [N, K/g], positive."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: (N, K)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.group_scale.shape[1]


def group_scale(
    weight: Tensor, group_size: int = GROUP_SIZE, *, storage_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Scales of the groups of `weight`: amax / 7, rounded to the dtype they will be stored in.

    Args:
        weight: float32, bfloat16 or float16 [N, K], K a multiple of `group_size`.
        group_size: columns that share a scale; even.
        storage_dtype: float32, bfloat16 or float16.

    Returns:
        float32 [N, K / group_size], exact in `storage_dtype`; 2**-24 where the maximum is 0
        or too small for `storage_dtype`.

    Raises:
        InputError: a dtype or shape is not as above.
    """
    _require_ungrouped(weight, group_size, storage_dtype)
    return _torch.group_scale(weight, group_size, storage_dtype)


def choose_group_scale(
    weight: Tensor,
    importance: Tensor,
    group_size: int = GROUP_SIZE,
    *,
    storage_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Group scales that leave less error than amax / 7 does.

    For every group the sum over its columns of importance * (quantised - exact)**2 is computed
    under amax / 7 and under 0.95, 0.9, ... 0.5 of it; the smallest wins, and of equals the larger
    scale. With E[x_j^2] of a layer's inputs as importance that is the squared error of the outputs,
    correlations between inputs left out.
    Source: the search for clipping in Lin et al., "AWQ" (2023), section 3.

    Args:
        weight: float32, bfloat16 or float16 [N, K], K a multiple of `group_size`.
        importance: float32 [K], not negative.
        group_size: columns that share a scale; even.
        storage_dtype: float32, bfloat16 or float16; scales are rounded to it before they are tried.

    Returns:
        float32 [N, K / group_size], exact in `storage_dtype`, the same bits on every device.

    Raises:
        InputError: a dtype or shape is not as above.
    """
    _require_ungrouped(weight, group_size, storage_dtype)
    require_importance(importance, weight)
    return chosen_scales.int4_group_scale(
        weight.detach(), group_size, storage_dtype, importance.detach().to(weight.device)
    )


def quantize(
    weight: Tensor,
    group_scale: Tensor | None = None,
    group_size: int = GROUP_SIZE,
    *,
    storage_dtype: torch.dtype = torch.float32,
) -> INT4Tensor:
    """Codes clamp(round(weight / scale), -8, 7), and the scales.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        group_scale: float32 [N, groups] from the function `group_scale`, which is called with
            the two arguments below if it is left out; they are not read otherwise.
        group_size: columns that share a scale; even.
        storage_dtype: dtype to which the scales are rounded.

    Raises:
        InputError: a dtype or shape is not as above.
    """
    group_size = checked_group_size(weight, group_scale, group_size, storage_dtype)
    target = kernel_target(weight.device, group_size)
    if target is None:
        if group_scale is None:
            group_scale = _torch.group_scale(weight, group_size, storage_dtype)
        return INT4Tensor(codes=_torch.quantize(weight, group_scale), group_scale=group_scale)
    from autoq.kernels._launch import int4 as launch

    codes, scale = launch.quantize(
        weight.detach(), group_scale, group_size, storage_dtype, target=target
    )
    return INT4Tensor(codes=codes, group_scale=scale)


def quantize_plain(weight: Tensor, group_scale: Tensor) -> Tensor:
    """The codes of `quantize`, plain: int8 [N, K].

    Raises:
        InputError: a dtype or shape is not as `quantize` says.
    """
    group_size = checked_group_size(weight, group_scale, 0, torch.float32)
    if kernel_target(weight.device, group_size) is None:
        return _torch.plain_codes(weight, group_scale)
    return unpack(quantize(weight, group_scale))


def dequantize(packed: INT4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale [N, K], computed in float32 and rounded once to `dtype`.

    Raises:
        InputError: a dtype or shape is not as `INT4Tensor` says, or `dtype` is not float32,
            bfloat16 or float16.
    """
    require_record("packed", packed, INT4Tensor)
    require_packed(packed.codes, packed.group_scale)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    target = kernel_target(packed.codes.device, packed.group_size)
    if target is None:
        return _torch.dequantize(packed.codes, packed.group_scale, dtype)
    from autoq.kernels._launch import int4 as launch

    return launch.dequantize(packed.codes, packed.group_scale, None, dtype, target=target)


def fake_quantize(
    weight: Tensor,
    group_scale: Tensor | None = None,
    group_size: int = GROUP_SIZE,
    *,
    storage_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dequantize(quantize(weight, ...), weight.dtype)`, bit for bit, without storing codes.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    group_size = checked_group_size(weight, group_scale, group_size, storage_dtype)
    target = kernel_target(weight.device, group_size)
    if target is None:
        if group_scale is None:
            group_scale = _torch.group_scale(weight, group_size, storage_dtype)
        return _torch.fake_quantize(weight, group_scale)
    from autoq.kernels._launch import int4 as launch

    return launch.fake_quantize(
        weight.detach(), group_scale, None, group_size, storage_dtype, target=target
    )


def linear(
    x: Tensor,
    weight: INT4Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x @ weight.T + bias with the input as it is (W4A16).

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: [N, K].
        bias: float32, bfloat16 or float16 [N].
        out_dtype: float32, bfloat16 or float16; that of `x` if left out.

    Returns:
        [..., N]. On CPUs bit for bit `functional.linear` with the dequantised weight in the dtype
        of `x`. GPU kernels, which float32 inputs do not take, multiply codes, exactly, and scale
        float32 sums of a group: there the weight is not rounded to the dtype of `x`. No gradient
        flows through it.

    Raises:
        InputError: a dtype, shape or device is not as above.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    require_linear(x, weight, bias, out_dtype)
    target = None if x.dtype == torch.float32 else triton_target(x.device)
    if target is None or not has_product(weight.group_size):
        return _torch.product(x.detach(), dequantize(weight, x.dtype), bias, out_dtype)
    from autoq.kernels._launch import int4_matmul as launch

    operands = (x.detach(), weight.codes, weight.group_scale, bias, out_dtype)
    return launch.matmul(*operands, target=target)


def pack(codes: Tensor, group_scale: Tensor) -> INT4Tensor:
    """The packed weight of plain codes, such as one of the unpackers below returns.

    Args:
        codes: int8 [N, K] in -8..7.
        group_scale: float32 [N, groups], groups of an even number of columns.

    Raises:
        InputError: another dtype or shape, or a code out of range.
    """
    require_codes(codes)
    _require_groups(codes, group_scale)
    return INT4Tensor(codes=_torch.pack(codes, group_scale.shape[1]), group_scale=group_scale)


def unpack(packed: INT4Tensor) -> Tensor:
    """Plain codes of a packed weight, int8 [N, K].

    Raises:
        InputError: a dtype or shape is not as `INT4Tensor` says.
    """
    require_record("packed", packed, INT4Tensor)
    require_packed(packed.codes, packed.group_scale)
    return _torch.unpack(packed.codes, packed.group_scale.shape[1])


def checked_group_size(
    weight: Tensor, scale: Tensor | None, group_size: int, storage_dtype: torch.dtype
) -> int:
    """Check the operands of quantising, and say how many columns share a scale."""
    if scale is None:
        _require_ungrouped(weight, group_size, storage_dtype)
        return group_size
    require_float("weight", weight)
    require_matrix("weight", weight)
    _require_groups(weight, scale)
    return weight.shape[1] // scale.shape[1]


def kernel_target(device: torch.device, group_size: int) -> Target | None:
    """The target to launch kernels for; None for the torch body, which takes groups of any size."""
    return triton_target(device) if group_size <= _LARGEST_KERNEL_GROUP else None


def has_product(group_size: int) -> bool:
    """Whether matrix products are written for groups of so many columns."""
    return group_size in (32, 64) or (group_size > 0 and group_size % 128 == 0)


def require_packed(codes: Tensor, group_scale: Tensor) -> None:
    """Refuse what is not as `INT4Tensor` says."""
    require_dtype("codes", codes, torch.uint8)
    require_matrix("codes", codes)
    _require_scale(codes, group_scale)
    rows, groups = group_scale.shape
    if rows != codes.shape[0] or groups == 0 or codes.shape[1] % groups:
        raise InputError(
            f"group_scale must be [{codes.shape[0]}, a divisor of {codes.shape[1]}] for "
            f"{tuple(codes.shape)} bytes of codes, got shape {(rows, groups)}; "
            "take both from one call of quantize"
        )


def require_linear(
    x: Tensor, weight: INT4Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    """Refuse operands that do not fit a packed weight, which is checked as well."""
    require_record("weight", weight, INT4Tensor)
    require_packed(weight.codes, weight.group_scale)
    require_float("x", x)
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise InputError(
            f"x must have the weight's {columns} columns, got shape {tuple(x.shape)}; "
            "take the input of this layer"
        )
    require_bias(bias, rows)
    require_dtype("the result", torch.empty(0, dtype=out_dtype), *FLOAT_DTYPES)
    require_same_device(x, weight.codes, bias)


def _require_ungrouped(weight: Tensor, group_size: int, storage_dtype: torch.dtype) -> None:
    require_float("weight", weight)
    require_matrix("weight", weight)
    if group_size < 2 or group_size % 2:
        raise InputError(f"group_size must be even and at least 2, got {group_size}; take 128")
    require_multiple("in_features", weight.shape[1], group_size)
    if not weight.shape[1]:
        raise InputError("in_features must be at least one group, got 0; leave empty weights out")
    require_dtype("the stored scale", torch.empty(0, dtype=storage_dtype), *FLOAT_DTYPES)


def _require_scale(matrix: Tensor, group_scale: Tensor) -> None:
    require_dtype("group_scale", group_scale, torch.float32)
    require_matrix("group_scale", group_scale)
    require_same_device(matrix, group_scale)


def _require_groups(matrix: Tensor, group_scale: Tensor) -> None:
    _require_scale(matrix, group_scale)
    rows, groups = group_scale.shape
    if rows != matrix.shape[0] or groups == 0 or matrix.shape[1] % (2 * groups):
        raise InputError(
            f"group_scale must be [{matrix.shape[0]}, a divisor of {matrix.shape[1]} / 2], "
            f"got shape {(rows, groups)}; compute it from this weight"
        )
