"""The plan of least loss within all budgets, and the refusal of budgets that no plan meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError
from autoq.search import _multiple, _resources
from autoq.search import costs as cost_functions
from autoq.search._cells import Cells, Limit
from autoq.search._knapsack import EXACT, Answer, Tolerance
from autoq.search._problem import Problem
from autoq.search._relaxation import Choice, relax
from autoq.search._types import Budget, Plan, Resource


def solve_within(
    problem: Problem,
    budgets: Sequence[Budget],
    *,
    time_limit_seconds: float,
    tolerance: Tolerance,
    start: Choice | None = None,
) -> Plan:
    """The plan of least loss within all budgets, each of another resource.

    `start` is a choice known to be within them, in the order of names.

    Raises:
        BudgetInfeasibleError: effective bits are below the floor or above the ceiling.
        ResourceInfeasibleError: another budget, or all together, cannot be met.
        InputError: the time ran out before any plan was found.
    """
    limiting = limiting_budgets(problem, budgets)
    found = _by_one_budget(problem, budgets, limiting, time_limit_seconds, tolerance)
    if found is None:
        scores = problem.scores[problem.rows] / problem.loss_unit
        limits = [limit_of(problem, budget) for budget in limiting]
        answer = ask(problem, scores, limits, time_limit_seconds, tolerance, start=start)
        if not isinstance(answer, Answer):
            raise _refusal(problem, limiting, time_limit_seconds)
        columns = columns_in_table_order(problem, answer.choice)
        found = problem.plan(columns, budgets, answer.unproved * problem.loss_unit)
    if start is not None:
        known = problem.plan(columns_in_table_order(problem, start), budgets, 0.0)
        if known.predicted_loss < found.predicted_loss:  # the time ran out
            unproved = max(known.predicted_loss - found.bound, 0.0)
            found = problem.plan(columns_in_table_order(problem, start), budgets, unproved)
    return found


def limiting_budgets(problem: Problem, budgets: Sequence[Budget]) -> list[Budget]:
    """The budgets that exclude some plan.

    Raises:
        BudgetInfeasibleError: effective bits are below the floor or above the ceiling.
        ResourceInfeasibleError: another budget is below its floor.
    """
    for budget in budgets:
        problem.check_reachable(budget)
    return [budget for budget in budgets if budget.limit < problem.reach(budget.resource)[1]]


def limit_of(problem: Problem, budget: Budget) -> Limit:
    """A budget as a limit on cells, groups in the order of their names."""
    amounts = _resources.cells(problem.costs, budget.resource)[problem.rows]
    if _resources.is_whole(budget.resource):
        most = float(problem.capacity(budget))
        return Limit(amounts=amounts.astype(np.float64), most=most, whole=True)
    rest = _resources.fixed(problem.costs, budget.resource)
    return Limit(amounts=np.asarray(amounts, dtype=np.float64), most=budget.limit, fixed=rest)


def columns_in_table_order(problem: Problem, choice: Choice) -> NDArray[np.int64]:
    """Format columns in the order of the cost table's groups."""
    columns = np.empty(len(choice), dtype=np.int64)
    columns[problem.rows] = choice
    return columns


def choice_of(problem: Problem, plan: Plan) -> Choice:
    """A plan's format columns, groups in the order of names."""
    columns = cost_functions.assigned_columns(problem.costs, plan.assignment)
    return np.array(columns, dtype=np.int64)[problem.rows]


def _by_one_budget(
    problem: Problem,
    budgets: Sequence[Budget],
    limiting: Sequence[Budget],
    seconds: float,
    tolerance: Tolerance,
) -> Plan | None:
    """The plan when one whole resource is all that limits, which the plan itself shows."""
    single = _only_one_that_limits(problem, limiting)
    if single is None:
        return None
    capacity = problem.capacity(single)
    resource = single.resource
    plan = problem.solve(
        capacity, budgets, resource=resource, time_limit_seconds=seconds, tolerance=tolerance
    )
    others = [budget for budget in limiting if budget is not single]
    return plan if all(plan.takes[other.resource] <= other.limit for other in others) else None


def _only_one_that_limits(problem: Problem, limiting: Sequence[Budget]) -> Budget | None:
    """The whole resource whose relaxation already meets the other budgets, if there is one."""
    if not limiting:
        most = problem.reach(Resource.EFFECTIVE_BITS)[1]
        return Budget(resource=Resource.EFFECTIVE_BITS, limit=most)
    for budget in limiting:
        if not _resources.is_whole(budget.resource):
            continue
        if len(limiting) == 1:
            return budget
        line = problem.line(budget.resource)
        choice = relax(line.options, line.steps, problem.capacity(budget)).choice
        columns = problem.columns_of(choice, line.options.columns)
        others = [other for other in limiting if other is not budget]
        if all(problem.value(other.resource, columns) <= other.limit for other in others):
            return budget
    return None


def ask(
    problem: Problem,
    objective: NDArray[np.float64],
    limits: Sequence[Limit],
    seconds: float,
    tolerance: Tolerance,
    *,
    start: Choice | None = None,
) -> Answer | _multiple.Unsolved:
    """The best choice for any objective [groups, formats], groups in the order of names."""
    by_name = problem.columns
    cells = Cells.of(
        objective[:, by_name],
        problem.usable[np.ix_(problem.rows, by_name)],
        tuple(replace(limit, amounts=limit.amounts[:, by_name]) for limit in limits),
    )
    if cells is None:
        return _multiple.Unsolved(infeasible=True)
    answer = _multiple.solve(
        cells,
        time_limit_seconds=seconds,
        tolerance=tolerance,
        start=None if start is None else np.argsort(by_name)[start],
    )
    return replace(answer, choice=by_name[answer.choice]) if isinstance(answer, Answer) else answer


def _refusal(problem: Problem, budgets: Sequence[Budget], seconds: float) -> Exception:
    """Of a budget that cannot be met together with others that can, if one is proved to be.

    Budgets are added one by one; the first whose least value within those before it is above its
    limit is refused. Which of them conflict is narrowed down by leaving each out in turn.
    """
    for count in range(2, len(budgets) + 1):
        added = budgets[count - 1]
        before = list(budgets[: count - 1])
        least = _least_value(problem, added, before, seconds)
        if least is None or least <= added.limit:
            continue
        for budget in list(before):
            fewer = [other for other in before if other is not budget]
            without = _least_value(problem, added, fewer, seconds) if fewer else None
            if without is not None and without > added.limit:
                before, least = fewer, without
        return _resources.infeasible(added, least, before)
    return InputError(
        f"no plan was found within {_resources.spoken_together(budgets)} in {seconds:g} seconds, "
        "and none proved impossible; allow more time or raise a budget"
    )


def _least_value(
    problem: Problem, budget: Budget, within: Sequence[Budget], seconds: float
) -> float | None:
    """The least that a plan within other budgets takes of a resource; None if not found."""
    amounts = limit_of(problem, budget).amounts
    limits = [limit_of(problem, other) for other in within]
    found = ask(problem, amounts / (amounts.max() or 1.0), limits, seconds, EXACT)
    if not isinstance(found, Answer):
        return None
    return problem.value(budget.resource, columns_in_table_order(problem, found.choice))
