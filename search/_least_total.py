"""The fewest bits with which a loss can be kept, when nothing else limits a plan.

The least loss within a capacity falls as the capacity grows, so the least capacity that does is found
by halving. The relaxation leaves few capacities to look at: those below the one at which its own
loss is the limit are too small for all plans.
"""

from __future__ import annotations

import math
import time

import numpy as np

from autoq.search import _knapsack
from autoq.search._problem import Line, Problem
from autoq.search._relaxation import Choice
from autoq.search._types import Resource

_ROUNDING = 1e-9
"""Of a capacity: how far the relaxation's may be off."""


def fewest_bits(
    problem: Problem, loss_limit: float, resource: Resource, step: int, seconds: float
) -> Choice | None:
    """Columns of the cost table, in the order of names, of a plan that takes least of a resource.

    Args:
        resource: a whole one.
        step: that all totals differ by multiples of.
        seconds: to look for it.
    Returns:
        None where no plan loses so little, or none was proved to take least.
    """
    line = problem.line(resource)
    floor = line.options.floor_bits()
    deadline = time.monotonic() + seconds
    bracket = _bracket(problem, line, loss_limit)
    if bracket is None:
        return None
    choice, smaller = bracket
    known = (line.options.bits_of(choice) - floor) // step
    too_small = min(max((smaller - floor) // step, -1), known - 1)
    is_proved = too_small < 0  # below the floor there is nothing
    while not is_proved or known - too_small > 1:
        # The relaxation's word is good to rounding, so its last capacity is tried, too.
        tried = too_small if not is_proved else (known + too_small) // 2
        capacity = floor + tried * step
        answer = _knapsack.solve(
            line.options,
            line.steps,
            capacity,
            time_limit_seconds=max(deadline - time.monotonic(), 0.0),
        )
        if _loss(problem, line, answer.choice) <= loss_limit:
            choice, known = answer.choice, (line.options.bits_of(answer.choice) - floor) // step
            too_small = too_small if is_proved else -1
            is_proved = True
        elif (
            _loss(problem, line, answer.choice) - answer.unproved * problem.loss_unit <= loss_limit
        ):
            return None
        else:
            too_small, is_proved = tried, True
    return np.asarray(line.options.columns[np.arange(len(choice)), choice], dtype=np.int64)


def _bracket(problem: Problem, line: Line, loss_limit: float) -> tuple[Choice, int] | None:
    """A choice within the limit, a vertex of the hull, and a capacity that no choice keeps it in."""
    options, steps = line.options, line.steps
    groups = len(options.losses)
    first = _loss(problem, line, np.zeros(groups, dtype=np.int64)) / problem.loss_unit
    saved = np.concatenate([[0.0], np.cumsum(steps.savings * np.diff(steps.bits))])
    most = loss_limit / problem.loss_unit
    # Summed up, what is saved may fall short of itself by rounding.
    vertex = min(int(np.searchsorted(saved, first - most)), len(steps.savings))
    while vertex <= len(steps.savings):
        choice = steps.choice_after(vertex, groups)
        if _loss(problem, line, choice) <= loss_limit:
            break
        vertex += 1  # by rounding
    else:
        return None
    if vertex == 0:
        return choice, -1
    needed = (first - most - saved[vertex - 1]) / steps.savings[vertex - 1]
    exact = float(steps.bits[vertex - 1]) + max(needed, 0.0)
    return choice, math.ceil(exact * (1 - _ROUNDING)) - 1


def _loss(problem: Problem, line: Line, choice: Choice) -> float:
    """What a plan of these options says that it loses."""
    columns = problem.columns_of(choice, line.options.columns)
    return math.fsum(problem.scores[np.arange(len(columns)), columns])
