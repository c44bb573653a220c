"""Plans that a few measured trials find, from the plan that scores lead to on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoq.api import Study
    from autoq.models import Assignment
    from autoq.search import Plan
    from autoq.search.refine import Refinement, Trial

SEED = 0
CACHE_BYTES = 1 << 30
"""For quantised weights and outputs of blocks that trials share, twice."""


@dataclass(frozen=True, slots=True)
class Refined:
    """What refinement made of a plan."""

    kept: Assignment  # the start, where no other was significantly better on fresh tokens
    best: Assignment  # of the finalists the one of least loss on fresh tokens, sure or not
    trials: int
    stopped_early: int


class Refiner:
    """Refines any number of plans of a study, on the same tokens.

    Trials are measured on the first of the calibration's sequences, the few best again on fresh
    sequences of the same text that nothing was calibrated, scored or chosen by.
    """

    def __init__(self, study: Study, *, trials: int, sequences: int, fresh: int) -> None:
        """
        Args:
            trials: for every plan, the plan itself among them.
            sequences: that trials are measured on.
            fresh: sequences that the finalists are measured on.
        """
        from autoq.api.refinement.measure import TrialMeasurer
        from autoq.data.sources import token_data
        from autoq.evaluators import parse_objective

        self._study, self._trials = study, trials
        objective = parse_objective("kl")
        used = study.config.calibration_sequences
        more = self._tokens(used + fresh)
        self._chosen_on = TrialMeasurer(
            study, self._tokens(sequences), objective, cache_bytes=CACHE_BYTES
        )
        fresh_tokens = token_data(more.ids[used:], f"{more.description}, not calibrated on")
        self._confirmed_on = TrialMeasurer(study, fresh_tokens, objective, cache_bytes=CACHE_BYTES)

    def _tokens(self, sequences: int) -> Any:
        from autoq.api.task import load_data

        config = self._study.config
        return load_data(
            self._study.loaded(),
            config.calibration_data,
            sequences=sequences,
            sequence_length=config.sequence_length,
            split="calibration",
            seed=config.seed,
        )

    def refine(self, start: Plan) -> Refined:
        """The best plan within the start's budgets that was found."""
        from autoq.search.refine import Refinement, accepted

        refinement = Refinement(
            self._study.sensitivity,
            self._study.costs(),
            start.budgets,
            start,
            trials=self._trials,
            seed=SEED,
        )
        with self._chosen_on:
            finished = self._measured_trials(refinement)
        finalists = refinement.finalists(finished)
        with self._confirmed_on:
            losses = [self._confirmed_on.measure(trial.assignment).losses for trial in finalists]
        sure = [
            number
            for number in range(1, len(finalists))
            if accepted(losses[0], losses[number], candidates=len(finalists) - 1)
        ]

        def loss(number: int) -> float:
            return sum(losses[number])

        return Refined(
            kept=finalists[min(sure, key=loss, default=0)].assignment,
            best=finalists[min(range(len(finalists)), key=loss)].assignment,
            trials=len(finished),
            stopped_early=sum(not trial.complete for trial in finished),
        )

    def _measured_trials(self, refinement: Refinement) -> list[Trial]:
        import optuna

        from autoq.search.refine import Trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SEED))
        finished: list[Trial] = []
        for number in range(self._trials):
            asked = sampler.ask()
            proposal = refinement.propose(finished, [], number, asked.suggest_float)
            if proposal is None:
                break
            found = self._measured(refinement, proposal.plan, finished)
            sampler.tell(asked, found.loss)
            finished.append(
                Trial(
                    number=number,
                    source=proposal.source,
                    assignment=proposal.plan.assignment,
                    losses=found.losses,
                    complete=found.complete,
                )
            )
        return finished

    def _measured(self, refinement: Refinement, plan: Plan, finished: list[Trial]) -> Any:
        complete = [trial for trial in finished if trial.complete]
        if not complete:
            return self._chosen_on.measure(plan.assignment)
        best = min(complete, key=lambda trial: trial.loss).losses
        return self._chosen_on.measure(
            plan.assignment, stop=lambda so_far: refinement.hopeless(best, so_far)
        )
