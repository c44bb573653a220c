"""Sensitivity and costs brought together: what may be taken, at what loss, for how many bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError
from autoq.formats import NONE
from autoq.models import Assignment
from autoq.search import _knapsack, _relaxation, _resources
from autoq.search import costs as cost_functions
from autoq.search._checks import bits_between, check_between, check_tables, check_usable
from autoq.search._types import Budget, CostTable, Plan, Resource, SensitivityTable

_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The options as one whole resource sees them, and the convex hull of all plans."""

    options: _relaxation.Options
    steps: _relaxation.HullSteps


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The two tables brought together, checked once and solved for as many budgets as needed."""

    sensitivity: SensitivityTable
    costs: CostTable
    _lines: dict[Resource, Line] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_tables(self.sensitivity, self.costs)
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

    def line(self, resource: Resource) -> Line:
        """What is left of the cells beside one whole resource, groups in the order of names."""
        if resource not in self._lines:
            cells = np.ix_(self.rows, self.columns)
            options = _relaxation.undominated(
                self.scores[cells] / self.loss_unit,
                _resources.cells(self.costs, resource)[cells].astype(np.int64, copy=False),
                self.usable[cells],
            )
            options = replace(options, columns=self.columns[options.columns])
            steps = _relaxation.hull_steps(options)
            self._lines[resource] = Line(options=options, steps=steps)
        return self._lines[resource]

    def capacity(self, budget: Budget) -> int:
        """Most bits that a plan may take in all, for a budget of a whole resource.

        Raises:
            BudgetInfeasibleError: effective bits are below the floor or above the ceiling.
            ResourceInfeasibleError: stored bytes are below the floor.
        """
        self.check_reachable(budget)
        _, most = self.reach(budget.resource)
        within = Budget(resource=budget.resource, limit=min(budget.limit, most))
        floor = self.line(budget.resource).options.floor_bits()
        return max(_resources.capacity(self.costs, within), floor)

    def reach(self, resource: Resource) -> tuple[float, float]:
        """Least and most of a resource that any plan takes."""
        return _resources.reach(self.costs, resource, self.usable)

    def check_reachable(self, budget: Budget) -> None:
        """Refuse a budget that cannot be met alone.

        Raises:
            BudgetInfeasibleError: effective bits are below the floor or above the ceiling.
            ResourceInfeasibleError: another resource is below the floor.
        """
        if budget.resource is Resource.EFFECTIVE_BITS:
            check_between(budget.limit, *self.reachable_bits)
        else:
            _resources.check_reachable(self.costs, budget, self.usable)

    def solve(
        self,
        capacity: int,
        budgets: Sequence[Budget],
        *,
        resource: Resource = Resource.EFFECTIVE_BITS,
        time_limit_seconds: float,
        tolerance: _knapsack.Tolerance = _knapsack.EXACT,
    ) -> Plan:
        """The best plan within a capacity from `capacity`, which is all that `budgets` demand.

        The tolerance is in units of the line's options.
        """
        line = self.line(resource)
        answer = _knapsack.solve(
            line.options,
            line.steps,
            capacity,
            time_limit_seconds=time_limit_seconds,
            tolerance=tolerance,
        )
        columns = self.columns_of(answer.choice, line.options.columns)
        return self.plan(columns, budgets, answer.unproved * self.loss_unit)

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
        limit = min(budget_bits, self.reachable_bits[1])
        budget = Budget(resource=Resource.EFFECTIVE_BITS, limit=limit)
        room = _resources.capacity(self.costs, budget)
        capacity = max(room, int(self.costs.effective_bits[rows, columns].sum()))
        line = self.line(Resource.EFFECTIVE_BITS)
        bound = _relaxation.relax(line.options, line.steps, capacity).bound()
        least = np.where(self.usable, self.scores, np.inf).min(axis=1)
        excess = math.fsum([*self.scores[rows, columns], *-least, -bound * self.loss_unit])
        return self.plan(columns, _resources.as_budgets(budget_bits), max(excess, 0.0))

    def columns_of(
        self, choice: _relaxation.Choice, columns: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The columns of the cost table, in its order, that a choice among `columns` means.

        Both are [groups, ...] in the order of names, as a line's options are.
        """
        taken = np.empty(len(choice), dtype=np.int64)
        taken[self.rows] = columns[np.arange(len(choice)), choice]
        return taken

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
    def rows(self) -> NDArray[np.int64]:
        """Rows of the cost table by name, so that a plan does not depend on the table's order."""
        names = self.costs.groups
        return np.array(sorted(range(len(names)), key=lambda row: names[row]), dtype=np.int64)

    @cached_property
    def columns(self) -> NDArray[np.int64]:
        """Columns of the cost table by format name: which of equal formats is taken, they decide."""
        names = self.costs.formats
        return np.array(sorted(range(len(names)), key=lambda column: names[column]), dtype=np.int64)

    @cached_property
    def loss_unit(self) -> float:
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

    def plan(
        self,
        columns: NDArray[np.int64],
        budgets: Sequence[Budget],
        unproved: float,
    ) -> Plan:
        """The plan of format columns; `unproved` is how much lower another's loss could be."""
        rows, costs = self._all_rows, self.costs
        loss = math.fsum(self.scores[rows, columns])
        stored_bits = int(costs.stored_bits[rows, columns].sum())
        names = self._format_names[columns].tolist()
        limits = {budget.resource: budget.limit for budget in budgets}
        takes = {item: self.value(item, columns) for item in _resources.known(costs)}
        bits = takes[Resource.EFFECTIVE_BITS]
        return Plan(
            assignment=dict(zip(costs.groups, names, strict=True)),
            budget_bits=limits.get(Resource.EFFECTIVE_BITS, bits),
            effective_bits=bits,
            peer_effective_bits=float(costs.peer_bits[rows, columns].sum()) / self.weights,
            stored_bits_per_weight=stored_bits / self.weights,
            stored_bytes=-(-stored_bits // 8),
            predicted_loss=loss,
            predicted_loss_interval=_interval(self.contributions[:, rows, columns].sum(axis=1)),
            bound=loss - unproved,
            gap=unproved / max(abs(loss), unproved) if unproved else 0.0,
            budgets=tuple(budgets),
            takes=takes,
        )

    def value(self, resource: Resource, columns: NDArray[np.int64]) -> float:
        """What format columns take of a resource."""
        taken = _resources.cells(self.costs, resource)[self._all_rows, columns]
        return _resources.value(self.costs, resource, taken)

    @cached_property
    def _all_rows(self) -> NDArray[np.int64]:
        return np.arange(len(self.costs.groups))

    @cached_property
    def _format_names(self) -> NDArray[np.object_]:
        return np.array(self.costs.formats, dtype=object)


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
