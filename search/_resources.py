"""What plans take of each resource: cells, totals, limits, and how they are said."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError, ResourceInfeasibleError, rounded_up
from autoq.search._types import Budget, CostTable, Resource

_UNITS = {
    Resource.EFFECTIVE_BITS: "effective bits per weight",
    Resource.STORED_BYTES: "stored bytes",
    Resource.ACTIVE_BITS: "active bits per weight",
    Resource.LATENCY: "seconds of latency",
}
_BITS_PER_BYTE = 8


def known(costs: CostTable) -> tuple[Resource, ...]:
    """The resources that the table has costs of."""
    return tuple(item for item in Resource if is_whole(item) or item in costs.additional)


def is_whole(resource: Resource) -> bool:
    """Whether cells are integers, whose sums are exact in any order."""
    return resource in (Resource.EFFECTIVE_BITS, Resource.STORED_BYTES)


def cells(costs: CostTable, resource: Resource) -> NDArray[np.int64] | NDArray[np.float64]:
    """What each cell takes, [groups, formats]: bits where `is_whole`, else the resource's unit.

    Raises:
        InputError: the table has no costs of the resource.
    """
    if resource is Resource.EFFECTIVE_BITS:
        return costs.effective_bits
    if resource is Resource.STORED_BYTES:
        return costs.stored_bits
    if resource not in costs.additional:
        raise InputError(
            f"a budget may limit only what the cost table holds ({', '.join(known(costs))}), got "
            f"{resource.value}; build the costs with it first"
        )
    return costs.additional[resource]


def fixed(costs: CostTable, resource: Resource) -> float:
    """What is taken before anything is decided, in the resource's unit."""
    return float(costs.fixed.get(resource, 0.0))


def cells_per_unit(costs: CostTable, resource: Resource) -> int:
    """How much of `cells` makes one of the resource's unit."""
    if resource is Resource.EFFECTIVE_BITS:
        return int(costs.weights.sum())
    return _BITS_PER_BYTE if resource is Resource.STORED_BYTES else 1


def value(costs: CostTable, resource: Resource, taken: NDArray[np.generic]) -> float:
    """What a plan takes in all, in the resource's unit; `taken` is [groups], of `cells`.

    Sums are rounded once, so the order of the groups does not matter.
    """
    rest = fixed(costs, resource)
    if is_whole(resource):
        return int(taken.sum()) / cells_per_unit(costs, resource) + rest
    return math.fsum([*taken.tolist(), rest])


def capacity(costs: CostTable, budget: Budget) -> int:
    """Most that the cells of a whole resource may sum up to.

    It is the largest total whose value, as a floating-point number, is no more than the limit:
    asking for exactly what a known plan takes finds that plan.
    """
    per_unit, rest = cells_per_unit(costs, budget.resource), fixed(costs, budget.resource)
    total = math.floor((budget.limit - rest) * per_unit) + 1
    while total / per_unit + rest > budget.limit:
        total -= 1
    return total


def reach(costs: CostTable, resource: Resource, usable: NDArray[np.bool_]) -> tuple[float, float]:
    """Least and most that any plan takes; every group has a usable cell."""
    table = cells(costs, resource)
    most = np.iinfo(np.int64).max if is_whole(resource) else np.inf
    least_cells = np.where(usable, table, most).min(axis=1)
    most_cells = np.where(usable, table, -most).max(axis=1)
    return value(costs, resource, least_cells), value(costs, resource, most_cells)


def as_budgets(budgets: float | Budget | Sequence[Budget]) -> tuple[Budget, ...]:
    """Every way to state budgets as one; a plain number means effective bits per weight.

    Raises:
        InputError: there is no budget, or two of the same resource.
    """
    if isinstance(budgets, Budget):
        return (budgets,)
    if isinstance(budgets, int | float):
        return (Budget(resource=Resource.EFFECTIVE_BITS, limit=float(budgets)),)
    stated = tuple(budgets)
    if not stated:
        raise InputError("a plan must have at least one budget, got none; give effective bits")
    return without_repeats(stated)


def without_repeats(budgets: Iterable[Budget]) -> tuple[Budget, ...]:
    """The budgets in the order of resources.

    Raises:
        InputError: two of them limit the same resource.
    """
    stated = sorted(budgets, key=lambda budget: list(Resource).index(budget.resource))
    for budget, following in itertools.pairwise(stated):
        if budget.resource is following.resource:
            raise InputError(
                f"each resource may have one budget, got {budget.limit:g} and "
                f"{following.limit:g} for {budget.resource.value}; give the smaller one"
            )
    return tuple(stated)


def check_reachable(costs: CostTable, budget: Budget, usable: NDArray[np.bool_]) -> None:
    """Refuse a budget that no plan meets, whatever the other budgets are.

    Raises:
        ResourceInfeasibleError: it is below the least that the usable cells reach, or no number.
        InputError: the table has no costs of its resource.
    """
    least, _ = reach(costs, budget.resource, usable)
    if not budget.limit >= least:
        raise infeasible(budget, least)


def infeasible(budget: Budget, least: float, within: Sequence[Budget] = ()) -> Exception:
    """The refusal of a budget, with the least value that would do."""
    texts = spoken(budget.resource, budget.limit), spoken(budget.resource, least)
    return ResourceInfeasibleError(
        budget.resource.value, budget.limit, least, texts, spoken_together(within)
    )


def spoken_together(budgets: Sequence[Budget]) -> str:
    """Budgets as text."""
    return " and ".join(spoken(budget.resource, budget.limit) for budget in budgets)


def spoken(resource: Resource, amount: float) -> str:
    """An amount with its unit; as a budget it is no tighter than the amount itself."""
    if resource is Resource.STORED_BYTES and np.isfinite(amount):
        return f"{int(np.ceil(amount))} {_UNITS[resource]} ({rounded_up(amount / 1e9)} GB)"
    return f"{rounded_up(amount)} {_UNITS[resource]}"
