"""The smallest plan whose measured divergence keeps a limit.

The solver limits the predicted loss, the user the real one. So a plan is solved for, measured, and
solved for again with a predicted limit that is corrected by the ratio of the two, until the
measured divergence is near the limit from below, or nothing is left in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autoq.api.budgets import Budgets
from autoq.api.measured import KL_DIVERGENCE
from autoq.api.measuring import PlanMeasurer
from autoq.api.study import Study
from autoq.api.task import LoadedModel
from autoq.data import TokenData
from autoq.errors import InputError, QualityInfeasibleError
from autoq.models.forward import output_kind
from autoq.progress import Progress
from autoq.search import Plan
from autoq.studies import PlanRecord

MOST_MEASUREMENTS = 8
"""After so many the smallest of the plans that keep the limit is taken."""

NEAR_ENOUGH = 0.95
"""With a measured divergence of this share of the limit, nothing smaller is looked for."""

_MOST_SOLVES = 40
_NARROW = 1.01
"""Predicted limits that differ by less than this factor hardly hold another plan between them."""

_ABOVE_ROUNDING = 1.0 + 1e-9
"""More than sums of losses differ by with the order of their terms."""

_FACTOR = 4.0
"""How far a predicted limit moves at once while nothing is known of that side."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was measured."""

    plan: PlanRecord
    predicted: float  # nats per token
    measured: float  # mean, nats per token


def check_measurable(loaded: LoadedModel) -> None:
    """Refuse a limit on divergence for models without one.

    Raises:
        InputError: the model predicts no tokens.
    """
    if output_kind(loaded.model) != "logits":
        raise InputError(
            f"max_kl limits the divergence of predicted tokens, and {type(loaded.model).__name__} "
            "gives hidden states; give a budget in bits or bytes"
        )


def smallest_that_keeps(
    study: Study,
    budgets: Budgets,
    rules: Sequence[str],
    held_out: TokenData,
    progress: Progress,
) -> PlanRecord:
    """The plan of fewest effective bits whose measured mean divergence is at most `max_kl`.

    Every plan that is tried is stored with its measurement, and is not measured again when the
    same search is repeated.

    Raises:
        QualityInfeasibleError: no plan that was measured keeps the limit, that of least predicted
            loss among them; says what the best of them loses.
    """
    assert budgets.max_kl is not None
    trials = _Trials(study, budgets, rules, held_out, progress)
    with PlanMeasurer(study, held_out) as measurer:
        _close_in(_Bracket(budgets.max_kl, trials.largest_loss), trials, measurer)
        if not any(trial.measured <= budgets.max_kl for trial in trials.done):
            trials.run_most_faithful(measurer)
        measurer.noise_floor(progress)
    kept = [trial for trial in trials.done if trial.measured <= budgets.max_kl]
    if not kept:
        best = min(trial.measured for trial in trials.done)
        raise QualityInfeasibleError(budgets.max_kl, best, trials.within, measured=True)
    chosen = min(kept, key=lambda trial: (trial.plan.effective_bits, trial.measured))
    progress.note(
        f"KL divergence {chosen.measured:.4g} measured, at most {budgets.max_kl:g} wanted, at "
        f"{chosen.plan.effective_bits:.4f} effective bits; plans measured: {len(trials.done)}"
    )
    return chosen.plan


def _close_in(bracket: _Bracket, trials: _Trials, measurer: PlanMeasurer) -> None:
    """Try plans until nothing smaller is left to find.

    Where no plan is predicted to lose so little as the limit, predictions may be too high: then the
    plan of least predicted loss says by how much, and the search goes on from there.
    """
    for _ in range(_MOST_SOLVES):
        if bracket.is_closed or len(trials.done) >= MOST_MEASUREMENTS:
            return
        trial = trials.run(measurer, bracket.limit)
        if trial is None:
            trial = trials.run_most_faithful(measurer)
            if trial.measured > bracket.max_kl:
                return
            bracket.limit = trial.predicted * _ABOVE_ROUNDING
        bracket.add(trial)


@dataclass
class _Trials:
    """Solves and measures, each assignment once."""

    study: Study
    budgets: Budgets
    rules: Sequence[str]
    held_out: TokenData
    progress: Progress
    done: list[Trial] = field(default_factory=list)
    within: str = ""  # the budgets that the best reachable quality depends on

    @property
    def largest_loss(self) -> float:
        """More than any plan is predicted to lose."""
        scores = self.study.sensitivity.scores()
        largest = np.where(np.isfinite(scores), scores, 0.0).max(axis=1).sum()
        return float(largest) * _ABOVE_ROUNDING

    def run(self, measurer: PlanMeasurer, loss_limit: float) -> Trial | None:
        """The smallest plan that is predicted to keep a limit; None where there is none."""
        try:
            plan = self.study.smallest(self.budgets, self.rules, loss_limit)
        except QualityInfeasibleError as error:
            self.within = error.within
            return None
        return self._known(plan) or self._measured(measurer, plan, f"at most {loss_limit!r}")

    def run_most_faithful(self, measurer: PlanMeasurer) -> Trial:
        """The plan of least predicted loss."""
        plan = self.study.most_faithful(self.budgets, self.rules)
        return self._known(plan) or self._measured(measurer, plan, "least")

    def _known(self, plan: Plan) -> Trial | None:
        same = (trial for trial in self.done if trial.plan.assignment == plan.assignment)
        return next(same, None)

    def _measured(self, measurer: PlanMeasurer, plan: Plan, predicted: str) -> Trial:
        label = f"{self.budgets.label(self.rules)}, predicted {predicted}"
        record = self.study.add_plan(label, plan, self.budgets)
        trial = Trial(record, plan.predicted_loss, self._divergence(measurer, record))
        self.done.append(trial)
        return trial

    def _divergence(self, measurer: PlanMeasurer, plan: PlanRecord) -> float:
        for record in self.study.store.measurements(self.study.id):
            is_same = record.plan_id == plan.id and record.data_sha256 == self.held_out.sha256
            if is_same and record.metric == KL_DIVERGENCE and record.value is not None:
                return record.value
        measured = measurer.measure(plan, self.progress).kl_divergence
        assert measured is not None  # the model predicts tokens
        return measured.value


class _Bracket:
    """Between which predicted limits the measured one lies, and where to look next."""

    def __init__(self, max_kl: float, largest_loss: float) -> None:
        """
        Args:
            largest_loss: every plan is predicted to lose at most this.
        """
        self.limit = min(max_kl, largest_loss)
        self.max_kl = max_kl
        self._largest = largest_loss
        self._kept = 0.0  # the largest limit whose plan kept the measured limit
        self._broken = math.inf  # the smallest predicted loss of a plan that did not
        self._is_near = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing smaller can be found, or is worth a measurement."""
        nothing_smaller = self._kept >= self._largest
        return self._is_near or nothing_smaller or self._broken <= self._kept * _NARROW

    def add(self, trial: Trial) -> None:
        """Learn from the plan that was found at `limit`, and move on."""
        if trial.measured <= self.max_kl:
            self._kept = max(self._kept, self.limit)
            self._is_near = trial.measured >= NEAR_ENOUGH * self.max_kl
        else:
            # Every limit down to what the plan is predicted to lose has this plan.
            self._broken = min(self._broken, trial.predicted)
        ratio = self.max_kl / trial.measured if trial.measured > 0.0 else math.inf
        self.limit = min(self._news(trial.predicted * ratio), self._largest)

    def _news(self, proposal: float) -> float:
        """The proposal, or where it is known what would come of it, the middle of what is not."""
        if self._kept < proposal < self._broken:
            return proposal
        if self._broken == math.inf:
            return self._kept * _FACTOR
        if self._kept == 0.0:
            return self._broken / _FACTOR
        return math.sqrt(self._kept * self._broken)
