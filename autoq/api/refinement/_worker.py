"""One worker of a refinement: takes trials, as many as are left, and measures their plans."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np

from autoq.api.refinement._optuna import SAMPLER_STATE, few_words
from autoq.api.refinement._trials import (
    FAILURE,
    LOSSES,
    PLAN,
    POSITION,
    SOURCE,
    SURPLUS,
    VIOLATES,
    DeadTrials,
    History,
    best_complete,
    broken_by_the_start,
    check_start,
    plan_text,
    read_history,
)
from autoq.api.refinement.measure import Measured, TrialMeasurer
from autoq.errors import EvaluationError
from autoq.evaluators.estimate import bootstrap_interval
from autoq.formats import FormatName
from autoq.models import Assignment, GroupName
from autoq.search.refine import FrontRefinement, Proposal, Refinement, Source
from autoq.studies import SEALED, WORKER, trial_seal, worker_identity

if TYPE_CHECKING:
    from optuna import Trial as OptunaTrial
    from optuna.study import Study as Trials

    from autoq.api.refinement._sampler import MultiplierSampler

EXHAUSTED = "exhausted"
"""User attribute of the Optuna study: nothing was left to try after so many trials."""

_POLL_SECONDS = 0.5
_SECOND_THOUGHTS = 3
_MOST_ATTEMPTS = 10


Proposer: TypeAlias = Refinement | FrontRefinement


class _NothingToDoError(Exception):
    """A trial was begun that nobody needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOrder:
    """What a worker is to do, beside its model."""

    trials: int
    prune: bool
    against_bits: bool = False
    original: Mapping[str, float] = field(default_factory=dict)  # metrics of the original model


class Worker:
    """Measures plans until the refinement has all its trials."""

    def __init__(
        self,
        trials: Trials,
        refinement: Proposer,
        measurer: TrialMeasurer,
        sampler: MultiplierSampler,
        order: WorkOrder,
        *,
        advance: Callable[[], None] = lambda: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            trials: the Optuna study that all workers share.
            advance: called whenever a batch was measured, or a moment was spent waiting.
            note: told of trials that failed.
        """
        self._trials, self._refinement, self._measurer = trials, refinement, measurer
        self._sampler, self._order = sampler, order
        self._advance, self._note = advance, note
        self._dead = DeadTrials(trials)
        # Where the sampler asks for a budget whose plans are all known, it may ask for another.
        self._has_result = False  # of the trial at hand
        self._finished_when_idle = -1  # trials, when nothing was left to try beside those running
        self._attempts = 1 if isinstance(refinement, Refinement) else _MOST_ATTEMPTS

    def run(self) -> None:
        """Take trials until there are as many as are wanted, and none is unfinished.

        Trials that other workers are measuring are waited for: one that dies leaves its trial.

        Raises:
            InputError: the start cannot be measured, here or by another worker.
        """
        with few_words():
            while True:
                check_start(self._trials)
                self._dead.bring_back()
                history = read_history(self._trials)
                wanted = history.waiting or (
                    history.counted < self._order.trials and not self._is_exhausted(history.counted)
                )
                if wanted and not self._waits_for_news(history):
                    self._take_one()
                elif not history.unfinished:
                    return
                else:
                    time.sleep(_POLL_SECONDS)
                    self._advance()

    def _waits_for_news(self, history: History) -> bool:
        """Whether nothing was left to try, and nothing has been learnt since."""
        is_news = len(history.finished) != self._finished_when_idle
        return bool(history.unfinished) and not history.waiting and not is_news

    def _take_one(self) -> None:
        """Measure one trial.

        One whose worker was silent for too long, in a machine that slept, is tried again by
        others; then its own result comes too late, and Optuna refuses it in several ways.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        self._has_result = False
        try:
            self._trials.optimize(
                self._objective, n_trials=1, catch=(EvaluationError, _NothingToDoError)
            )
        except UpdateFinishedTrialError:
            self._note("a trial was silent for too long and is tried again")
        except (ValueError, AssertionError):
            if not self._has_result:
                raise
            self._note("a trial was silent for too long and is tried again")

    def _is_exhausted(self, counted: int) -> bool:
        return bool(self._trials.user_attrs.get(EXHAUSTED) == counted)

    def _objective(self, trial: OptunaTrial) -> float | tuple[float, float]:
        import optuna

        trial.set_user_attr(WORKER, worker_identity())
        if PLAN not in trial.user_attrs:
            self._choose(trial)
        plan = json.loads(trial.user_attrs[PLAN])
        assignment = {GroupName(group): FormatName(fmt) for group, fmt in plan.items()}
        measured = self._measured(trial, assignment)
        self._record(trial, measured)
        self._has_result = True
        if not measured.complete:
            _seal(trial, None)
            raise optuna.TrialPruned(f"hopeless after {len(measured.losses)} sequences")
        self._judge(trial, measured)
        if self._order.against_bits:
            bits = trial.user_attrs["effective_bits"]
            _seal(trial, (measured.loss, bits))
            return measured.loss, bits
        _seal(trial, (measured.loss,))
        return measured.loss

    # What to measure

    def _choose(self, trial: OptunaTrial) -> None:
        history = read_history(self._trials, before=trial.number)
        position = trial.user_attrs.get(POSITION, history.counted)
        if position >= self._order.trials:
            self._give_up(trial, "there were enough trials")
        trial.set_user_attr(POSITION, position)
        for _ in range(_SECOND_THOUGHTS):
            proposal = self._proposal(trial, position)
            if not self._is_running_elsewhere(trial, proposal):
                break

    def _proposal(self, trial: OptunaTrial, position: int) -> Proposal:
        history = read_history(self._trials, before=trial.number)
        self._sampler.begin(position, history.attempts.get(position, 0))
        proposal = self._refinement.propose(
            history.finished, history.running, position, trial.suggest_float
        )
        if proposal is None:
            attempts = history.attempts.get(position, 0) + 1
            if not history.running and attempts >= self._attempts:
                self._trials.set_user_attr(EXHAUSTED, history.counted)
            if history.running:
                self._finished_when_idle = len(history.finished)
            self._give_up(trial, "nothing was left to try")
        _describe(trial, proposal)
        if self._sampler.state:
            trial.set_user_attr(SAMPLER_STATE, json.dumps(self._sampler.state))
        # Last: a trial that has its plan has everything that trying it again needs.
        trial.set_user_attr(PLAN, plan_text(proposal.plan.assignment))
        return proposal

    def _is_running_elsewhere(self, trial: OptunaTrial, proposal: Proposal) -> bool:
        """Whether a worker that looked at the same moment took the same plan."""
        running = read_history(self._trials, before=trial.number).running
        return dict(proposal.plan.assignment) in [dict(other) for other in running]

    def _give_up(self, trial: OptunaTrial, reason: str) -> NoReturn:
        trial.set_user_attr(SURPLUS, reason)
        raise _NothingToDoError(reason)

    # Measuring

    def _measured(self, trial: OptunaTrial, assignment: Assignment) -> Measured:
        finished = read_history(self._trials, before=trial.number).finished
        if broken_by_the_start(self._trials):
            # Its loss is no reason to stop a plan that may keep what the start breaks.
            finished = tuple(each for each in finished if each.source is not Source.START)
        best = best_complete(finished)

        def stop(so_far: Sequence[float]) -> bool:
            if self._order.against_bits:  # every budget has its own best
                return False
            trial.report(float(np.mean(so_far)), step=len(so_far))
            if best is None or not self._order.prune:
                return False
            return isinstance(self._refinement, Refinement) and self._refinement.hopeless(
                best.losses, so_far
            )

        try:
            return self._measurer.measure(assignment, stop=stop, advance=self._advance)
        except EvaluationError as error:
            trial.set_user_attr(FAILURE, str(error))
            self._note(f"trial {trial.number} failed: {error}")
            raise

    def _record(self, trial: OptunaTrial, measured: Measured) -> None:
        divergences = np.asarray(measured.kl_per_sequence)
        value = float(divergences.mean())
        low, high = bootstrap_interval(divergences)
        predicted = trial.user_attrs["predicted_loss"]
        found: dict[str, Any] = {
            "kl_divergence": value,
            "kl_low": low,
            "kl_high": high,
            "measured_over_predicted": value / predicted if predicted else None,
            "sequences": len(measured.losses),
            LOSSES: json.dumps(measured.losses),
        }
        for name, entry in found.items():
            trial.set_user_attr(name, entry)

    def _judge(self, trial: OptunaTrial, measured: Measured) -> None:
        """Note the metrics, and which constraints the plan breaks."""
        trial.set_user_attr("metrics", json.dumps(dict(measured.metrics)))
        excess = self._measurer.metrics.violations(measured.metrics, self._order.original)
        for name, value in excess.items():
            trial.set_constraint(name, value)
        broken = [name for name, value in excess.items() if value > 0]
        if broken:
            trial.set_user_attr(VIOLATES, json.dumps(broken))


def _seal(trial: OptunaTrial, values: Sequence[float] | None) -> None:
    trial.set_user_attr(SEALED, trial_seal(trial.user_attrs, trial.params, values))


def _describe(trial: OptunaTrial, proposal: Proposal) -> None:
    plan = proposal.plan
    known: dict[str, Any] = {
        SOURCE: proposal.source.value,
        "effective_bits": plan.effective_bits,
        "stored_bytes": plan.stored_bytes,
        "predicted_loss": plan.predicted_loss,
        "details": json.dumps(dict(proposal.details)),
    }
    for name, entry in known.items():
        trial.set_user_attr(name, entry)
