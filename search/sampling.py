"""Plans that nobody would choose, for judging how well predictions tell good plans from bad."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from autoq.errors import BudgetInfeasibleError, ResourceInfeasibleError
from autoq.formats import FormatName
from autoq.models import GroupName
from autoq.search._problem import Problem
from autoq.search._types import Budget, CostTable, Plan, Resource, SensitivityTable
from autoq.search.costs import effective_bits
from autoq.search.solver import reachable_bits, solve

RELATIVE_GAP = 1e-4
"""How near to the least loss a neighbour is proven to be: it need not be the best."""

_DRAWS = 50
_LARGEST_TILT = 40.0
_HALVINGS = 60


def random_plans(
    sensitivity: SensitivityTable, costs: CostTable, *, count: int, seed: int = 0
) -> list[Plan]:
    """Plans of random formats, their bits spread evenly from the smallest plan to the largest.

    The range of effective bits is cut into `count` equal parts, and each gives one plan. Formats
    are drawn independently for every group, with probabilities that fall or rise exponentially in
    the format's bits: of all distributions with the wanted mean that is the most random. What
    falls outside its part is drawn again; with few groups the nearest of 50 draws is taken.

    Args:
        seed: equal seeds give equal plans.
    """
    problem = Problem(sensitivity=sensitivity, costs=costs)
    generator = np.random.default_rng(seed)
    edges = np.linspace(*problem.reachable_bits, count + 1)
    return [
        _random_plan(problem, float(low), float(high), generator) for low, high in pairwise(edges)
    ]


def neighbours(
    sensitivity: SensitivityTable, costs: CostTable, plan: Plan, *, seed: int = 0
) -> Iterator[Plan]:
    """The best plans within the same budgets that differ from `plan` in one chosen group at least.

    One group after the other, in random order, is forced into a format that the plan does not
    give it, and the rest is solved again. Formats that leave no plan within the budgets are
    passed over. Plans may repeat.

    Args:
        plan: an optimal one.
        seed: of the order.
    """
    usable = Problem(sensitivity=sensitivity, costs=costs).usable
    generator = np.random.default_rng(seed)
    cells = np.argwhere(usable)
    for row, column in generator.permutation(cells):
        fmt = costs.formats[column]
        if plan.assignment[costs.groups[row]] == fmt:
            continue
        allowed = costs.allowed.copy()
        allowed[row] = [name == fmt for name in costs.formats]
        forced = replace(costs, allowed=allowed)
        budgets = _within_reach(sensitivity, forced, plan)
        try:
            yield solve(sensitivity, forced, budgets, relative_gap=RELATIVE_GAP)
        except (BudgetInfeasibleError, ResourceInfeasibleError):
            continue


def _within_reach(sensitivity: SensitivityTable, costs: CostTable, plan: Plan) -> list[Budget]:
    """The plan's budgets; of more bits than these formats can take, all that they can."""
    _, ceiling = reachable_bits(sensitivity, costs)
    asked = plan.budgets or (Budget(resource=Resource.EFFECTIVE_BITS, limit=plan.budget_bits),)
    return [
        replace(budget, limit=min(budget.limit, ceiling))
        if budget.resource is Resource.EFFECTIVE_BITS
        else budget
        for budget in asked
    ]


def _random_plan(problem: Problem, low: float, high: float, generator: np.random.Generator) -> Plan:
    wanted = generator.uniform(low, high)
    probabilities = _probabilities(problem, wanted)
    best: tuple[float, Mapping[GroupName, FormatName]] | None = None
    for _ in range(_DRAWS):
        assignment = _drawn(problem.costs, probabilities, generator)
        taken = effective_bits(problem.costs, assignment)
        distance = max(low - taken, taken - high, 0.0)
        if best is None or distance < best[0]:
            best = distance, assignment
        if distance == 0.0:
            break
    assert best is not None  # there is at least one draw
    return problem.plan_of(best[1], effective_bits(problem.costs, best[1]))


def _drawn(
    costs: CostTable, probabilities: NDArray[np.float64], generator: np.random.Generator
) -> dict[GroupName, FormatName]:
    below = probabilities.cumsum(axis=1)
    shares = generator.random(len(costs.groups)) * below[:, -1]
    columns = (below <= shares[:, None]).sum(axis=1)
    return {
        group: costs.formats[column] for group, column in zip(costs.groups, columns, strict=True)
    }


def _probabilities(problem: Problem, wanted_bits: float) -> NDArray[np.float64]:
    """[groups, formats]: those of independent draws whose expected bits are `wanted_bits`."""
    costs = problem.costs
    bits = costs.effective_bits / costs.weights[:, None]
    share = costs.weights / costs.weights.sum()
    low, high = -_LARGEST_TILT, _LARGEST_TILT
    for _ in range(_HALVINGS):
        tilt = (low + high) / 2
        probabilities = _tilted(bits, problem.usable, tilt)
        expected = float((share[:, None] * probabilities * bits).sum())
        low, high = (tilt, high) if expected < wanted_bits else (low, tilt)
    return _tilted(bits, problem.usable, (low + high) / 2)


def _tilted(
    bits: NDArray[np.float64], usable: NDArray[np.bool_], tilt: float
) -> NDArray[np.float64]:
    exponents = np.where(usable, tilt * bits, -np.inf)
    weights = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float64)
