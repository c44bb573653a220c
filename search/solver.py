"""From sensitivity, costs and a budget to a plan, with the proof of how good it is."""

from __future__ import annotations

from collections.abc import Sequence

from autoq.errors import InputError
from autoq.formats import FormatName
from autoq.models import Assignment
from autoq.search._problem import Problem
from autoq.search._resources import as_budgets, without_repeats
from autoq.search._types import Budget, CostTable, Plan, Resource, SensitivityTable
from autoq.search.costs import check_budgets, effective_bits
from autoq.search.planner import Planner


def solve(
    sensitivity: SensitivityTable,
    costs: CostTable,
    budgets: float | Budget | Sequence[Budget],
    *,
    time_limit_seconds: float = 60.0,
    relative_gap: float = 0.0,
) -> Plan:
    """The assignment of least predicted loss that stays within all budgets.

    Exact up to floating point unless the time runs out; then the plan is the best one found, with
    its true bound and gap. Among formats of equal loss a group takes the one with fewer bits, and
    the plan does not depend on the order of groups or formats in the tables.

    Args:
        sensitivity: scores; cells that are NaN may not be taken.
        costs: costs and allowed formats of the same groups.
        budgets: one limit or several, each of another resource; a number is effective bits per
            weight, mean over all groups. A plan exceeds that only where the floor, copied from
            four printed decimals, was asked for; other limits are never exceeded, and may be
            above what any plan takes.
        time_limit_seconds: for HiGHS alone.
        relative_gap: a plan proven to be within this fraction of the least loss is good enough;
            1e-6 takes seconds for 100,000 groups.
    Raises:
        BudgetInfeasibleError: effective bits are below the floor or above the ceiling.
        ResourceInfeasibleError: another budget is below its floor, or the budgets cannot be met
            together.
        InputError: the tables do not belong together, a score is infinite, a group has no usable
            format, or a budget limits what the tables have no costs of.
    """
    return Planner(sensitivity, costs).solve(
        budgets, time_limit_seconds=time_limit_seconds, relative_gap=relative_gap
    )


def smallest(
    sensitivity: SensitivityTable,
    costs: CostTable,
    loss_limit: float,
    *,
    minimise: Resource = Resource.EFFECTIVE_BITS,
    budgets: float | Budget | Sequence[Budget] = (),
    time_limit_seconds: float = 60.0,
    relative_gap: float = 0.0,
) -> Plan:
    """The assignment that takes least of a resource while its predicted loss stays within a limit.

    Of several that take as little, the one of least predicted loss. The plan's `least` holds the
    proof for the resource; its `bound` and `gap` are, as always, those of the loss, among plans
    that take no more than this one. Its `budgets` are those given and what it takes itself.

    Args:
        sensitivity: scores, as for `solve`.
        costs: costs, as for `solve`.
        loss_limit: largest predicted loss, in the unit of the scores.
        minimise: what to take least of.
        budgets: limits that hold besides, as for `solve`, or none.
        time_limit_seconds: for HiGHS alone, in each of the two searches.
        relative_gap: what is proven to be within this fraction of the least is good enough.
    Raises:
        QualityInfeasibleError: no plan within the budgets has so low a loss; names the best.
        BudgetInfeasibleError, ResourceInfeasibleError: the budgets cannot be met, as for `solve`.
        InputError: the tables cannot be used, as for `solve`.
    """
    return Planner(sensitivity, costs).smallest(
        loss_limit,
        minimise=minimise,
        budgets=budgets,
        time_limit_seconds=time_limit_seconds,
        relative_gap=relative_gap,
    )


def plan_from_assignment(
    sensitivity: SensitivityTable,
    costs: CostTable,
    assignment: Assignment,
    budget_bits: float | None = None,
) -> Plan:
    """The plan of a given assignment, for comparison with a searched one.

    Args:
        sensitivity: scores, as for `solve`.
        costs: costs, as for `solve`.
        assignment: a usable format for every group.
        budget_bits: budget that the bound refers to; the bits of the assignment when None. The
            bound is that of the linear relaxation, which needs no search.
    Raises:
        InputError: the assignment misses a group, takes a format that its group may not, or goes
            over the budget.
    """
    problem = Problem(sensitivity=sensitivity, costs=costs)
    taken = effective_bits(costs, assignment)
    budget = taken if budget_bits is None else budget_bits
    if not taken <= budget:
        raise InputError(
            f"an assignment must stay within its budget, got {taken:.4f} effective bits for a "
            f"budget of {budget:g}; raise the budget or take smaller formats"
        )
    return problem.plan_of(assignment, budget)


def uniform_plan(sensitivity: SensitivityTable, costs: CostTable, format_name: FormatName) -> Plan:
    """Every group in one format, or where it may not take it, in the nearest one it may take.

    Nearest is the usable format with the fewest effective bits that are no fewer than those of
    `format_name`; failing that, the one with the most bits.

    Raises:
        InputError: the format is not in the table, or the tables cannot be used.
    """
    if format_name not in costs.formats:
        raise InputError(
            f"a uniform plan must take a format of the search ({', '.join(costs.formats)}), got "
            f"{format_name!r}; add it to --formats"
        )
    problem = Problem(sensitivity=sensitivity, costs=costs)
    wanted = costs.formats.index(format_name)
    assignment = {
        group: costs.formats[problem.nearest_usable(row, wanted)]
        for row, group in enumerate(costs.groups)
    }
    return problem.plan_of(assignment, effective_bits(costs, assignment))


def reachable_bits(sensitivity: SensitivityTable, costs: CostTable) -> tuple[float, float]:
    """Floor and ceiling of the budget: every group in its smallest, and in its largest format.

    Raises:
        InputError: the tables cannot be used, as for `solve`.
    """
    return Problem(sensitivity=sensitivity, costs=costs).reachable_bits


def check_budget(costs: CostTable, budgets: float | Budget | Sequence[Budget]) -> None:
    """Refuse budgets that no scores could make feasible, before any are measured.

    Each is looked at alone; whether all can be met together is for `solve`.

    Raises:
        BudgetInfeasibleError: effective bits are below the floor or above the ceiling.
        ResourceInfeasibleError: another budget is below its floor.
        InputError: there is no group, one may take no format, or a budget limits what the table
            has no costs of.
    """
    check_budgets(costs, without_repeats(as_budgets(budgets)))
