"""Local search on scores and pairwise terms: one group or two change at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.search._cells import Limit
from autoq.search._relaxation import Choice

_ROUNDING = 1e-12
"""Gains below this fraction of the scores' sum are rounding, and so may be that of a limit."""

_CHUNK = 256
"""Rows of the table of changes that are looked at together: it never exists as a whole."""


class LocalSearch:
    """Steepest descent on `sum of scores + sum over pairs`, within limits.

    Cells are numbered. The field of a cell is what it adds together with the cells that all other
    groups take; a change updates it by two columns of the pair table.
    """

    def __init__(
        self,
        *,
        scores: NDArray[np.float64],
        pairs: NDArray[np.float64],
        usable: NDArray[np.bool_],
        limits: Sequence[Limit],
    ) -> None:
        """Take tables [groups, formats], and [groups, formats, groups, formats] of pairs."""
        self._groups, columns = np.nonzero(usable)
        self._columns = columns
        self._scores = scores[usable]
        flat = np.flatnonzero(usable.ravel())
        size = usable.size
        self._pairs = pairs.reshape(size, size)[np.ix_(flat, flat)]
        self._pairs[self._groups[:, None] == self._groups[None, :]] = 0.0
        self._number = np.full(usable.shape, -1, dtype=np.int64)
        self._number[usable] = np.arange(len(flat))
        self._limits = limits
        self._amounts = np.array([limit.amounts[usable] for limit in limits]).reshape(
            len(limits), len(flat)
        )
        self._doubt = np.array([_doubt(limit) for limit in limits])
        self._least_gain = _ROUNDING * float(np.abs(self._scores).sum())

    def from_choice(self, start: Choice) -> Choice:
        """The local optimum that descent from a choice within the limits leads to."""
        taken = self._number[np.arange(len(start)), start].copy()
        field = self._pairs[:, taken].sum(axis=1)
        while True:
            changed = self._best_single(taken, field) or self._best_pair(taken, field)
            if changed is None:
                return self._columns[taken]
            for cell in changed:
                group = self._groups[cell]
                field += self._pairs[:, cell] - self._pairs[:, taken[group]]
                taken[group] = cell

    def _changes(
        self, taken: NDArray[np.int64], field: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Of each cell: the change of the objective, [cells]; what it takes more; the room."""
        alone = self._scores + field
        now = taken[self._groups]
        extra = self._amounts - self._amounts[:, now]
        return alone - alone[now], extra, self._room(taken)

    def _room(self, taken: NDArray[np.int64]) -> NDArray[np.float64]:
        choice = self._columns[taken]
        return np.array([limit.most - limit.total(choice) for limit in self._limits])

    def _keeps_limits(
        self,
        taken: NDArray[np.int64],
        changed: tuple[int, ...],
        more: NDArray[np.float64],
        room: NDArray[np.float64],
    ) -> bool:
        """Whether a change that takes `more` fits; sums decide where rounding might."""
        if (more <= room - self._doubt).all():
            return True
        after = taken.copy()
        after[self._groups[list(changed)]] = changed
        choice = self._columns[after]
        return all(limit.total(choice) <= limit.most for limit in self._limits)

    def _best_single(
        self, taken: NDArray[np.int64], field: NDArray[np.float64]
    ) -> tuple[int] | None:
        change, extra, room = self._changes(taken, field)
        may_fit = (extra <= (room + self._doubt)[:, None]).all(axis=0)
        change = np.where(may_fit, change, np.inf)
        while True:
            best = int(change.argmin())
            if not change[best] < -self._least_gain:
                return None
            if self._keeps_limits(taken, (best,), extra[:, best], room):
                return (best,)
            change[best] = np.inf

    def _best_pair(
        self, taken: NDArray[np.int64], field: NDArray[np.float64]
    ) -> tuple[int, int] | None:
        change, extra, room = self._changes(taken, field)
        now = taken[self._groups]
        best: tuple[int, int] | None = None
        lowest = -self._least_gain
        for start in range(0, len(change), _CHUNK):
            rows = slice(start, start + _CHUNK)
            both = change[rows, None] + change[None, :]
            # What the pair changes beyond the sum of both: its own terms, old and new.
            terms = self._pairs[rows] - self._pairs[now[rows]]
            both += terms - terms[:, now]
            may_fit = self._groups[rows, None] != self._groups[None, :]
            for more, left in zip(extra, room + self._doubt, strict=True):
                may_fit &= more[rows, None] + more[None, :] <= left
            both[~may_fit] = np.inf
            while both.min() < lowest:
                first, second = divmod(int(both.argmin()), len(change))
                pair = start + first, second
                if self._keeps_limits(taken, pair, extra[:, list(pair)].sum(axis=1), room):
                    lowest, best = float(both[first, second]), pair
                both[first, second] = np.inf
        return best


def _doubt(limit: Limit) -> float:
    """How near to a limit differences of amounts do not tell whether it is kept."""
    return 0.0 if limit.whole or math.isinf(limit.most) else _ROUNDING * abs(limit.most)
