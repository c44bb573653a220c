"""How checkpoint containers pack INT4 codes; `autoq.kernels.int4` offers these functions."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels._checks import require_dtype, require_matrix, require_multiple
from autoq.kernels._torch import int4 as _torch


def pack_rows(codes: Tensor) -> Tensor:
    """Pack two rows per byte, two's complement: row 2i in the low nibble (ModelOpt's layout).

    Args:
        codes: int8 [N, K] in -8..7, N even.

    Returns:
        uint8 [N/2, K].

    Raises:
        InputError: another dtype or shape, an odd N, or a code out of range.
    """
    require_codes(codes)
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
    require_codes(codes)
    require_multiple("in_features", codes.shape[1], 8)
    return _torch.pack_columns(codes)


def unpack_columns(packed: Tensor) -> Tensor:
    """Undo `pack_columns`: int32 [N, K/8] to int8 [N, K].

    Raises:
        InputError: packed is not an int32 matrix.
    """
    _require_words(packed)
    return _torch.unpack_columns(packed)


def pack_gptq(codes: Tensor) -> Tensor:
    """Pack eight input features per word as code + 8, the first lowest (GPTQ's `qweight`).

    Beside it belong `qzeros`, whose every nibble is 7 (the zero point 8, less the 1 that readers
    add), and `scales`, the group scales transposed.

    Args:
        codes: int8 [N, K] in -8..7, K a multiple of 8.

    Returns:
        int32 [K/8, N].

    Raises:
        InputError: another dtype or shape, or a code out of range.
    """
    require_codes(codes)
    require_multiple("in_features", codes.shape[1], 8)
    return _torch.pack_gptq(codes)


def unpack_gptq(packed: Tensor) -> Tensor:
    """Undo `pack_gptq`: int32 [K/8, N] to int8 [N, K].

    Raises:
        InputError: packed is not an int32 matrix.
    """
    _require_words(packed)
    return _torch.unpack_gptq(packed)


def pack_awq(codes: Tensor) -> Tensor:
    """Pack eight output features per word as code + 8 (AutoAWQ's `qweight`).

    From the lowest nibble up a word holds features 0, 2, 4, 6, 1, 3, 5, 7. Beside it belong
    `qzeros`, whose every nibble is 8, and `scales`, the group scales transposed.

    Args:
        codes: int8 [N, K] in -8..7, N a multiple of 8.

    Returns:
        int32 [K, N/8].

    Raises:
        InputError: another dtype or shape, or a code out of range.
    """
    require_codes(codes)
    require_multiple("out_features", codes.shape[0], 8)
    return _torch.pack_awq(codes)


def unpack_awq(packed: Tensor) -> Tensor:
    """Undo `pack_awq`: int32 [K, N/8] to int8 [N, K].

    Raises:
        InputError: packed is not an int32 matrix.
    """
    _require_words(packed)
    return _torch.unpack_awq(packed)


def require_codes(codes: Tensor) -> None:
    """Refuse what is not an int8 matrix of numbers in -8..7."""
    require_dtype("codes", codes, torch.int8)
    require_matrix("codes", codes)
    lowest, highest = (end.item() for end in codes.aminmax()) if codes.numel() else (0, 0)
    if lowest < _torch.LOWEST_CODE or highest > _torch.HIGHEST_CODE:
        raise InputError(
            f"codes must lie in -8..7, got {lowest}..{highest}; take those that unpack returned"
        )


def _require_words(packed: Tensor) -> None:
    require_dtype("packed", packed, torch.int32)
    require_matrix("packed", packed)
