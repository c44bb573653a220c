"""Sensitivity and costs brought together: what may be taken, at what loss, for how many bits."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoq.errors import BudgetInfeasibleError, InputError
from autoq.formats import NONE
from autoq.models import Assignment
from autoq.search import _knapsack, _relaxation
from autoq.search import costs as cost_functions
from autoq.search._types import CostTable, Plan, SensitivityTable

PRINTED_BITS_ERROR = 0.5e-4
"""How far a floor or ceiling copied from our four printed decimals may be off, in bits."""

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The two tables brought together, checked once and solved for as many budgets as needed."""

    sensitivity: SensitivityTable
    costs: CostTable

    def __post_init__(self) -> None:
        _check_tables(self.sensitivity, self.costs)
        self._check_scores()

    @cached_property
    def weights(self) -> int:
        """Weights of all groups."""
        return int(self.costs.weights.sum())

    @cached_property
    def contributions(self) -> NDArray[np.float64]:
        """[sequences, groups, formats] in the order of the cost table; `none` is zero."""
        index = {name: row for row, name in enumerate(self.sensitivity.groups)}
        rows = [index[name] for name in self.costs.groups]
        sequences = self.sensitivity.contributions.shape[0]
        table = np.zeros((sequences, len(rows), len(self.costs.formats)))
        for column, name in enumerate(self.costs.formats):
            if name != NONE:
                source = self.sensitivity.formats.index(name)
                table[:, :, column] = self.sensitivity.contributions[:, rows, source]
        return table

    @cached_property
    def scores(self) -> NDArray[np.float64]:
        """Mean loss increase, [groups, formats] in the order of the cost table."""
        return np.asarray(self.contributions.mean(axis=0), dtype=np.float64)

    @cached_property
    def usable(self) -> NDArray[np.bool_]:
        """Cells that a plan may take, [groups, formats]."""
        return np.asarray(self.costs.allowed & ~np.isnan(self.scores), dtype=np.bool_)

    @cached_property
    def reachable_bits(self) -> tuple[float, float]:
        """Floor and ceiling in effective bits per weight."""
        return bits_between(self.costs, self.usable)

    @cached_property
    def options(self) -> _relaxation.Options:
        """What is left of the cells, groups in the order of their names."""
        order = self._rows
        return _relaxation.undominated(
            self.scores[order] / self._loss_unit,
            self.costs.effective_bits[order],
            self.usable[order],
        )

    @cached_property
    def steps(self) -> _relaxation.HullSteps:
        """The convex hull of all plans."""
        return _relaxation.hull_steps(self.options)

    def capacity(self, budget_bits: float) -> int:
        """Most bits that a plan may take in all.

        It is the largest total whose quotient by the weights, as a floating-point number, is no
        more than the budget: asking for exactly the bits of a known plan finds that plan.

        Raises:
            BudgetInfeasibleError: the budget is below the floor or above the ceiling.
        """
        check_between(budget_bits, *self.reachable_bits)
        capacity = math.floor(budget_bits * self.weights) + 1
        while capacity / self.weights > budget_bits:
            capacity -= 1
        return max(capacity, self.options.floor_bits())

    def solve(
        self,
        capacity: int,
        budget_bits: float,
        *,
        time_limit_seconds: float,
        tolerance: _knapsack.Tolerance = _knapsack.EXACT,
    ) -> Plan:
        """The best plan within a capacity from `capacity`; the tolerance is in units of `options`."""
        answer = _knapsack.solve(
            self.options,
            self.steps,
            capacity,
            time_limit_seconds=time_limit_seconds,
            tolerance=tolerance,
        )
        columns = self._columns(answer.choice)
        return self._plan(columns, budget_bits, answer.unproved * self._loss_unit)

    def plan_of(self, assignment: Assignment, budget_bits: float) -> Plan:
        """The plan of an assignment within the budget, with the relaxation's bound.

        Raises:
            InputError: it misses a group or takes a cell that is not usable.
        """
        columns = np.array(cost_functions.assigned_columns(self.costs, assignment), dtype=np.int64)
        rows = np.arange(len(columns))
        refused = np.flatnonzero(~self.usable[rows, columns])
        if refused.size:
            group = self.costs.groups[int(refused[0])]
            raise InputError(
                f"group {group!r} cannot take {assignment[group]} (its shape or a rule forbids it, "
                f"or it has no score); take one of {', '.join(self._usable_names(int(refused[0])))}"
            )
        room = math.floor(min(budget_bits, self.reachable_bits[1]) * self.weights)
        capacity = max(room, int(self.costs.effective_bits[rows, columns].sum()))
        bound = _relaxation.relax(self.options, self.steps, capacity).bound()
        least = np.where(self.usable, self.scores, np.inf).min(axis=1)
        excess = math.fsum([*self.scores[rows, columns], *-least, -bound * self._loss_unit])
        return self._plan(columns, budget_bits, max(excess, 0.0))

    def _columns(self, choice: _relaxation.Choice) -> NDArray[np.int64]:
        """The columns of the cost table that a choice among `options` means, in its order."""
        columns = np.empty(len(choice), dtype=np.int64)
        columns[self._rows] = self.options.columns[np.arange(len(choice)), choice]
        return columns

    def nearest_usable(self, row: int, wanted: int) -> int:
        """The usable column of a group that is nearest to `wanted`, more bits before fewer."""
        if self.usable[row, wanted]:
            return wanted
        bits = self.costs.effective_bits[row]
        usable = [int(column) for column in np.flatnonzero(self.usable[row])]
        enough = [column for column in usable if bits[column] >= bits[wanted]]
        if enough:
            return min(enough, key=lambda column: (bits[column], self.scores[row, column]))
        return max(usable, key=lambda column: (bits[column], -self.scores[row, column]))

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        # By name, so that a plan does not depend on the order of the tables.
        names = self.costs.groups
        return np.array(sorted(range(len(names)), key=lambda row: names[row]), dtype=np.int64)

    @cached_property
    def _loss_unit(self) -> float:
        """A power of two near the largest score: dividing by it loses nothing."""
        largest = float(np.abs(self.scores[self.usable]).max())
        return 2.0 ** max(math.frexp(largest)[1], -1000) if largest else 1.0

    def _check_scores(self) -> None:
        infinite = np.argwhere(self.costs.allowed & np.isinf(self.contributions).any(axis=0))
        if infinite.size:
            row, column = infinite[0]
            raise InputError(
                f"scores must be finite, got an infinite one for group {self.costs.groups[row]!r} "
                f"in {self.costs.formats[column]}; look for infinite weights or activations in "
                "that group, or forbid the format there with --rule"
            )
        check_usable(self.costs, self.usable)

    def _usable_names(self, row: int) -> list[str]:
        return [
            name
            for name, usable in zip(self.costs.formats, self.usable[row], strict=True)
            if usable
        ]

    def _plan(self, columns: NDArray[np.int64], budget_bits: float, unproved: float) -> Plan:
        rows, costs = self._all_rows, self.costs
        loss = math.fsum(self.scores[rows, columns])
        stored_bits = int(costs.stored_bits[rows, columns].sum())
        names = self._format_names[columns].tolist()
        return Plan(
            assignment=dict(zip(costs.groups, names, strict=True)),
            budget_bits=budget_bits,
            effective_bits=int(costs.effective_bits[rows, columns].sum()) / self.weights,
            peer_effective_bits=float(costs.peer_bits[rows, columns].sum()) / self.weights,
            stored_bits_per_weight=stored_bits / self.weights,
            stored_bytes=-(-stored_bits // 8),
            predicted_loss=loss,
            predicted_loss_interval=_interval(self.contributions[:, rows, columns].sum(axis=1)),
            bound=loss - unproved,
            gap=unproved / max(abs(loss), unproved) if unproved else 0.0,
        )

    @cached_property
    def _all_rows(self) -> NDArray[np.int64]:
        return np.arange(len(self.costs.groups))

    @cached_property
    def _format_names(self) -> NDArray[np.object_]:
        return np.array(self.costs.formats, dtype=object)


def bits_between(costs: CostTable, usable: NDArray[np.bool_]) -> tuple[float, float]:
    """Floor and ceiling in effective bits per weight; every group has a usable cell."""
    most = np.iinfo(np.int64).max
    floor = np.where(usable, costs.effective_bits, most).min(axis=1).sum()
    ceiling = np.where(usable, costs.effective_bits, 0).max(axis=1).sum()
    weights = int(costs.weights.sum())
    return int(floor) / weights, int(ceiling) / weights


def check_between(budget_bits: float, floor_bits: float, ceiling_bits: float) -> None:
    """Refuse a budget that is out of reach, but for the rounding of the printed limits.

    Raises:
        BudgetInfeasibleError: it is below the floor or above the ceiling, or no number.
    """
    lowest, highest = floor_bits - PRINTED_BITS_ERROR, ceiling_bits + PRINTED_BITS_ERROR
    if not lowest <= budget_bits <= highest:
        raise BudgetInfeasibleError(budget_bits, floor_bits, ceiling_bits)


def check_usable(costs: CostTable, usable: NDArray[np.bool_]) -> None:
    """Refuse tables that leave nothing to decide, or a group without a format.

    Raises:
        InputError: there is no group, or one has no usable cell.
    """
    if not costs.groups:
        raise InputError(
            "a search must have at least one group to decide, got none; exclude fewer layers"
        )
    stuck = np.flatnonzero(~usable.any(axis=1))
    if stuck.size:
        raise InputError(
            "every group must have a format that it may take, got none for "
            f"{costs.groups[stuck[0]]!r}; allow none for it"
        )


def _check_tables(sensitivity: SensitivityTable, costs: CostTable) -> None:
    scored = set(sensitivity.groups)
    unscored = [name for name in costs.groups if name not in scored]
    if unscored:
        raise InputError(
            f"every group with costs must have scores, got none for {unscored[0]!r}"
            f"{_near(unscored[0], sensitivity.groups)}; score the same model map"
        )
    unknown = [name for name in costs.formats if name not in (*sensitivity.formats, NONE)]
    if unknown:
        raise InputError(
            f"every format with costs must have scores, got none for {unknown[0]!r} (scored: "
            f"{', '.join(sensitivity.formats)}); score it first or leave it out"
        )


def _near(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known)
    return f" (near: {', '.join(close)})" if close else ""


def _interval(totals: NDArray[np.float64]) -> tuple[float, float]:
    """Student's t interval of the mean over sequences; [sequences] in, bounds out.

    No sequence can lose less than nothing where none does, so the lower bound stops at zero then.
    One sequence tells nothing of the spread: the upper bound is inf.
    """
    from scipy.special import stdtrit

    sequences, mean = len(totals), float(totals.mean())
    lowest = 0.0 if totals.min() >= 0 else -math.inf
    if not totals.any():
        return 0.0, 0.0
    if sequences < 2:
        return lowest, math.inf
    quantile = float(stdtrit(sequences - 1, (1 + _CONFIDENCE) / 2))
    half = quantile * float(totals.std(ddof=1)) / math.sqrt(sequences)
    return max(mean - half, lowest), mean + half
