"""The two tables brought together once, and solved for as many budgets as are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from autoq.search._knapsack import Tolerance
from autoq.search._problem import Problem
from autoq.search._resources import as_budgets, without_repeats
from autoq.search._smallest import smallest_within
from autoq.search._types import Budget, CostTable, Plan, Resource, SensitivityTable
from autoq.search._within import solve_within
from autoq.search.frontier import RELATIVE_GAP, frontier_of


class Planner:
    """Answers one budget after the other; the answers are those of `solve`, `smallest`, `frontier`.

    Checking the tables and finding the convex hull of all plans takes longer than most answers, and
    is done once. Several threads may ask at the same time.
    """

    def __init__(self, sensitivity: SensitivityTable, costs: CostTable) -> None:
        """
        Args:
            sensitivity: scores, as for `solve`.
            costs: costs, as for `solve`.
        Raises:
            InputError: the tables cannot be used, as for `solve`.
        """
        self._problem = Problem(sensitivity=sensitivity, costs=costs)

    @property
    def costs(self) -> CostTable:
        """What it plans with."""
        return self._problem.costs

    @property
    def reachable_bits(self) -> tuple[float, float]:
        """Floor and ceiling of budgets in effective bits per weight."""
        return self._problem.reachable_bits

    def solve(
        self,
        budgets: float | Budget | Sequence[Budget],
        *,
        time_limit_seconds: float = 60.0,
        relative_gap: float = 0.0,
    ) -> Plan:
        """See `autoq.search.solve`."""
        return solve_within(
            self._problem,
            without_repeats(as_budgets(budgets)),
            time_limit_seconds=time_limit_seconds,
            tolerance=Tolerance(relative=relative_gap),
        )

    def smallest(
        self,
        loss_limit: float,
        *,
        minimise: Resource = Resource.EFFECTIVE_BITS,
        budgets: float | Budget | Sequence[Budget] = (),
        time_limit_seconds: float = 60.0,
        relative_gap: float = 0.0,
    ) -> Plan:
        """See `autoq.search.smallest`."""
        given = () if isinstance(budgets, Sequence) and not budgets else as_budgets(budgets)
        return smallest_within(
            self._problem,
            loss_limit,
            minimise,
            without_repeats(given),
            time_limit_seconds=time_limit_seconds,
            relative_gap=relative_gap,
        )

    def frontier(
        self,
        *,
        points: int = 64,
        time_limit_seconds: float = 60.0,
        relative_gap: float = RELATIVE_GAP,
    ) -> list[Plan]:
        """See `autoq.search.frontier`."""
        return frontier_of(
            self._problem,
            points=points,
            time_limit_seconds=time_limit_seconds,
            relative_gap=relative_gap,
        )
