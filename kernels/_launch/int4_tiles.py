"""Tiles of products with INT4 weights, per kind of product, number of rows and target.

Of two sums at once, that of a step and that of all, large tiles have no room in registers: that is
why two levels, which need but one, have the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoq.kernels._launch.int4_variant import DECODE_ROWS, Product
from autoq.kernels._launch.split_k import parts
from autoq.kernels._launch.tiles import Tile, TileLists, tiles_of
from autoq.kernels.targets import Target

FEW_ROWS = 16
"""Products of at most so many rows take the smallest tiles."""
_MANY_ROWS = 1 << 31


def _everywhere(cuda: Sequence[Tile], **others: Sequence[Tile]) -> TileLists:
    """The same list for NVIDIA targets; that of its first two pipelined less for AMD's."""
    hip = tuple(replace(tile, stages=2) for tile in cuda[:2])
    lists = dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"), cuda)
    return {**lists, "gfx942": hip, "gfx950": hip, **others}


_FEW = (Tile(16, 128, 128, warps=4, stages=4), Tile(16, 64, 128, warps=4, stages=4))
_DECODE = (Tile(64, 64, 128, warps=4, stages=4), Tile(64, 128, 128, warps=4, stages=3))
_DECODE_WITH_FRAGMENTS = (_DECODE[0], replace(_DECODE[1], warps=8))
"""Where both operands of a 16-bit dot pass through registers."""
_MANY = (Tile(128, 128, 128, warps=8, stages=3), Tile(64, 128, 128, warps=4, stages=3))
_TWO_PROGRAMS = Tile(128, 64, 128, warps=4, stages=3)
"""Two of it fit on one multiprocessor: one unpacks while the other multiplies."""

_TILES: Mapping[Product, Mapping[int, TileLists]] = {
    Product.W4A16: {
        # With two warps triton takes the matrix instructions of Ampere, which want four bytes in a
        # row from each thread; those of Hopper want two, and unpacking costs half as much again.
        FEW_ROWS: _everywhere(_FEW, sm_90=(Tile(16, 64, 128, warps=2, stages=4), _FEW[0])),
        DECODE_ROWS: _everywhere(
            _DECODE,
            sm_80=_DECODE_WITH_FRAGMENTS,
            sm_89=_DECODE_WITH_FRAGMENTS,
            sm_120=_DECODE_WITH_FRAGMENTS,
        ),
        _MANY_ROWS: _everywhere(_MANY, sm_90=(_TWO_PROGRAMS, *_MANY)),
    },
    Product.W4A8: {
        FEW_ROWS: _everywhere(_FEW),
        DECODE_ROWS: _everywhere(_DECODE, sm_80=_DECODE_WITH_FRAGMENTS),
        _MANY_ROWS: _everywhere(_MANY, sm_80=_MANY[:1], sm_90=(_TWO_PROGRAMS, *_MANY)),
    },
    Product.TWO_LEVEL: {
        FEW_ROWS: _everywhere(_FEW),
        # With 128 rows of the weight each thread makes the table of one, and codes stay in
        # registers. sm_80 computes in float32 what is a table elsewhere, and has no room for it.
        DECODE_ROWS: _everywhere(_DECODE[::-1], sm_80=_DECODE[:1]),
        _MANY_ROWS: _everywhere(
            (
                Tile(256, 128, 128, warps=8, stages=3),
                Tile(128, 128, 128, warps=8, stages=3),
                _TWO_PROGRAMS,
            ),
            sm_80=(_TWO_PROGRAMS,),
            # The compiler makes wgmma of 128 rows of the weight wait for one another.
            sm_90=(Tile(256, 64, 128, warps=4, stages=3), _TWO_PROGRAMS),
            gfx942=(Tile(128, 128, 128, warps=8, stages=2), replace(_TWO_PROGRAMS, stages=2)),
        ),
    },
}


def listed(target: Target, product: Product, m: int) -> Sequence[Tile]:
    """What to try for a product of m rows, the best guess first."""
    rows = next(rows for rows in _TILES[product] if m <= rows)
    return tiles_of(_TILES[product][rows], target)


def tiles(target: Target, product: Product, m: int, n: int, k: int) -> tuple[Tile, ...]:
    """What to try for [m, k] @ [n, k].T; all cut K into as many parts."""
    chosen = tuple(listed(target, product, m))
    if m > DECODE_ROWS:
        return chosen
    first = chosen[0]
    split_k = parts(m, n, k, block_m=first.block_m, block_n=first.block_n, weight_bits=4)
    return tuple(replace(tile, split_k=split_k) for tile in chosen)
