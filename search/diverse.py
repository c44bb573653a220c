"""Several plans that are all near the optimum and differ from one another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.search._cells import Limit
from autoq.search._knapsack import Answer, Tolerance
from autoq.search._problem import Problem
from autoq.search._relaxation import Choice
from autoq.search._resources import as_budgets, without_repeats
from autoq.search._types import Budget, CostTable, Plan, SensitivityTable
from autoq.search._within import (
    ask,
    choice_of,
    columns_in_table_order,
    limit_of,
    limiting_budgets,
    solve_within,
)

_RESAMPLES = 4
"""Bootstrap samples for each plan wanted: similar ones are left out."""

_MOST_RESAMPLES = 64

_RESAMPLE_GAP = 1e-3
"""How near to its own optimum a resampled plan is solved; the scores moved by much more."""


def diverse_plans(
    sensitivity: SensitivityTable,
    costs: CostTable,
    budgets: float | Budget | Sequence[Budget],
    *,
    count: int,
    loss_slack: float = 0.05,
    least_difference: float = 0.01,
    seed: int = 0,
    time_limit_seconds: float = 60.0,
) -> list[Plan]:
    """The optimum first, then plans that are nearly as good by the scores, and different.

    Candidates are the optima of scores from resampled sequences (Efron's bootstrap): they differ
    where the scores are uncertain, which is where measuring can tell them apart. Of these the one
    farthest from all taken so far is taken next. Where resampling gives too few, the least loss is
    searched among the plans that are far enough from all taken (no-good cuts).

    Every plan is within the budgets, its predicted loss at most `1 + loss_slack` times the first
    plan's, and any two give at least `least_difference` of the weights another format. There may be
    fewer than `count`: where such plans do not exist, or the time runs out. The same seed gives the
    same plans as long as it does not.

    Args:
        sensitivity: scores, as for `solve`.
        costs: costs, as for `solve`.
        budgets: as for `solve`.
        count: how many plans, at least 1.
        loss_slack: fraction of the optimum's predicted loss by which others may be above it.
        least_difference: fraction of the searched weights, above 0.
        seed: of the resampling.
        time_limit_seconds: for HiGHS alone, in each search.
    Raises:
        ValueError: `count` is below 1, `loss_slack` negative, or `least_difference` not in (0, 1].
        BudgetInfeasibleError, ResourceInfeasibleError, InputError: as `solve`.
    """
    _check(count, loss_slack, least_difference)
    problem = Problem(sensitivity=sensitivity, costs=costs)
    given = without_repeats(as_budgets(budgets))
    best = solve_within(
        problem, given, time_limit_seconds=time_limit_seconds, tolerance=Tolerance()
    )
    search = _Search(problem, given, best, loss_slack, least_difference, time_limit_seconds)
    resamples = min(_RESAMPLES * (count - 1), _MOST_RESAMPLES)
    search.take_farthest(search.resampled(resamples, seed), count)
    while len(search.taken) < count:
        further = search.least_loss_elsewhere()
        if further is None:
            break
        search.taken.append(further)
    return [best, *map(search.plan, search.taken[1:])]


class _Search:
    """What was taken, and what may still be."""

    def __init__(
        self,
        problem: Problem,
        budgets: tuple[Budget, ...],
        best: Plan,
        loss_slack: float,
        least_difference: float,
        seconds: float,
    ) -> None:
        self.problem, self.budgets, self.best, self.seconds = problem, budgets, best, seconds
        self.limits = [limit_of(problem, each) for each in limiting_budgets(problem, budgets)]
        self.scores = problem.scores[problem.rows]
        highest = best.predicted_loss + loss_slack * abs(best.predicted_loss)
        self.loss_limit = Limit(amounts=self.scores, most=highest)
        self.weights = problem.costs.weights[problem.rows]
        self.least_weights = max(int(np.ceil(least_difference * self.weights.sum())), 1)
        self.taken: list[Choice] = [choice_of(problem, best)]

    def resampled(self, count: int, seed: int) -> list[Choice]:
        """The optima of resampled scores that are good enough by the scores themselves."""
        generator = np.random.default_rng(seed)
        sequences = self.problem.contributions.shape[0]
        found = []
        for _ in range(count if sequences > 1 else 0):
            draws = generator.multinomial(sequences, np.full(sequences, 1 / sequences))
            choice = self._optimum_of(self._mean(draws / sequences))
            if choice is not None and self._good(choice):
                found.append(choice)
        return found

    def take_farthest(self, candidates: list[Choice], count: int) -> None:
        """Add candidates, always the one whose nearest taken plan is farthest."""
        while len(self.taken) < count and candidates:
            distances = [self._distance(choice) for choice in candidates]
            farthest = int(np.argmax(distances))
            if distances[farthest] < self.least_weights:
                return
            self.taken.append(candidates.pop(farthest))

    def least_loss_elsewhere(self) -> Choice | None:
        """The best of the plans that are far enough from all taken; None where none is good."""
        every = int(self.weights.sum())
        formats = np.arange(self.scores.shape[1])
        cuts = [
            Limit(
                amounts=np.where(formats == taken[:, None], self.weights[:, None], 0).astype(float),
                most=float(every - self.least_weights),
                whole=True,
            )
            for taken in self.taken
        ]
        objective = self.scores / self.problem.loss_unit
        limits = [*self.limits, self.loss_limit, *cuts]
        found = ask(
            self.problem, objective, limits, self.seconds, Tolerance(relative=_RESAMPLE_GAP)
        )
        return found.choice if isinstance(found, Answer) else None

    def plan(self, choice: Choice) -> Plan:
        """The plan of a choice, with the optimum's bound."""
        columns = columns_in_table_order(self.problem, choice)
        loss = self.problem.plan(columns, self.budgets, 0.0).predicted_loss
        return self.problem.plan(columns, self.budgets, max(loss - self.best.bound, 0.0))

    def _mean(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = np.tensordot(shares, self.problem.contributions, axes=1)[self.problem.rows]
        return np.asarray(mean / self.problem.loss_unit, dtype=np.float64)

    def _optimum_of(self, scores: NDArray[np.float64]) -> Choice | None:
        tolerance = Tolerance(relative=_RESAMPLE_GAP)
        found = ask(self.problem, scores, self.limits, self.seconds, tolerance, start=self.taken[0])
        return found.choice if isinstance(found, Answer) else None

    def _good(self, choice: Choice) -> bool:
        limits = [*self.limits, self.loss_limit]
        return all(limit.total(choice) <= limit.most for limit in limits)

    def _distance(self, choice: Choice) -> int:
        """Weights in another format than in the nearest plan taken."""
        return min(int(self.weights[choice != other].sum()) for other in self.taken)


def _check(count: int, loss_slack: float, least_difference: float) -> None:
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}")
    if not loss_slack >= 0.0:
        raise ValueError(f"loss_slack must be >= 0, got {loss_slack}")
    if not 0.0 < least_difference <= 1.0:
        raise ValueError(f"least_difference must be in (0, 1], got {least_difference}")
