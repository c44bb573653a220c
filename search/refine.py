"""Refining a plan by measuring: which plan to measure next, and whether to believe what was found.

A plan that is optimal by predicted losses is only as good as the predictions. Refinement spends a
budget of evaluations (the real loss of whole plans, on the same sequences every time) on plans that
may be better: the start, diverse near-optimal plans, exchanges of formats round the best plan, and
optima of scores with other weights for layer types and depths. What wins on the tokens that it was
chosen by must win again on fresh ones before it is accepted.

Nothing here runs a model or keeps state: whoever does keeps the trials, and asks for the next plan.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np

from autoq.errors import InputError
from autoq.models import Assignment
from autoq.search import _refine_stopping
from autoq.search._refine_front import FrontRefinement, measured_front
from autoq.search._refine_posterior import Posterior
from autoq.search._refine_space import Space
from autoq.search._refine_stopping import Verdict, accepted
from autoq.search._refine_strategies import (
    diverse,
    exchange,
    first_new,
    key,
    multiplied,
    observations,
    posterior_of,
    reference_of,
)
from autoq.search._refine_types import Proposal, Source, Suggest, Trial
from autoq.search._resources import as_budgets, without_repeats
from autoq.search._types import Budget, CostTable, Plan, SensitivityTable

__all__ = [
    "EVERY_STRATEGY",
    "FrontRefinement",
    "Proposal",
    "Refinement",
    "Source",
    "Suggest",
    "Trial",
    "Verdict",
    "accepted",
    "measured_front",
]

EVERY_STRATEGY = (Source.DIVERSE, Source.SWAP, Source.MULTIPLIERS)

_FINALISTS = 3
"""Trials worth measuring on fresh tokens, the start included."""

_DIVERSE_SHARE, _MOST_DIVERSE = 0.1, 6
"""Of the trials, when other strategies are there: they tell apart what the scores cannot."""

_MOST_DIVERSE_ALONE = 32

_PATIENCE = 0.9
"""By which what a strategy gained counts less with every trial since."""

_USUAL_GAIN = {Source.SWAP: 4e-3, Source.MULTIPLIERS: 1e-3}
"""Fractions of the start's loss: the ratio in which trials are shared while none gains."""


class Refinement:
    """Which plans to measure, so that a budget of evaluations finds a better one."""

    def __init__(
        self,
        sensitivity: SensitivityTable,
        costs: CostTable,
        budgets: float | Budget | Sequence[Budget],
        start: Plan,
        *,
        trials: int,
        seed: int = 0,
        noise_floor: float = 0.0,
        strategies: Collection[Source] = EVERY_STRATEGY,
    ) -> None:
        """
        Args:
            sensitivity: predicted losses, as for `solve`.
            costs: costs, as for `solve`.
            budgets: what every proposed plan stays within, as for `solve`.
            start: the plan to refine; within the budgets. It is the first proposal.
            trials: evaluations to spend, the start's included.
            seed: of everything that is drawn.
            noise_floor: difference of losses that means nothing, in the objective's unit.
            strategies: what to take proposals from, besides the start.
        Raises:
            InputError: there are no trials, no strategy, or an unknown one, or the start is not
                within the budgets.
            BudgetInfeasibleError, ResourceInfeasibleError, InputError: as `solve`.
        """
        _check(trials, strategies)
        self._space = Space.of(sensitivity, costs, without_repeats(as_budgets(budgets)))
        self._space.check(start)
        self._start, self._trials, self._seed = start, trials, seed
        self._noise_floor = noise_floor
        self._strategies = [source for source in EVERY_STRATEGY if source in set(strategies)]

    @property
    def start(self) -> Plan:
        """The plan to refine."""
        return self._start

    def propose(
        self,
        finished: Sequence[Trial],
        running: Sequence[Assignment],
        number: int,
        suggest: Suggest,
    ) -> Proposal | None:
        """The plan to measure next; None when nothing is left to try.

        A pure function of its arguments and the seed: the same history gives the same proposal, as
        long as no time limit of the solver is reached. Never a plan that is finished or running.

        Args:
            finished: trials so far, failed ones (without losses) included, in any order.
            running: assignments that other workers are measuring.
            number: of the trial that the plan is for; what is drawn depends on it.
            suggest: asked only when the proposal's source is MULTIPLIERS.
        """
        history = sorted(finished, key=lambda trial: trial.number)
        known = [*(trial.assignment for trial in history), *running]
        taken = {key(self._space.columns(assignment)) for assignment in known}
        if key(self._space.columns(self._start.assignment)) not in taken:
            return Proposal(plan=self._start, source=Source.START)
        for source in self._order(history, len(known)):
            found = self._proposal_of(source, history, taken, number, suggest)
            if found is not None:
                return found
        return None

    def hopeless(self, best: Sequence[float], so_far: Sequence[float]) -> bool:
        """Whether a trial may be stopped: it will hardly be better than the best one.

        A trial that would turn out better is stopped with a chance of at most 1 %, however often
        this is asked: differences to the best trial are tested on four prefixes of the sequences,
        with Student's t and the error shared among them.

        Args:
            best: losses of the best complete trial, one per sequence.
            so_far: of the trial at hand, the first sequences of the same.
        """
        return _refine_stopping.hopeless(best, so_far)

    def finalists(self, finished: Sequence[Trial]) -> list[Trial]:
        """The few trials worth measuring on fresh tokens: the start, then others, best first.

        At most two others, which are expected to be better than the start by more than the noise
        floor: the measured difference, shrunk by what all trials together say. Empty as long as
        the start was not measured.
        """
        history = sorted(finished, key=lambda trial: trial.number)
        reference = reference_of(history)
        if reference is None or reference.source is not Source.START:
            return []
        promising = sorted(
            (
                (difference, trial.number, trial)
                for difference, trial in self._expected_differences(history)
                if trial.complete and difference < -self._noise_floor
            ),
            key=lambda entry: entry[:2],
        )
        return [reference, *(trial for _, _, trial in promising[: _FINALISTS - 1])]

    def _expected_differences(self, history: Sequence[Trial]) -> list[tuple[float, Trial]]:
        found = observations(self._space, history)
        if found is not None:
            measured, trials = found
            differences = Posterior(self._space.prior, measured).plan_differences().tolist()
            return list(zip(differences, trials[1:], strict=True))
        reference = reference_of(history)
        assert reference is not None  # the caller has looked
        others = [trial for trial in history if trial is not reference and trial.measured]
        return [(trial.loss - reference.loss, trial) for trial in others]

    # Proposals

    def _proposal_of(
        self,
        source: Source,
        history: Sequence[Trial],
        taken: set[bytes],
        number: int,
        suggest: Suggest,
    ) -> Proposal | None:
        generator = np.random.default_rng([self._seed, number])
        if source is Source.DIVERSE:
            return first_new(self._space, self._diverse, taken)
        if source is Source.MULTIPLIERS:
            return multiplied(self._space, taken, suggest, generator)
        posterior = posterior_of(self._space, history)
        return exchange(self._space, posterior, self._incumbent(history), taken, generator)

    @cached_property
    def _diverse(self) -> list[Plan]:
        count = min(self._trials, _MOST_DIVERSE_ALONE)
        if len(self._strategies) > 1:
            count = min(1 + round(_DIVERSE_SHARE * self._trials), _MOST_DIVERSE)
        return diverse(self._space, count, self._seed)

    def _incumbent(self, history: Sequence[Trial]) -> Plan:
        complete = [trial for trial in history if trial.complete and trial.measured]
        if not complete:
            return self._start
        best = min(complete, key=lambda trial: (trial.loss, trial.number))
        return self._space.plan(self._space.columns(best.assignment), self._space.budgets)

    def _order(self, history: Sequence[Trial], proposed: int) -> list[Source]:
        """The strategies, the most promising first: diverse plans, then what gains per trial."""
        gains = _recent_gains(history)
        spent = {source: sum(trial.source is source for trial in history) for source in gains}

        def promise(source: Source) -> float:
            return (gains[source] + _USUAL_GAIN[source]) / (1 + spent[source])

        others = [source for source in self._strategies if source is not Source.DIVERSE]
        ordered = sorted(others, key=promise, reverse=True)
        return [source for source in self._strategies if source is Source.DIVERSE] + ordered


def _recent_gains(history: Sequence[Trial]) -> dict[Source, float]:
    """By how much each strategy lowered the least loss, as fractions; old gains count less."""
    gains = dict.fromkeys(_USUAL_GAIN, 0.0)
    best = None
    for trial in history:
        gains = {source: _PATIENCE * gain for source, gain in gains.items()}
        if not trial.complete or not trial.measured:
            continue
        if best is not None and trial.loss < best and trial.source in gains:
            gains[trial.source] += (best - trial.loss) / abs(best)
        best = trial.loss if best is None else min(best, trial.loss)
    return gains


def _check(trials: int, strategies: Collection[Source]) -> None:
    if trials < 1:
        raise InputError(f"a refinement must have at least one trial, got {trials}; allow more")
    unknown = [source for source in strategies if source not in EVERY_STRATEGY]
    if unknown or not strategies:
        raise InputError(
            "a refinement must take proposals from some of "
            f"{', '.join(source.value for source in EVERY_STRATEGY)}, got "
            f"{', '.join(map(str, strategies)) or 'none'}; leave strategies out to use all"
        )
