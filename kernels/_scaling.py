"""Which elements of an FP8 tensor share a scale."""

from __future__ import annotations

from enum import StrEnum

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


def blocks_of(size: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // BLOCK)
