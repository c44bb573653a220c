"""Tiles of the products of NVFP4, per kernel, number of rows and target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoq.kernels._launch.nvfp4_variant import DECODE_ROWS, FEW_ROWS, Kernel, Variant
from autoq.kernels._launch.tiles import Tile, TileLists, tiles_of
from autoq.kernels.targets import Target

_SCALED: Mapping[int, TileLists] = {
    FEW_ROWS: {
        "sm_100": (Tile(16, 128, 256, warps=8, stages=4),),
        "sm_120": (Tile(16, 64, 256, warps=4, stages=3), Tile(16, 128, 256, warps=8, stages=3)),
    },
    DECODE_ROWS: {
        "sm_100": (Tile(64, 128, 256, warps=8, stages=3),),
        "sm_120": (Tile(64, 64, 256, warps=4, stages=3), Tile(64, 128, 128, warps=8, stages=3)),
    },
    0: {
        "sm_100": (Tile(128, 256, 256, warps=8, stages=3), Tile(128, 128, 256, warps=8, stages=3)),
        "sm_120": (Tile(128, 128, 128, warps=8, stages=3), Tile(128, 128, 256, warps=8, stages=2)),
    },
}
_FEW = (
    Tile(16, 128, 128, warps=8, stages=4),
    Tile(16, 64, 128, warps=4, stages=5),
    Tile(16, 64, 256, warps=4, stages=3),
)
_FEW_ON_AMD = (Tile(16, 128, 128, warps=4, stages=2), Tile(16, 64, 256, warps=4, stages=2))
_DECODE = (Tile(64, 128, 64, warps=4, stages=4), Tile(32, 128, 128, warps=4, stages=4))
_DECODE_ON_AMD = (Tile(64, 128, 64, warps=4, stages=2), Tile(64, 64, 128, warps=4, stages=2))
_MANY = (Tile(128, 128, 64, warps=8, stages=3), Tile(64, 128, 64, warps=4, stages=4))
_MANY_ON_AMD = (Tile(128, 128, 64, warps=8, stages=2), Tile(128, 64, 64, warps=4, stages=2))
_WEIGHT_ONLY: Mapping[int, TileLists] = {
    FEW_ROWS: {
        **dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"), _FEW),
        **dict.fromkeys(("gfx942", "gfx950"), _FEW_ON_AMD),
    },
    DECODE_ROWS: {
        **dict.fromkeys(("sm_80", "sm_89", "sm_120"), _DECODE),
        "sm_90": (Tile(64, 128, 64, warps=4, stages=4), Tile(64, 64, 128, warps=4, stages=3)),
        "sm_100": (Tile(64, 64, 128, warps=4, stages=3), Tile(64, 128, 128, warps=8, stages=3)),
        **dict.fromkeys(("gfx942", "gfx950"), _DECODE_ON_AMD),
    },
    0: {
        **dict.fromkeys(("sm_80", "sm_89", "sm_120"), _MANY),
        "sm_90": (
            Tile(128, 256, 64, warps=8, stages=3),
            Tile(128, 128, 128, warps=8, stages=3),
            Tile(128, 128, 64, warps=8, stages=3),
        ),
        "sm_100": (Tile(128, 128, 128, warps=8, stages=3), Tile(128, 128, 64, warps=8, stages=3)),
        **dict.fromkeys(("gfx942", "gfx950"), _MANY_ON_AMD),
    },
}


def tiles(target: Target, chosen: Variant, m: int) -> Sequence[Tile]:
    """What to try for a product with m rows, the best guess first."""
    rows = FEW_ROWS if m <= FEW_ROWS else DECODE_ROWS if m <= DECODE_ROWS else 0
    lists = _SCALED if chosen.kernel is Kernel.SCALED else _WEIGHT_ONLY
    return tiles_of(lists[rows], target)
