"""Greedy changes to a choice within several limits: make it fit, then use the room left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoq.search._cells import Cells
from autoq.search._relaxation import Choice

_NEAR_GROUPS = 4096
"""Groups that are looked at first: those that change at the least cost."""

_MOST_CHANGES = 5000


def repaired(cells: Cells, reduced: NDArray[np.float64]) -> Choice:
    """A choice that fits where greedy changes lead to one, from the best at the limits' prices.

    Args:
        cells: what may be chosen.
        reduced: reduced losses at the prices, [groups, options].
    """
    choice: Choice = reduced.argmin(axis=1)
    for groups in (_nearest(reduced), np.arange(len(choice))):
        if _repair(cells, reduced, choice, groups):
            break
    return choice


def filled(cells: Cells, start: Choice, reduced: NDArray[np.float64]) -> Choice:
    """Take, again and again, the change that saves most loss and still fits."""
    choice = start.copy()
    groups = _nearest(reduced)
    rows = np.arange(len(groups))
    losses, shares = cells.losses[groups], cells.shares[:, groups]
    room = 1.0 - cells.used(choice)
    for _ in range(_MOST_CHANGES):
        taken = choice[groups]
        extra = shares - shares[:, rows, taken][:, :, None]
        fits = (extra <= room[:, None, None]).all(axis=0)
        gain = np.where(fits, losses[rows, taken][:, None] - losses, -np.inf)
        row, option = divmod(int(gain.argmax()), gain.shape[1])
        if gain[row, option] <= 0:
            break
        room -= extra[:, row, option]
        choice[groups[row]] = option
    return choice


def _nearest(reduced: NDArray[np.float64]) -> NDArray[np.int64]:
    """The groups whose second-best option is nearest to their best, in order."""
    groups, options = reduced.shape
    if groups <= _NEAR_GROUPS or options < 2:
        return np.arange(groups)
    second = np.partition(reduced, 1, axis=1)[:, 1]
    return np.sort(np.argpartition(second, _NEAR_GROUPS)[:_NEAR_GROUPS]).astype(np.int64)


def _repair(
    cells: Cells, reduced: NDArray[np.float64], choice: Choice, groups: NDArray[np.int64]
) -> bool:
    """Change a choice in place until it fits; False when no change brings it nearer."""
    rows = np.arange(len(groups))
    costs, shares = reduced[groups], cells.shares[:, groups]
    possible = np.isfinite(costs)
    used = cells.used(choice)
    for _ in range(_MOST_CHANGES):
        over = np.maximum(used - 1.0, 0.0)
        if not over.any():
            return True
        taken = choice[groups]
        extra = shares - shares[:, rows, taken][:, :, None]
        left = np.maximum(used[:, None, None] + extra - 1.0, 0.0)
        relief = over.sum() - left.sum(axis=0)
        cost = np.maximum(costs - costs[rows, taken][:, None], 0.0)
        helps = possible & (relief > 0)
        if not helps.any():
            return False
        # Of changes that cost nothing the one that helps most.
        worth = np.where(helps, relief, 0.0) / (np.where(possible, cost, 0.0) + 1e-300)
        row, option = divmod(int(worth.argmax()), worth.shape[1])
        used = used + extra[:, row, option]
        choice[groups[row]] = option
    return False
