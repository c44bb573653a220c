"""Plans within several budgets at once, or within one whose cells are no integers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError
from autoq.search import _highs, _resources
from autoq.search._knapsack import Tolerance
from autoq.search._problem import Problem
from autoq.search._types import Budget, Plan, Resource


def solve_within(
    problem: Problem,
    budgets: Sequence[Budget],
    *,
    time_limit_seconds: float,
    tolerance: Tolerance,
) -> Plan:
    """The plan of least loss within all budgets, each of another resource.

    Raises:
        BudgetInfeasibleError: effective bits are below the floor or above the ceiling.
        ResourceInfeasibleError: another budget, or all together, cannot be met.
    """
    for budget in budgets:
        problem.check_reachable(budget)
    limiting = [budget for budget in budgets if budget.limit < problem.reach(budget.resource)[1]]
    whole = [budget for budget in limiting if _resources.is_whole(budget.resource)]
    if len(limiting) == len(whole) <= 1:
        most = problem.reach(Resource.EFFECTIVE_BITS)[1]
        single = whole[0] if whole else Budget(resource=Resource.EFFECTIVE_BITS, limit=most)
        return problem.solve(
            problem.capacity(single),
            budgets,
            resource=single.resource,
            time_limit_seconds=time_limit_seconds,
            tolerance=tolerance,
        )
    columns, unproved = _by_highs(problem, limiting, time_limit_seconds)
    return problem.plan(columns, budgets, unproved * problem.loss_unit)


def _by_highs(
    problem: Problem, budgets: Sequence[Budget], seconds: float
) -> tuple[NDArray[np.int64], float]:
    from scipy.sparse import coo_array, vstack

    groups, columns = np.nonzero(problem.usable)
    losses = problem.scores[groups, columns] / problem.loss_unit
    variables = np.arange(len(groups))
    picks = coo_array((np.ones(len(groups)), (groups, variables)))
    rows, limits = [], []
    for budget in budgets:
        taken = _resources.cells(problem.costs, budget.resource)[groups, columns]
        per_unit = _resources.cells_per_unit(problem.costs, budget.resource)
        rest = _resources.fixed(problem.costs, budget.resource)
        scale = 1024 / float(taken.max())
        rows.append(coo_array((taken * scale)[None]))
        limits.append((budget.limit - rest) * per_unit * scale)
    count = len(problem.costs.groups)
    answer = _highs.minimise(
        losses * 1e4,
        vstack([picks, *rows]).tocsr(),
        (
            np.concatenate([np.ones(count), np.full(len(rows), -np.inf)]),
            np.concatenate([np.ones(count), limits]),
        ),
        integers=np.ones(len(groups), dtype=np.bool_),
        upper=np.ones(len(groups)),
        time_limit_seconds=seconds,
    )
    if answer.values is None:
        raise InputError("the budgets cannot be met together; raise one of them")
    picked = np.flatnonzero(answer.values > 0.5)
    taken_columns = np.empty(count, dtype=np.int64)
    taken_columns[groups[picked]] = columns[picked]
    unproved = math.fsum(losses[picked]) - answer.bound / 1e4
    return taken_columns, max(unproved, 0.0)
