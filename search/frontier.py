"""The plans for all budgets at once."""

from __future__ import annotations

import time

import numpy as np

from autoq.search._knapsack import Tolerance
from autoq.search._problem import Problem
from autoq.search._resources import as_budgets
from autoq.search._types import CostTable, Plan, Resource, SensitivityTable

RELATIVE_GAP = 1e-3
"""How near to the least loss a point is proven to be: less than a curve shows, and with hundreds
of groups mostly reached without a search."""

_NEGLIGIBLE = 1e-6
"""Fraction of the smallest plan's loss that does not matter: near the ceiling losses go to zero,
and a fraction of them means nothing."""


def frontier(
    sensitivity: SensitivityTable,
    costs: CostTable,
    *,
    points: int = 64,
    time_limit_seconds: float = 60.0,
    relative_gap: float = RELATIVE_GAP,
) -> list[Plan]:
    """Plans from the smallest to the one of least loss, each the best at its own bits.

    Two kinds of plans are put together: vertices of the convex hull of all plans, which need no
    search and are optimal as they are, and exact solutions at evenly spaced budgets, which fill
    the gaps between vertices. What another plan beats or equals is left out, so effective bits
    strictly rise and predicted losses strictly fall.

    Args:
        sensitivity: scores, as for `solve`.
        costs: costs, as for `solve`.
        points: how many evenly spaced budgets are solved, and at most how many vertices are kept;
            at least 2.
        time_limit_seconds: for all exact solutions together; when it runs out the remaining ones
            are the best that were found, with their true gaps.
        relative_gap: plans proven to be within this fraction of the least loss, or within a
            millionth of the smallest plan's, are taken; 0 for exact plans.
    Raises:
        ValueError: `points` is below 2.
        InputError: the tables cannot be used, as for `solve`.
    """
    return frontier_of(
        Problem(sensitivity=sensitivity, costs=costs),
        points=points,
        time_limit_seconds=time_limit_seconds,
        relative_gap=relative_gap,
    )


def frontier_of(
    problem: Problem, *, points: int, time_limit_seconds: float, relative_gap: float
) -> list[Plan]:
    """As `frontier`, of tables that were brought together before."""
    if points < 2:
        raise ValueError(f"points must be >= 2, got {points}")
    deadline = time.monotonic() + time_limit_seconds
    plans = []
    options = problem.line(Resource.EFFECTIVE_BITS).options
    largest_loss = float(options.losses[:, 0].sum())
    tolerance = Tolerance(
        relative=relative_gap, absolute=_NEGLIGIBLE * largest_loss if relative_gap else 0.0
    )
    for capacity in _capacities(problem, points):
        budgets = as_budgets(capacity / problem.weights)
        seconds = max(deadline - time.monotonic(), 0.0)
        plans.append(
            problem.solve(capacity, budgets, time_limit_seconds=seconds, tolerance=tolerance)
        )
    return _undominated(plans)


def _capacities(problem: Problem, points: int) -> list[int]:
    """Evenly spaced totals of bits, and totals at which the hull has a vertex."""
    vertices = problem.line(Resource.EFFECTIVE_BITS).steps.bits
    grid = np.linspace(vertices[0], vertices[-1], points).round().astype(np.int64)
    kept = np.linspace(0, len(vertices) - 1, min(points, len(vertices))).round().astype(np.int64)
    return [int(capacity) for capacity in np.union1d(grid, vertices[kept])]


def _undominated(plans: list[Plan]) -> list[Plan]:
    """The plans that no plan with as few bits beats or equals, fewest bits first."""
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.effective_bits, plan.predicted_loss)):
        if not kept or plan.predicted_loss < kept[-1].predicted_loss:
            kept.append(plan)
    return kept
