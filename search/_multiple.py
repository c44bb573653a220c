"""One option per group, least loss within several limits, with a proof.

Prices of the limits give a lower bound (`_dual`). From the choice that is best at these prices a
greedy repair leads to one that fits, and a greedy filling uses the room that is left. What could be
better than the best choice known consists of options whose reduced loss is below the distance
between the two; these go to HiGHS, first the most promising few, whose solution makes the rest
smaller (Balas and Zemel's core, 1980; for several limits see Puchinger, Raidl and Pferschy, 2010).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.search._cells import Cells
from autoq.search._core import Core
from autoq.search._dual import Lagrangian, lagrangian
from autoq.search._greedy import filled, repaired
from autoq.search._knapsack import Answer, Tolerance
from autoq.search._relaxation import Choice

_FIRST_CORE = 16
"""Parts of the known excess, one of which is the first core's threshold."""

_FIRST_GROUPS = 50
_FEW_NODES = 200
"""Of a search tree that is to find a better choice rather than to prove anything."""

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsolved:
    """No choice that fits is known."""

    infeasible: bool  # it is proved that none is


def solve(
    cells: Cells,
    *,
    time_limit_seconds: float,
    tolerance: Tolerance,
    start: Choice | None = None,
) -> Answer | Unsolved:
    """The choice of least loss within all limits; `start` is one that fits, if any is known."""
    deadline = time.monotonic() + time_limit_seconds
    relaxation = lagrangian(cells)
    if relaxation.bound > _largest_loss(cells) * (1 + _ROUNDING):
        return Unsolved(infeasible=True)
    best = _Best(relaxation)
    reduced = relaxation.reduced
    best.offer(filled(cells, repaired(cells, reduced), reduced))
    best.offer(start)
    return _searched(best, tolerance, deadline)


class _Best:
    """The best choice known, and what is proved of all choices."""

    def __init__(self, relaxation: Lagrangian) -> None:
        self.relaxation, self.cells = relaxation, relaxation.cells
        self.choice: Choice | None = None
        self.excess = math.inf
        self.proved = 0.0

    def offer(self, choice: Choice | None) -> None:
        """Keep a choice that fits and is better."""
        if choice is None or not self.cells.fits(choice):
            return
        excess = self.relaxation.excess_of(choice)
        if excess < self.excess:
            self.choice, self.excess = choice, excess

    def good_enough(self, tolerance: Tolerance) -> bool:
        """Whether what may still be gained is within the tolerance."""
        return self.choice is not None and self.excess - self.proved <= self.allowed(tolerance)

    def allowed(self, tolerance: Tolerance) -> float:
        """What the tolerance makes of the choice's loss; 0 while there is none."""
        return 0.0 if self.choice is None else tolerance.allowed(self.cells.loss_of(self.choice))


def _searched(best: _Best, tolerance: Tolerance, deadline: float) -> Answer | Unsolved:
    """Cores with growing thresholds, until the best choice is proved or time runs out."""
    reduced = best.relaxation.reduced
    largest = float(reduced[np.isfinite(reduced)].max()) or 1.0
    known = best.choice is not None
    threshold = best.excess / _FIRST_CORE if known else _typical_change(reduced)
    proved_infeasible = False
    while not best.good_enough(tolerance):
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            break
        threshold = min(threshold or largest, best.excess, largest)
        whole = threshold >= min(best.excess, largest)
        core = Core(relaxation=best.relaxation, threshold=threshold)
        found = core.solve(
            seconds=seconds, allowed=best.allowed(tolerance), nodes=None if whole else _FEW_NODES
        )
        best.proved = max(best.proved, found.proved)
        if found.choice is not None:
            best.offer(found.choice)
            best.offer(filled(best.cells, found.choice, reduced))
        proved_infeasible = whole and found.exhausted
        if whole:
            break
        threshold *= _FIRST_CORE
    if best.choice is None:
        return Unsolved(infeasible=proved_infeasible)
    return Answer(choice=best.choice, unproved=max(best.excess - best.proved, 0.0))


def _largest_loss(cells: Cells) -> float:
    finite = np.where(np.isfinite(cells.losses), cells.losses, 0.0)
    return math.fsum(finite.max(axis=1).tolist())


def _typical_change(reduced: NDArray[np.float64]) -> float:
    """A threshold that opens some dozens of groups."""
    if reduced.shape[1] < 2:
        return 0.0
    second = np.partition(reduced, 1, axis=1)[:, 1]
    second = np.sort(second[np.isfinite(second)])
    return float(second[min(len(second) - 1, _FIRST_GROUPS)]) if len(second) else 0.0
