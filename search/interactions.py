"""What formats of two groups do to the loss together, and plans that take it into account.

With p_gf the projection of a token's loss gradient on the output error of group g in format f, the
second-order estimate of a plan's loss is half the mean square of the summed projections,

    1/2 E[(sum_g p_g)^2] = sum_g 1/2 E[p_g^2] + sum_{g < g'} E[p_g p_g'].

The first sum are the scores. The second is what a sum of scores leaves out; its terms are means over
a few thousand tokens, noisy beside what they add, and so are shrunk by a weight. The objective is
that of CLADO (Deng et al., 2023), there from measured losses of pairs; here it costs no pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError
from autoq.formats import NONE, FormatName
from autoq.models import Assignment, GroupName
from autoq.search._cells import Limit
from autoq.search._knapsack import Tolerance
from autoq.search._local import LocalSearch
from autoq.search._problem import Problem
from autoq.search._resources import as_budgets, without_repeats
from autoq.search._types import Budget, CostTable, Least, Plan, SensitivityTable
from autoq.search._within import (
    choice_of,
    columns_in_table_order,
    limit_of,
    limiting_budgets,
    solve_within,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interactions:
    """Cross terms of every two cells, of the same groups and formats as the scores.

    `gram[g, f, h, e]` is the mean over tokens of the product of the two cells' projections, in
    nats per token: what group g in format f and group h in format e add to the loss beyond their
    scores. It is symmetric; cells of one and the same group are not read, and neither are cells
    that a group cannot take.
    """

    groups: tuple[GroupName, ...]
    formats: tuple[FormatName, ...]  # without "none", which interacts with nothing
    gram: NDArray[np.float64]  # [groups, formats, groups, formats]

    def __post_init__(self) -> None:
        shape = (len(self.groups), len(self.formats)) * 2
        if self.gram.shape != shape:
            raise InputError(
                f"interactions must be [groups, formats] twice, {shape}, got {self.gram.shape}; "
                "take them from the pass that made the scores"
            )

    @classmethod
    def from_projections(
        cls,
        groups: Sequence[GroupName],
        formats: Sequence[FormatName],
        projections: NDArray[np.float64],
    ) -> Interactions:
        """The mean products of projections [tokens, groups, formats], NaN where not allowed."""
        flat = np.nan_to_num(projections.reshape(len(projections), -1), nan=0.0)
        gram = (flat.T @ flat / len(flat)).reshape(projections.shape[1:] * 2)
        return cls(groups=tuple(groups), formats=tuple(formats), gram=gram)


def quadratic_loss(
    sensitivity: SensitivityTable,
    interactions: Interactions,
    assignment: Assignment,
    *,
    weight: float,
) -> float:
    """Expected loss of an assignment: its scores, and `weight` times the terms of all pairs.

    Raises:
        InputError: the tables do not belong together, a group has no format, or the weight is
            outside [0, 1].
    """
    _check(interactions, sensitivity, weight)
    rows = {name: row for row, name in enumerate(interactions.groups)}
    columns = {name: column for column, name in enumerate(interactions.formats)}
    taken = [
        (rows[group], columns[name]) for group, name in sorted(assignment.items()) if name != NONE
    ]
    scores = sensitivity.scores()
    score_rows = {name: row for row, name in enumerate(sensitivity.groups)}
    score_columns = {name: column for column, name in enumerate(sensitivity.formats)}
    own = [
        float(scores[score_rows[group], score_columns[name]])
        for group, name in assignment.items()
        if name != NONE
    ]
    if not taken:
        return 0.0
    first, second = np.array(taken).T
    pairs = interactions.gram[first[:, None], second[:, None], first[None, :], second[None, :]]
    return math.fsum([*own, *(weight * pairs[np.triu_indices(len(taken), 1)]).tolist()])


def improve(
    plan: Plan,
    interactions: Interactions,
    sensitivity: SensitivityTable,
    costs: CostTable,
    budgets: float | Budget | Sequence[Budget] | None = None,
    *,
    weight: float,
) -> Plan:
    """A plan whose loss with interactions is no higher, by changing one or two groups at a time.

    From the plan on, the change of one group that lowers the objective most, or where none does,
    the best change of two, is made as long as all budgets are kept. What comes back is a local
    optimum: no change of one or two groups within the budgets is better by more than rounding. It
    is the given plan itself where that is one already. `predicted_loss` stays the sum of scores,
    which is no lower than the linear optimum's, and `bound` and `gap` refer to it;
    `quadratic_loss` gives the objective. A limit on the loss that the plan was made for is kept;
    its proof, `least`, is of the plan's own budgets and left out for others.

    Args:
        plan: within the budgets.
        interactions: of all groups and formats of the costs.
        sensitivity: scores, as for `solve`.
        costs: costs, as for `solve`.
        budgets: as for `solve`; the plan's own when None.
        weight: of the interactions, from 0, which leaves them out, to 1.
    Raises:
        InputError: the tables do not belong together, the plan is over a budget or takes a cell
            that it may not, or the weight is outside [0, 1].
    """
    _check(interactions, sensitivity, weight)
    problem = Problem(sensitivity=sensitivity, costs=costs)
    given = plan.budgets if budgets is None else without_repeats(as_budgets(budgets))
    start = choice_of(problem, plan)
    limits = [limit_of(problem, budget) for budget in limiting_budgets(problem, given)]
    if plan.least is not None:
        scores = problem.scores[problem.rows]
        limits.append(Limit(amounts=scores, most=plan.least.loss_limit))
    _check_start(problem, plan, start, limits)
    found = LocalSearch(
        scores=problem.scores[problem.rows],
        pairs=weight * _in_order(problem, interactions),
        usable=problem.usable[problem.rows],
        limits=limits,
    ).from_choice(start)
    if np.array_equal(found, start) or not all(
        limit.total(found) <= limit.most for limit in limits
    ):
        return plan
    bound = plan.bound
    if set(given) != set(plan.budgets):
        bound = solve_within(
            problem, given, time_limit_seconds=0.0, tolerance=Tolerance(), start=start
        ).bound
    columns = columns_in_table_order(problem, found)
    better = problem.plan(columns, given, 0.0)
    better = problem.plan(columns, given, max(better.predicted_loss - bound, 0.0))
    before, after = (
        quadratic_loss(sensitivity, interactions, each.assignment, weight=weight)
        for each in (plan, better)
    )
    if not after < before:
        return plan
    return (
        better if set(given) != set(plan.budgets) else replace(better, least=_least(plan, better))
    )


def _least(plan: Plan, better: Plan) -> Least | None:
    """The proof of the plan that was improved, which may have taken more than the better one."""
    if plan.least is None:
        return None
    value = min(better.takes[plan.least.resource], plan.least.value)
    unproved = max(value - plan.least.bound, 0.0)
    return replace(plan.least, value=value, gap=unproved / value if unproved else 0.0)


def _check(interactions: Interactions, sensitivity: SensitivityTable, weight: float) -> None:
    if not 0.0 <= weight <= 1.0:
        raise InputError(f"the weight of interactions must be in [0, 1], got {weight:g}")
    for name in ("groups", "formats"):
        missing = set(getattr(sensitivity, name)) - set(getattr(interactions, name))
        if missing:
            raise InputError(
                f"interactions must have all {name} of the scores, got none for "
                f"{min(missing)!r}; take them from the same pass"
            )


def _check_start(
    problem: Problem, plan: Plan, start: NDArray[np.int64], limits: Sequence[Limit]
) -> None:
    refused = np.flatnonzero(~problem.usable[problem.rows][np.arange(len(start)), start])
    if refused.size:
        group = problem.costs.groups[int(problem.rows[refused[0]])]
        raise InputError(
            f"group {group!r} cannot take {plan.assignment[group]}; start from a plan of the same "
            "costs and rules"
        )
    if not all(limit.total(start) <= limit.most for limit in limits):
        raise InputError("a plan to improve must be within its budgets; solve with them first")


def _in_order(problem: Problem, interactions: Interactions) -> NDArray[np.float64]:
    """The gram as the costs order it: [groups, formats, groups, formats], by name, `none` zero."""
    rows = {name: row for row, name in enumerate(interactions.groups)}
    columns = {name: column for column, name in enumerate(interactions.formats)}
    order = [rows[problem.costs.groups[row]] for row in problem.rows]
    formats = problem.costs.formats
    scored = [index for index, name in enumerate(formats) if name != NONE]
    sources = [columns[formats[index]] for index in scored]
    shape = (len(order), len(formats))
    table = np.zeros((*shape, *shape))
    picked = interactions.gram[np.ix_(order, sources, order, sources)]
    table[np.ix_(range(len(order)), scored, range(len(order)), scored)] = picked
    return table
