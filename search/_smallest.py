"""The plan that takes least of a resource while its predicted loss stays within a limit.

Objective and limit change places: the resource is minimised, and the loss is one of the limits that
`_multiple` keeps. Bits are integers, so a bound less than one common divisor below what a plan
takes is proof that none takes less.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from autoq.errors import InputError, QualityInfeasibleError
from autoq.search import _resources
from autoq.search._cells import Limit
from autoq.search._knapsack import Answer, Tolerance
from autoq.search._least_total import fewest_bits
from autoq.search._problem import Problem
from autoq.search._relaxation import Choice
from autoq.search._types import Budget, Least, Plan, Resource
from autoq.search._within import (
    ask,
    choice_of,
    columns_in_table_order,
    limit_of,
    limiting_budgets,
    solve_within,
)

_PROVED_GAP = 1e-9
"""What HiGHS's own tolerances leave of the gap of a plan that is optimal."""

_WHOLE_STEP = 0.999
"""Fraction of the step between totals that a bound must come within to prove the total."""


def smallest_within(
    problem: Problem,
    loss_limit: float,
    minimise: Resource,
    budgets: Sequence[Budget],
    *,
    time_limit_seconds: float,
    relative_gap: float,
) -> Plan:
    """Of the plans that take least of a resource within the limits, the one of least loss.

    Raises:
        QualityInfeasibleError: no plan within the budgets has so low a predicted loss.
        ResourceInfeasibleError: the budgets cannot be met.
    """
    if math.isnan(loss_limit):
        raise InputError(
            "a limit on the predicted loss must be a number, got nan; give nats per token"
        )
    deadline = time.monotonic() + time_limit_seconds
    _resources.cells(problem.costs, minimise)
    limiting = limiting_budgets(problem, budgets)
    answer = _least(problem, loss_limit, minimise, limiting, time_limit_seconds, relative_gap)
    columns = columns_in_table_order(problem, answer.choice)
    value = problem.value(minimise, columns)
    least = Least(
        resource=minimise,
        loss_limit=loss_limit,
        value=value,
        bound=value - answer.unproved,
        gap=answer.unproved / value if answer.unproved else 0.0,
    )
    others = [budget for budget in budgets if budget.resource is not minimise]
    tight = _resources.without_repeats([*others, Budget(resource=minimise, limit=value)])
    plan = solve_within(
        problem,
        tight,
        time_limit_seconds=max(deadline - time.monotonic(), 0.0),
        tolerance=Tolerance(relative=relative_gap),
        start=answer.choice,
    )
    return replace(plan, least=least)


def _least(
    problem: Problem,
    loss_limit: float,
    minimise: Resource,
    budgets: Sequence[Budget],
    seconds: float,
    relative_gap: float,
) -> Answer:
    """The choice that takes least; what is not proved is in the resource's own unit."""
    step = _step(problem, minimise)
    if step and not budgets:
        found = fewest_bits(problem, loss_limit, minimise, int(step), seconds)
        if found is not None:
            return Answer(choice=found, unproved=0.0)
    rows = problem.rows
    amounts = _resources.cells(problem.costs, minimise)[rows].astype(np.float64)
    unit = float(amounts.max()) or 1.0
    limits = [Limit(amounts=problem.scores[rows], most=loss_limit)]
    limits += [limit_of(problem, budget) for budget in budgets]
    tolerance = Tolerance(relative=relative_gap, absolute=_WHOLE_STEP * step / unit)
    answer = ask(problem, amounts / unit, limits, seconds, tolerance)
    if not isinstance(answer, Answer):
        start = _least_loss(problem, loss_limit, budgets, seconds)
        answer = ask(problem, amounts / unit, limits, seconds, tolerance, start=start)
    # With a choice to start from there is always an answer.
    answer = cast("Answer", answer)
    unproved = answer.unproved * unit
    if unproved <= _WHOLE_STEP * step:
        unproved = 0.0
    per_unit = _resources.cells_per_unit(problem.costs, minimise)
    return Answer(choice=answer.choice, unproved=unproved / per_unit)


def _least_loss(
    problem: Problem, loss_limit: float, budgets: Sequence[Budget], seconds: float
) -> Choice:
    """A choice within all limits.

    Raises:
        QualityInfeasibleError: there is none.
        InputError: the time ran out before one was found.
    """
    best = solve_within(problem, budgets, time_limit_seconds=seconds, tolerance=Tolerance())
    if best.bound <= loss_limit < best.predicted_loss and best.gap > _PROVED_GAP:
        raise InputError(
            f"no plan with a predicted loss of at most {loss_limit:g} was found in {seconds:g} "
            "seconds, and none proved impossible; allow more time or raise the limit"
        )
    if best.predicted_loss > loss_limit:
        within = _resources.spoken_together(budgets)
        raise QualityInfeasibleError(loss_limit, best.predicted_loss, within)
    return choice_of(problem, best)


def _step(problem: Problem, resource: Resource) -> float:
    """The least by which totals of a whole resource can differ; 0 for others."""
    if not _resources.is_whole(resource):
        return 0.0
    table = _resources.cells(problem.costs, resource).astype(np.int64)
    least = np.where(problem.usable, table, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    return float(np.gcd.reduce(np.where(problem.usable, table - least, 0), axis=None))
