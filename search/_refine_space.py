"""The plans that a refinement may propose: within the budgets, optimal for scores of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError
from autoq.formats import NONE
from autoq.models import Assignment
from autoq.search import costs as cost_functions
from autoq.search._knapsack import Tolerance
from autoq.search._problem import Problem
from autoq.search._refine_layers import LayerClasses, layer_classes
from autoq.search._refine_observations import Prior
from autoq.search._types import Budget, CostTable, Plan, SensitivityTable
from autoq.search._within import choice_of, limit_of, limiting_budgets, solve_within

_GAP = 1e-4
"""How near to its own optimum a proposal is solved; the scores are far less certain."""

_SECONDS = 20.0
"""For one proposal; a measured trial takes longer."""

_PROOF = Tolerance(relative=1e-6)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be proposed."""

    problem: Problem
    budgets: tuple[Budget, ...]
    _bounds: dict[tuple[Budget, ...], float] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls, sensitivity: SensitivityTable, costs: CostTable, budgets: tuple[Budget, ...]
    ) -> Space:
        """Check the tables and the budgets."""
        space = cls(problem=Problem(sensitivity=sensitivity, costs=costs), budgets=budgets)
        limiting_budgets(space.problem, budgets)
        return space

    @cached_property
    def layers(self) -> LayerClasses:
        """Types and classes of the groups."""
        return layer_classes(self.problem.costs.groups)

    @cached_property
    def prior(self) -> Prior:
        """What the scores say, before anything is measured."""
        contributions = self.problem.contributions
        sequences = len(contributions)
        errors = np.zeros(self.problem.scores.shape)
        if sequences > 1:
            errors = contributions.std(axis=0, ddof=1) / np.sqrt(sequences)
        return Prior.of(self.problem.scores, errors, self.layers.types, self.layers.classes)

    def best_for(self, scores: NDArray[np.float64]) -> Plan:
        """The plan that is optimal, to a ten-thousandth, for other scores [groups, formats].

        They must be finite, and zero for `none`; its losses are those of the problem's own scores.
        """
        return self.best_within(self.budgets, scores)

    def best_within(self, budgets: Sequence[Budget], scores: NDArray[np.float64]) -> Plan:
        """As `best_for`, within other budgets."""
        other = Problem(sensitivity=self._table(scores), costs=self.problem.costs)
        found = solve_within(
            other, budgets, time_limit_seconds=_SECONDS, tolerance=Tolerance(relative=_GAP)
        )
        return self.plan(self.columns(found.assignment), budgets)

    def plan(self, columns: NDArray[np.int64], budgets: Sequence[Budget]) -> Plan:
        """The plan of format columns, with the optimum's bound."""
        loss = self.problem.plan(columns, budgets, 0.0).predicted_loss
        return self.problem.plan(columns, budgets, max(loss - self._bound(tuple(budgets)), 0.0))

    def columns(self, assignment: Assignment) -> NDArray[np.int64]:
        """The format column of every group.

        Raises:
            InputError: a group or a format is not in the tables.
        """
        return np.array(
            cost_functions.assigned_columns(self.problem.costs, assignment), dtype=np.int64
        )

    def check(self, plan: Plan) -> None:
        """Refuse a plan that is not within the budgets.

        Raises:
            InputError: it is not.
        """
        choice = choice_of(self.problem, plan)
        for budget in limiting_budgets(self.problem, self.budgets):
            if limit_of(self.problem, budget).total(choice) > limit_of(self.problem, budget).most:
                taken = self.problem.value(budget.resource, self.columns(plan.assignment))
                raise InputError(
                    f"a plan to refine must be within its budgets, got {taken:.6g} of "
                    f"{budget.resource.value} for a budget of {budget.limit:g}; give the budgets "
                    "that it was solved for"
                )

    def _bound(self, budgets: tuple[Budget, ...]) -> float:
        if budgets not in self._bounds:
            best = solve_within(
                self.problem, budgets, time_limit_seconds=_SECONDS, tolerance=_PROOF
            )
            self._bounds[budgets] = best.bound
        return self._bounds[budgets]

    def _table(self, scores: NDArray[np.float64]) -> SensitivityTable:
        costs, given = self.problem.costs, self.problem.sensitivity
        kept = [column for column, name in enumerate(costs.formats) if name != NONE]
        usable = np.where(self.problem.usable, scores, np.nan)
        return SensitivityTable(
            groups=costs.groups,
            formats=tuple(costs.formats[column] for column in kept),
            contributions=usable[None, :, kept],
            unit=given.unit,
            estimator=given.estimator,
        )
