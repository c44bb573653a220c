"""FP8 tensors: which elements share a scale, and the record of codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from autoq.kernels._packed import PackedTensor

BLOCK = 128
"""Side of a block."""


class Scaling(StrEnum):
    """Which elements share a scale, and so the shape of the scale of a tensor [..., K]."""

    TENSOR = "tensor"
    """All: scale []."""
    ROW = "row"
    """A row along the last dimension, that is a token or an output channel: scale [..., 1]."""
    BLOCK_1X128 = "1x128"
    """128 columns of a row: scale [..., ceil(K / 128)]."""
    BLOCK_128X128 = "128x128"
    """128 columns of 128 rows of a matrix [N, K]: scale [ceil(N / 128), ceil(K / 128)]."""

    @property
    def in_blocks(self) -> bool:
        """Whether a row has a scale for each 128 columns."""
        return self in (Scaling.BLOCK_1X128, Scaling.BLOCK_128X128)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scale of a tensor of this shape."""
        match self:
            case Scaling.TENSOR:
                return ()
            case Scaling.ROW:
                return (*shape[:-1], 1)
            case Scaling.BLOCK_1X128:
                return (*shape[:-1], blocks_of(shape[-1]))
            case Scaling.BLOCK_128X128:
                return tuple(blocks_of(size) for size in shape)


@dataclass(frozen=True, slots=True, eq=False)
class FP8Tensor(PackedTensor):
    """A tensor [..., K] as codes and scales."""

    codes: Tensor
    """float8_e4m3fn [..., K]."""
    scale: Tensor
    """float32, in the shape that `Scaling` gives."""
    scaling: Scaling


def blocks_of(size: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // BLOCK)
