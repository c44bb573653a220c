"""Tiles of the products of MXFP8 and MXFP4, per kernel, number of rows and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoq.kernels._launch.mx_variant import DECODE_ROWS, FEW_ROWS, Kernel, Variant
from autoq.kernels._launch.tiles import Tile, TileLists, tiles_of
from autoq.kernels.targets import Target

_SCALED: Mapping[int, TileLists] = {
    FEW_ROWS: {
        "sm_100": (Tile(16, 128, 256, warps=8, stages=4), Tile(16, 128, 128, warps=4, stages=5)),
        "sm_120": (Tile(16, 64, 256, warps=4, stages=3), Tile(16, 128, 256, warps=8, stages=2)),
        "gfx950": (Tile(16, 64, 256, warps=4, stages=2), Tile(16, 128, 128, warps=4, stages=2)),
    },
    DECODE_ROWS: {
        "sm_100": (Tile(64, 128, 256, warps=8, stages=4), Tile(64, 128, 128, warps=4, stages=5)),
        "sm_120": (Tile(64, 64, 256, warps=4, stages=3), Tile(64, 64, 128, warps=4, stages=4)),
        "gfx950": (Tile(64, 64, 256, warps=4, stages=2), Tile(64, 128, 128, warps=4, stages=2)),
    },
    0: {
        "sm_100": (Tile(128, 256, 128, warps=8, stages=4), Tile(128, 128, 256, warps=8, stages=3)),
        "sm_120": (Tile(128, 128, 128, warps=8, stages=2), Tile(128, 64, 128, warps=8, stages=3)),
        "gfx950": (Tile(128, 256, 128, warps=8, stages=2), Tile(128, 128, 256, warps=8, stages=2)),
    },
}
# Only for many rows: see `variant`.
_GROUPED: TileLists = {
    "sm_89": (Tile(128, 64, 128, warps=8, stages=3), Tile(64, 128, 64, warps=4, stages=3)),
    "sm_90": (
        Tile(128, 128, 64, warps=8, stages=4),
        Tile(128, 64, 128, warps=8, stages=4),
        Tile(64, 64, 128, warps=4, stages=4),
    ),
}
_SMALL = Tile(64, 64, 128, warps=8, stages=3)
_UPCAST: Mapping[int, Sequence[Tile]] = {
    FEW_ROWS: (Tile(16, 64, 256, warps=4, stages=3), Tile(16, 64, 128, warps=4, stages=4)),
    DECODE_ROWS: (_SMALL,),
    0: (Tile(128, 128, 64, warps=8, stages=3), _SMALL),
}
_UPCAST_ON_SM_80 = (Tile(128, 128, 32, warps=8, stages=4), _SMALL)


def tiles(target: Target, chosen: Variant, m: int) -> Sequence[Tile]:
    """What to try for a product with m rows, the best guess first."""
    rows = FEW_ROWS if m <= FEW_ROWS else DECODE_ROWS if m <= DECODE_ROWS else 0
    match chosen.kernel:
        case Kernel.SCALED:
            return tiles_of(_SCALED[rows], target)
        case Kernel.GROUPED:
            return tiles_of(_GROUPED, target)
        case Kernel.UPCAST:
            return _upcast_tiles(target, rows)


def _upcast_tiles(target: Target, rows: int) -> Sequence[Tile]:
    if target.architecture in (80, 86, 87) and not rows:
        return _UPCAST_ON_SM_80
    stages = 2 if target.backend == "hip" else 4
    return [replace(tile, stages=min(tile.stages, stages)) for tile in _UPCAST[rows]]
