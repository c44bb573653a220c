"""The undecided part of a choice within several limits, as a 0-1 program for HiGHS."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoq.search import _highs
from autoq.search._dual import Lagrangian
from autoq.search._relaxation import Choice

_SCALED_THRESHOLD = 1e4
"""Size of the threshold in HiGHS's objective; its absolute gap of 1e-6 is 1e-10 of that."""

_LARGEST_ROW_ENTRY = 1024
"""HiGHS allows a row an absolute error of 1e-6: this keeps it at 1e-9 of the largest entry."""

_OFFSET = 100
"""Constant in the objective beside the threshold where a gap is allowed; it costs two digits."""

_TIGHTENINGS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best choice among those of the core, and what is proved about all others."""

    choice: Choice | None  # fits; None when nothing was found
    proved: float  # no choice, in the core or not, has a lower excess; inf when none fits
    exhausted: bool  # nothing in the core fits, which is proved


@dataclass(frozen=True, slots=True, kw_only=True)
class Core:
    """All choices made of options whose reduced loss is at most a threshold.

    A choice with any option outside the core has an excess above the threshold, so that the core's
    own bound, or failing that the threshold, holds for all choices.
    """

    relaxation: Lagrangian
    threshold: float

    def solve(self, *, seconds: float, allowed: float, nodes: int | None) -> Found:
        """Search it, until no choice can be better by more than `allowed`."""
        reduced = self.relaxation.reduced
        kept = reduced <= self.threshold * (1 + 1e-9)
        outside = math.inf if (kept | np.isinf(reduced)).all() else self.threshold
        base = reduced.argmin(axis=1)
        groups, options = np.nonzero(kept & (kept.sum(axis=1) > 1)[:, None])
        if not len(groups):
            return self._only(base, outside)
        cells = self.relaxation.cells
        tightening = np.zeros(len(cells.limits))
        found = Found(choice=None, proved=0.0, exhausted=False)
        for attempt in range(_TIGHTENINGS):
            answer, choice = self._ask(base, groups, options, tightening, seconds, allowed, nodes)
            if attempt == 0:
                bound = answer.bound * self._unit() if not answer.infeasible else math.inf
                proved = min(max(bound, 0.0), outside)
                found = Found(choice=None, proved=proved, exhausted=answer.infeasible)
            if choice is None:
                return found
            if cells.fits(choice):
                return Found(choice=choice, proved=found.proved, exhausted=False)
            # It oversteps by rounding: the bound holds, the choice does not.
            over = np.maximum(cells.used(choice) - 1.0, 0.0)
            tightening += np.maximum(over, 1e-12)
        return found

    def _only(self, choice: Choice, outside: float) -> Found:
        if not self.relaxation.cells.fits(choice):
            return Found(choice=None, proved=outside, exhausted=True)
        excess = min(self.relaxation.excess_of(choice), outside)
        return Found(choice=choice, proved=excess, exhausted=False)

    def _unit(self) -> float:
        return self.threshold / _SCALED_THRESHOLD

    def _ask(
        self,
        base: Choice,
        groups: NDArray[np.int64],
        options: NDArray[np.int64],
        tightening: NDArray[np.float64],
        seconds: float,
        allowed: float,
        nodes: int | None,
    ) -> tuple[_highs.HighsAnswer, Choice | None]:
        from scipy.sparse import block_diag, coo_array, csr_array, hstack, vstack

        all_shares = self.relaxation.cells.shares
        variables, limits = len(groups), len(all_shares)
        opened, dense = np.unique(groups, return_inverse=True)
        closed = np.ones(len(base), dtype=np.bool_)
        closed[opened] = False
        rows = np.arange(len(base))
        room = 1.0 - all_shares[:, rows[closed], base[closed]].sum(axis=1) - tightening
        taken = all_shares[:, groups, options]
        unit = taken.max(axis=1, initial=0.0) / _LARGEST_ROW_ENTRY
        unit[unit == 0.0] = 1.0
        picks = coo_array((np.ones(variables), (dense, np.arange(variables))))
        shares = hstack([csr_array(taken / unit[:, None]), csr_array(np.eye(limits))])
        # A last variable that is always 1 makes HiGHS's relative gap an absolute one.
        matrix = block_diag(
            [vstack([hstack([picks, coo_array((len(opened), limits))]), shares]), [[1.0]]],
            format="csr",
        )
        right = np.concatenate([np.ones(len(opened)), room / unit, [1.0]])
        offset = _OFFSET * self.threshold if allowed * _OFFSET > self.threshold else 0.0
        reduced = self.relaxation.reduced[groups, options]
        costs = np.concatenate([reduced, self.relaxation.prices * unit, [offset]])
        answer = _highs.minimise(
            costs / self._unit(),
            matrix,
            (right, right),
            integers=np.arange(len(costs)) < variables,
            upper=np.concatenate([np.ones(variables), np.full(limits, np.inf), [1.0]]),
            time_limit_seconds=seconds,
            relative_gap=allowed / (offset + self.threshold),
            node_limit=nodes,
        )
        answer = replace(answer, bound=answer.bound - offset / self._unit())
        if answer.values is None:
            return answer, None
        choice = base.copy()
        picked = np.flatnonzero(answer.values[:variables] > 0.5)
        choice[groups[picked]] = options[picked]
        return answer, choice
