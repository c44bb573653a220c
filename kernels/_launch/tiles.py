"""Tile shapes of matrix products, and the choice among them.

Each product lists, per target, the tiles that are worth trying there. The list is pruned ahead of
time: `tests/kernels/triton` compiles every entry and refuses one that spills or does not fit. On a
GPU triton's autotuner measures the list once per shape; elsewhere the first entry is taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from autoq.kernels.targets import Target


@dataclass(frozen=True, slots=True)
class Tile:
    """How one program of a matrix product works."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int = 1
    group_m: int = 8  # rows of tiles that are walked together, for the level-2 cache

    @property
    def constants(self) -> dict[str, int]:
        """As kernel arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "SPLIT_K": self.split_k,
            "GROUP_M": self.group_m,
        }


TileLists = Mapping[str, Sequence[Tile]]
"""Target -> tiles that are worth trying there, the best guess first."""

_LISTED_AS = {"sm_86": "sm_80", "sm_87": "sm_80", "sm_103": "sm_100", "sm_121": "sm_120"}


def tiles_of(lists: TileLists, target: Target) -> Sequence[Tile]:
    """The tiles of `target`, or of the target that it behaves like.

    The autotuner passes over a tile that needs more shared memory than a smaller relative has.
    """
    return lists[_LISTED_AS.get(target.name, target.name)]


def row_bucket(rows: int) -> int:
    """Rows rounded up to a power of two from 16 to 8192: products of one bucket share a tile."""
    return min(8192, max(16, 1 << (rows - 1).bit_length()))


def tuned(
    kernel: Any,
    tiles: Sequence[Tile],
    operand: Tensor,
    *,
    before_launch: Callable[[Mapping[str, Any]], None] | None = None,
    apart: Hashable = None,
) -> tuple[Any, Mapping[str, int]]:
    """The kernel to launch, and the further keyword arguments of the launch.

    On a GPU that is the kernel under triton's autotuner, which takes the tile itself; the kernel
    must have the arguments `m_bucket`, `n` and `k`. Elsewhere it is the kernel with the first tile.

    Args:
        before_launch: called by the autotuner with the arguments by name, a tile's among them, to
            change what depends on the tile; operands must be right for the first tile already.
        apart: what else the best tile depends on and triton does not see, such as the dtype behind
            a tensor descriptor.
    """
    # Measuring synchronises, which would spoil a graph that is being captured.
    if operand.is_cuda and not torch.cuda.is_current_stream_capturing():
        # An autotuner holds the arguments of a launch: two threads must not share one.
        owner = (operand.device, threading.get_ident(), apart)
        return _autotuned(kernel, tuple(tiles), before_launch, owner), {}
    first = tiles[0]
    return kernel, {**first.constants, "num_warps": first.warps, "num_stages": first.stages}


@cache
def _autotuned(
    kernel: Any,
    tiles: tuple[Tile, ...],
    before_launch: Callable[[Mapping[str, Any]], None] | None,
    owner: Hashable,
) -> Any:
    """One autotuner for each `owner`, which only keeps them apart."""
    configs = [
        triton.Config(
            tile.constants, num_warps=tile.warps, num_stages=tile.stages, pre_hook=before_launch
        )
        for tile in tiles
    ]
    return triton.autotune(configs, key=["m_bucket", "n", "k"], cache_results=True)(kernel)
