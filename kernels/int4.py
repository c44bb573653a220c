"""INT4 weights in groups along the input dimension, and their two checkpoint packings.

A weight is code * group scale, codes -8..7, scale = amax(group) / 7, so that -8 does not occur.
All arithmetic is float32; rounding is to nearest, ties to even. Scales are rounded to the dtype
they will be stored in *before* they are used, or codes and scales would not belong together.

In the two-level form, which TensorRT-LLM runs with FP8 activations, the matrix unit sees
e4m3(code * rate) with rate = fp16(fp16(group scale) / tensor scale); the tensor scale multiplies
the result. Group scales above 65504 overflow float16 there, and those below 6e-8 vanish.

NaN and infinity are not looked for, because that costs a pass, and have no INT4 code: whoever
knows the layer's name checks weights and reports them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels._checks import (
    FLOAT_DTYPES,
    require_dtype,
    require_float,
    require_matrix,
    require_multiple,
    require_scale,
)
from autoq.kernels._torch import int4 as _torch

GROUP_SIZE = 128
"""Columns that share a scale in the AWQ checkpoints engines load."""


def group_scale(
    weight: Tensor, group_size: int = GROUP_SIZE, *, storage_dtype: torch.dtype
) -> Tensor:
    """Scales of the groups of `weight`: amax / 7, rounded to the dtype they will be stored in.

    Args:
        weight: float32, bfloat16 or float16 [N, K], K a multiple of `group_size`.
        group_size: columns that share a scale.
        storage_dtype: float32, bfloat16 or float16.

    Returns:
        float32 [N, K / group_size], exact in `storage_dtype`; 2**-24 where the maximum is 0
        or too small for `storage_dtype`.

    Raises:
        InputError: a dtype or shape is not as above.
    """
    require_float("weight", weight)
    require_matrix("weight", weight)
    require_multiple("in_features", weight.shape[1], group_size)
    require_dtype("the stored scale", torch.empty(0, dtype=storage_dtype), *FLOAT_DTYPES)
    return _torch.group_scale(weight, group_size, storage_dtype)


def quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """Codes clamp(round(weight / scale), -8, 7).

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        group_scale: float32 [N, groups] from `group_scale`.

    Returns:
        int8 [N, K].

    Raises:
        InputError: a dtype or shape is not as above.
    """
    _require_weight(weight, group_scale)
    return _torch.quantize(weight, group_scale)


def dequantize(codes: Tensor, group_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * scale [N, K], computed in float32 and rounded once to `dtype`.

    Raises:
        InputError: codes are not int8, scales are not float32, or shapes do not fit.
    """
    _require_codes(codes)
    _require_groups(codes, group_scale)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    return _torch.dequantize(codes, group_scale, dtype)


def dequantize_two_level(
    codes: Tensor, group_scale: Tensor, tensor_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """e4m3(code * rate) * tensor_scale [N, K]: the weight that an INT4 x FP8 matrix unit sees.

    Args:
        codes: int8 [N, K].
        group_scale: float32 [N, groups].
        tensor_scale: float32 scalar, amax of |code * scale| over the fusion set / 448.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: a dtype, shape or scale is not as above.
    """
    _require_codes(codes)
    _require_groups(codes, group_scale)
    require_scale("tensor_scale", tensor_scale)
    require_dtype("the result", torch.empty(0, dtype=dtype), *FLOAT_DTYPES)
    return _torch.dequantize_two_level(codes, group_scale, tensor_scale.to(codes.device), dtype)


def fake_quantize(weight: Tensor, group_scale: Tensor) -> Tensor:
    """`dequantize(quantize(weight, group_scale), group_scale, weight.dtype)`, bit for bit.

    Args and errors are those of `quantize`. No gradient flows through the result.
    """
    _require_weight(weight, group_scale)
    return _torch.fake_quantize(weight, group_scale)


def fake_quantize_two_level(weight: Tensor, group_scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """`dequantize_two_level` of the codes of `weight`, in its dtype, bit for bit.

    Args and errors are those of `quantize` and `dequantize_two_level`. No gradient flows.
    """
    _require_weight(weight, group_scale)
    require_scale("tensor_scale", tensor_scale)
    return _torch.fake_quantize_two_level(weight, group_scale, tensor_scale.to(weight.device))


def pack_rows(codes: Tensor) -> Tensor:
    """Pack two rows per byte, two's complement: row 2i in the low nibble (ModelOpt's layout).

    Args:
        codes: int8 [N, K] in -8..7, N even.

    Returns:
        uint8 [N/2, K].

    Raises:
        InputError: another dtype or shape, an odd N, or a code out of range.
    """
    _require_codes(codes)
    _require_range(codes)
    require_multiple("out_features", codes.shape[0], 2)
    return _torch.pack_rows(codes)


def unpack_rows(packed: Tensor) -> Tensor:
    """Undo `pack_rows`: uint8 [N/2, K] to int8 [N, K].

    Raises:
        InputError: packed is not a uint8 matrix.
    """
    require_dtype("packed", packed, torch.uint8)
    require_matrix("packed", packed)
    return _torch.unpack_rows(packed)


def pack_columns(codes: Tensor) -> Tensor:
    """Pack eight columns per word as code + 8, the first lowest (compressed-tensors' layout).

    Args:
        codes: int8 [N, K] in -8..7, K a multiple of 8.

    Returns:
        int32 [N, K/8].

    Raises:
        InputError: another dtype or shape, or a code out of range.
    """
    _require_codes(codes)
    _require_range(codes)
    require_multiple("in_features", codes.shape[1], 8)
    return _torch.pack_columns(codes)


def unpack_columns(packed: Tensor) -> Tensor:
    """Undo `pack_columns`: int32 [N, K/8] to int8 [N, K].

    Raises:
        InputError: packed is not an int32 matrix.
    """
    require_dtype("packed", packed, torch.int32)
    require_matrix("packed", packed)
    return _torch.unpack_columns(packed)


def _require_weight(weight: Tensor, group_scale: Tensor) -> None:
    require_float("weight", weight)
    require_matrix("weight", weight)
    _require_groups(weight, group_scale)


def _require_codes(codes: Tensor) -> None:
    require_dtype("codes", codes, torch.int8)
    require_matrix("codes", codes)


def _require_range(codes: Tensor) -> None:
    lowest, highest = (codes.min().item(), codes.max().item()) if codes.numel() else (0, 0)
    if lowest < _torch.LOWEST_CODE or highest > _torch.HIGHEST_CODE:
        raise InputError(
            f"codes must lie in -8..7, got {lowest}..{highest}; take those that quantize returned"
        )


def _require_groups(matrix: Tensor, group_scale: Tensor) -> None:
    require_dtype("group_scale", group_scale, torch.float32)
    require_matrix("group_scale", group_scale)
    rows, groups = group_scale.shape
    if rows != matrix.shape[0] or groups == 0 or matrix.shape[1] % groups:
        raise InputError(
            f"group_scale must be [{matrix.shape[0]}, a divisor of {matrix.shape[1]}], "
            f"got shape {(rows, groups)}; compute it from this weight"
        )
