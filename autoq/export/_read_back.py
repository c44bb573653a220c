"""Reading a file of tensors back, and comparing it with what was handed to its writer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from autoq.errors import VerificationError

_BYTES_AT_ONCE = 1 << 18
"""Both sides and what they have in common stay in a level-2 cache."""

_MAPPED_BYTES = 16 << 20
"""Pages of a mapped file count as the process's memory until it is closed, so it is now and then."""


def compare_with_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file that does not hold these tensors, bit for bit.

    Args:
        tensors: name -> tensor, contiguous and on the CPU.
    Raises:
        VerificationError: names the first tensor that differs.
        SafetensorError: the file has no tensor of a name, or cannot be read.
    """
    for names in _in_pieces(tensors):
        with safe_open(path, framework="pt") as file:
            for name in names:
                if not same_bits(file.get_tensor(name), tensors[name]):
                    raise VerificationError(
                        f"{name} differs from what was written; the file was changed or the disk is "
                        "failing: write it again"
                    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit: -0.0 is not 0.0, and NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    content, other_content = _content(one), _content(other)
    return all(
        np.array_equal(
            content[start : start + _BYTES_AT_ONCE], other_content[start : start + _BYTES_AT_ONCE]
        )
        for start in range(0, len(content), _BYTES_AT_ONCE)
    )


def _content(tensor: Tensor) -> NDArray[np.uint8]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy()


def _in_pieces(tensors: Mapping[str, Tensor]) -> Iterator[Sequence[str]]:
    """The names in order, in lists of about `_MAPPED_BYTES`."""
    piece: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        piece.append(name)
        size += tensor.nbytes
        if size >= _MAPPED_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
