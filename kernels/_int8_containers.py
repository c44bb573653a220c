"""How checkpoint containers pack INT8 codes; `autoq.kernels.int8` offers these functions."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.kernels._checks import require_dtype, require_matrix, require_multiple

_COLUMNS_PER_WORD = 4
_OFFSET = 0x80


def pack_columns(codes: Tensor) -> Tensor:
    """Pack four columns per word as code + 128, the first lowest (compressed-tensors' layout).

    Args:
        codes: int8 [N, K], K a multiple of 4.

    Returns:
        int32 [N, K/4].

    Raises:
        InputError: another dtype or shape.
    """
    require_dtype("codes", codes, torch.int8)
    require_matrix("codes", codes)
    require_multiple("in_features", codes.shape[1], _COLUMNS_PER_WORD)
    packed = torch.empty(codes.shape, dtype=torch.uint8, device=codes.device)
    # Adding 128 to a byte flips its highest bit.
    torch.bitwise_xor(codes.contiguous().view(torch.uint8), _OFFSET, out=packed)
    return packed.view(torch.int32)


def unpack_columns(packed: Tensor) -> Tensor:
    """Undo `pack_columns`: int32 [N, K/4] to int8 [N, K].

    Raises:
        InputError: packed is not an int32 matrix.
    """
    require_dtype("packed", packed, torch.int32)
    require_matrix("packed", packed)
    return (packed.contiguous().view(torch.uint8) ^ _OFFSET).view(torch.int8)
