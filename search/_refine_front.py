"""Refining a whole frontier: loss against bits, with the budget itself among what is tried."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autoq.errors import InputError
from autoq.models import Assignment
from autoq.search._refine_space import Space
from autoq.search._refine_strategies import key, next_scores, posterior_of
from autoq.search._refine_types import Proposal, Source, Suggest, Trial
from autoq.search._resources import as_budgets, without_repeats
from autoq.search._types import Budget, CostTable, Resource, SensitivityTable
from autoq.search.costs import effective_bits

BITS_PARAMETER = "effective_bits"
"""What a budget is suggested under."""


class FrontRefinement:
    """Which plans to measure for a frontier of measured loss against effective bits.

    The sampler (NSGA-II, TPE or GP, with two objectives) suggests the budget of each trial, and the
    knapsack is solved for it with what all trials so far say of the losses. Plans of all budgets
    share what is learnt.
    """

    def __init__(
        self,
        sensitivity: SensitivityTable,
        costs: CostTable,
        bits: tuple[float, float],
        budgets: Budget | Sequence[Budget] = (),
        *,
        seed: int = 0,
    ) -> None:
        """
        Args:
            sensitivity: predicted losses, as for `solve`.
            costs: costs, as for `solve`.
            bits: least and most effective bits per weight.
            budgets: of other resources, which every plan stays within, or none.
            seed: of everything that is drawn.
        Raises:
            InputError: the range is empty, or a budget is of effective bits, too.
            BudgetInfeasibleError, ResourceInfeasibleError, InputError: as `solve`, for either end.
        """
        low, high = bits
        if not low < high:
            raise InputError(
                f"a range of bits must rise, got {low:g} to {high:g}; give the smaller one first"
            )
        others = () if isinstance(budgets, Sequence) and not budgets else as_budgets(budgets)
        self._others, self._bits, self._seed = others, (low, high), seed
        Space.of(sensitivity, costs, self._budgets(high))
        self._space = Space.of(sensitivity, costs, self._budgets(low))

    def propose(
        self,
        finished: Sequence[Trial],
        running: Sequence[Assignment],
        number: int,
        suggest: Suggest,
    ) -> Proposal | None:
        """The plan to measure next; None where all plans near the suggested budget are known.

        As `Refinement.propose`; `suggest` is asked once, for "effective_bits".
        """
        history = sorted(finished, key=lambda trial: trial.number)
        known = [*(trial.assignment for trial in history), *running]
        taken = {key(self._space.columns(assignment)) for assignment in known}
        target = min(max(suggest(BITS_PARAMETER, *self._bits), self._bits[0]), self._bits[1])
        generator = np.random.default_rng([self._seed, number])
        posterior = posterior_of(self._space, history)
        for width, scores in next_scores(self._space, posterior, generator):
            plan = self._space.best_within(self._budgets(target), scores)
            if key(self._space.columns(plan.assignment)) not in taken:
                details = {"target_bits": target, "width": width}
                return Proposal(plan=plan, source=Source.FRONT, details=details)
        return None

    def _budgets(self, bits: float) -> tuple[Budget, ...]:
        stated = Budget(resource=Resource.EFFECTIVE_BITS, limit=bits)
        return without_repeats((stated, *self._others))


def measured_front(finished: Sequence[Trial], costs: CostTable) -> list[Trial]:
    """The trials that no other beats in both measured loss and effective bits, by rising bits.

    Of equal ones the first counts. Trials stopped early or failed are left out.
    """
    complete = [trial for trial in finished if trial.complete and trial.measured]
    by_bits = sorted(
        complete,
        key=lambda trial: (effective_bits(costs, trial.assignment), trial.loss, trial.number),
    )
    front: list[Trial] = []
    for trial in by_bits:
        if not front or trial.loss < front[-1].loss:
            front.append(trial)
    return front
