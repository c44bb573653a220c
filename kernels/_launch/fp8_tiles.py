"""Tiles of the FP8 products, per target: those that compile there without spilling registers.

The autotuner measures a list once per shape; elsewhere the first is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoq.kernels._launch.tiles import Tile, TileLists


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """The tiles of one kind of scales."""

    decode: TileLists  # block_m stands for the rows of the product, rounded up
    tiled: TileLists
    persistent: TileLists


_NARROW_DECODE = Tile(16, 64, 128, warps=4, stages=4)
_DECODE = (_NARROW_DECODE, Tile(16, 128, 128, warps=8, stages=4))
# With 8 warps triton 3.6 makes Hopper's products wait for each other where K is cut.
_HOPPER_DECODE = (
    _NARROW_DECODE,
    Tile(16, 128, 128, warps=4, stages=4),
    Tile(16, 64, 256, warps=4, stages=3),
)
_SMALL = Tile(64, 64, 128, warps=4, stages=4)

SCALED = Lists(
    decode={
        "sm_80": _DECODE,
        "sm_89": _DECODE,
        "sm_90": _HOPPER_DECODE,
        "sm_100": _HOPPER_DECODE,
        "sm_120": _DECODE,
        "gfx942": _DECODE,
        "gfx950": _DECODE,
    },
    tiled={
        "sm_80": (
            Tile(128, 128, 64, warps=8, stages=4),
            Tile(64, 256, 64, warps=8, stages=3),
            Tile(64, 64, 64, warps=4, stages=4),
        ),
        "sm_89": (
            Tile(128, 128, 128, warps=8, stages=3),
            Tile(128, 256, 128, warps=8, stages=2),
            Tile(64, 128, 128, warps=4, stages=3),
            _SMALL,
        ),
        "sm_90": (
            Tile(128, 128, 128, warps=8, stages=3),
            Tile(128, 256, 128, warps=8, stages=3),
            Tile(64, 128, 128, warps=4, stages=3),
            _SMALL,
        ),
        "sm_100": (
            Tile(128, 128, 128, warps=8, stages=3),
            Tile(64, 128, 128, warps=4, stages=3),
            _SMALL,
        ),
        "sm_120": (
            Tile(128, 128, 128, warps=8, stages=3),
            Tile(128, 256, 128, warps=8, stages=2),
            Tile(64, 128, 128, warps=4, stages=3),
            _SMALL,
        ),
        "gfx942": (
            Tile(128, 128, 64, warps=8, stages=2),
            Tile(256, 128, 64, warps=8, stages=2),
            Tile(64, 64, 64, warps=4, stages=2),
        ),
        "gfx950": (
            Tile(128, 128, 128, warps=8, stages=2),
            Tile(128, 256, 128, warps=8, stages=2),
            Tile(64, 64, 128, warps=4, stages=2),
        ),
    },
    persistent={
        "sm_90": (
            Tile(128, 256, 128, warps=8, stages=3),
            Tile(128, 256, 128, warps=8, stages=4),
            Tile(256, 128, 128, warps=8, stages=3),
            Tile(128, 128, 128, warps=8, stages=4),
        ),
        "sm_100": (
            Tile(128, 256, 128, warps=8, stages=3),
            Tile(128, 256, 128, warps=8, stages=4),
            Tile(128, 128, 128, warps=8, stages=4),
        ),
        "sm_120": (
            Tile(128, 128, 128, warps=8, stages=3),
            Tile(128, 128, 64, warps=8, stages=3),
        ),
    },
)
"""One scale per tensor or row: applied to the sums."""

_BLOCK_SMALL = Tile(64, 64, 128, warps=4, stages=3)
_HOPPER_BLOCK_TILED = (
    Tile(64, 128, 128, warps=4, stages=3),
    Tile(128, 128, 128, warps=8, stages=3),
    _BLOCK_SMALL,
)
_HOPPER_BLOCK_PERSISTENT = (
    Tile(128, 128, 128, warps=8, stages=4),
    Tile(64, 128, 128, warps=4, stages=3),
    Tile(128, 128, 128, warps=8, stages=3),
)

IN_BLOCKS = Lists(
    decode={
        "sm_80": _DECODE,
        "sm_89": _DECODE,
        "sm_90": _DECODE,
        "sm_100": _DECODE,
        "sm_120": _DECODE,
        "gfx942": _DECODE[:1],
        "gfx950": _DECODE,
    },
    tiled={
        "sm_80": (
            Tile(128, 64, 128, warps=8, stages=3),
            Tile(64, 128, 128, warps=8, stages=3),
            Tile(64, 64, 128, warps=8, stages=3),
        ),
        "sm_89": (
            Tile(64, 128, 128, warps=8, stages=3),
            Tile(128, 128, 128, warps=8, stages=3),
            _BLOCK_SMALL,
        ),
        "sm_90": _HOPPER_BLOCK_TILED,
        "sm_100": _HOPPER_BLOCK_TILED,
        "sm_120": (
            Tile(128, 64, 128, warps=8, stages=3),
            Tile(64, 128, 128, warps=8, stages=3),
            _BLOCK_SMALL,
        ),
        "gfx942": (
            Tile(128, 64, 128, warps=8, stages=2),
            Tile(64, 128, 128, warps=8, stages=2),
            Tile(64, 64, 128, warps=8, stages=2),
        ),
        "gfx950": (
            Tile(128, 128, 128, warps=8, stages=2),
            Tile(64, 128, 128, warps=8, stages=2),
            Tile(64, 64, 128, warps=4, stages=2),
        ),
    },
    persistent={
        "sm_90": _HOPPER_BLOCK_PERSISTENT,
        "sm_100": _HOPPER_BLOCK_PERSISTENT,
        "sm_120": (
            Tile(128, 64, 128, warps=8, stages=3),
            Tile(64, 128, 128, warps=4, stages=3),
        ),
    },
)
"""A scale for each 128 columns: block_k is 128, and the tile holds its sums twice."""
