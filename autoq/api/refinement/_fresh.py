"""Finalists of a refinement on data that chose nothing: how they are measured, and judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from autoq.api.refinement._metrics import Aim
from autoq.api.refinement.measure import TrialMeasurer
from autoq.data import TokenData
from autoq.errors import EvaluationError
from autoq.evaluators import Constraint, compare
from autoq.evaluators.metrics import wanted
from autoq.evaluators.tasks import ExampleCount, count_examples
from autoq.progress import Progress
from autoq.search.refine import Trial, Verdict, accepted

if TYPE_CHECKING:
    from autoq.api.study import Study


@dataclass(frozen=True, slots=True)
class FreshAim:
    """What can be measured of an aim on data that chose nothing."""

    aim: Aim  # without the constraints that cannot
    examples: Mapping[str, ExampleCount]  # of the tasks in it
    left_out: tuple[Constraint, ...]  # of tasks with too few fresh examples
    missing: tuple[str, ...]  # tasks of the objective with too few

    @property
    def can_confirm(self) -> bool:
        """Whether every task of the objective has fresh examples enough."""
        return not self.missing

    @property
    def verdict(self) -> Verdict:
        """Of every plan, where nothing can be confirmed."""
        return Verdict(
            better=False,
            difference=0.0,
            low=-math.inf,
            high=math.inf,
            reason=f"not confirmed: {'; '.join(map(self._too_few, self.missing))}",
        )

    def remarks(self, *, again: bool) -> list[str]:
        """What the user should know of tasks.

        Args:
            again: there were confirmations of this plan before.
        """
        found = [
            f"{self._fresh(task)} chose nothing, and the best plans are confirmed on them"
            + (", as they were before" if again else "")
            for task, count in self.examples.items()
            if count.suffices
        ]
        return found + [
            f"{constraint} is kept on the examples that chose the plan, and not confirmed: "
            f"{self._too_few(_task_of(constraint.metric))}"
            for constraint in self.left_out
        ]

    def _fresh(self, task: str) -> str:
        count = self.examples[task]
        return f"{count.fresh} of {count.everything} examples of {task}"

    def _too_few(self, task: str) -> str:
        everything = self.examples[task].everything
        return f"{task} has too few examples to hold any out, {everything} in all"


def fresh_aim(aim: Aim) -> FreshAim:
    """The same aim on the examples that choose nothing.

    Raises:
        InputError, DataError: a task's data can no longer be had.
    """
    assert aim.examples is not None  # a refinement says which examples choose
    part = replace(aim.examples, fresh=True)
    counts = {task: count_examples(task, part) for task in aim.tasks}
    poor = {task for task, count in counts.items() if not count.suffices}
    left_out = tuple(c for c in aim.constraints if _task_of(c.metric) in poor)
    return FreshAim(
        replace(
            aim,
            constraints=tuple(c for c in aim.constraints if c not in left_out),
            examples=part,
        ),
        counts,
        left_out,
        tuple(sorted({_task_of(name) for name in aim.objective.metrics} & poor)),
    )


def _task_of(metric: str) -> str:
    """The task that a metric belongs to; empty for others."""
    return next(iter(wanted([metric]).tasks), "")


@dataclass(frozen=True, slots=True)
class OnFresh:
    """A plan on data that chose nothing."""

    losses: tuple[float, ...]  # the objective on parts of the data; infinite where not measurable
    loss: float  # the objective
    excess: Mapping[str, float] = field(default_factory=dict)
    """Constraint -> by how much it is broken; 0 or less where it is kept."""

    @property
    def is_finite(self) -> bool:
        """Whether it could be measured."""
        return math.isfinite(self.loss) and all(map(math.isfinite, self.losses))

    def breaks_more_than(self, start: OnFresh) -> list[str]:
        """Constraints that it breaks, and by more than the start does."""
        return [
            name
            for name, value in self.excess.items()
            if value > max(0.0, start.excess.get(name, 0.0))
        ]


class FreshMeasurements:
    """Measures plans on tokens and examples that chose nothing."""

    def __init__(self, study: Study, cache_bytes: int | None, progress: Progress) -> None:
        """
        Args:
            cache_bytes: as for `TrialMeasurer`.
        """
        self._study, self._cache_bytes, self._progress = study, cache_bytes, progress

    def of(self, plans: Sequence[Trial], tokens: TokenData, aim: Aim, task: str) -> list[OnFresh]:
        """Each plan's losses and broken constraints; the start is the first of them.

        Args:
            task: what is said to be done.
        """
        with (
            TrialMeasurer(self._study, tokens, aim, cache_bytes=self._cache_bytes) as measurer,
            self._progress.task(task, len(plans) * measurer.steps) as advance,
        ):
            original = measurer.original()

            def measured(plan: Trial) -> OnFresh:
                try:
                    found = measurer.measure(plan.assignment, advance=advance)
                    excess = measurer.metrics.violations(found.metrics, original)
                except EvaluationError:
                    return OnFresh((math.inf,), math.inf)
                return OnFresh(found.losses, found.loss, excess)

            return [measured(plan) for plan in plans]


def is_worse(losses: Sequence[float], start: Sequence[float], noise_floor: float) -> bool:
    """Whether a plan that was accepted is significantly worse than its start after all."""
    if len(losses) != len(start):  # one of them could not be measured
        return True
    if len(start) == 1:
        return losses[0] > start[0] + noise_floor
    return compare(losses, start, noise_floor).verdict == "worse"


def choose(
    finalists: Sequence[Trial], measured: Sequence[OnFresh], floor: float, broken: str
) -> tuple[Trial | None, Verdict]:
    """The accepted finalist of least loss on fresh data; of none, the best one's verdict.

    Args:
        measured: of each finalist; the start is the first.
        broken: constraints that the start breaks on the data that chose, or nothing.
    """
    start = measured[0]
    others = [
        (trial, found)
        for trial, found in zip(finalists[1:], measured[1:], strict=True)
        if found.is_finite
    ]
    if not others:
        reason = (
            f"the start breaks {broken}, and so does every trial"
            if broken
            else "no trial was better than the start on the tokens that trials are measured on"
        )
        return None, Verdict(better=False, difference=0.0, low=0.0, high=0.0, reason=reason)
    judged = [
        (trial, found.loss, _verdict(start, found, floor, len(others), broken))
        for trial, found in others
    ]
    trial, _, verdict = min(judged, key=lambda entry: (not entry[2].better, entry[1]))
    return (trial if verdict.better else None), verdict


def _verdict(start: OnFresh, found: OnFresh, floor: float, candidates: int, broken: str) -> Verdict:
    unknown = Verdict(
        better=False,
        difference=found.loss - start.loss,
        low=-math.inf,
        high=math.inf,
        reason="",
    )
    worse = found.breaks_more_than(start)
    if worse:
        reason = (
            f"not accepted: what kept {', '.join(worse)} where it was chosen breaks it elsewhere"
        )
        return replace(unknown, reason=reason)
    if broken:
        reason = f"the start breaks {broken}; of the trials that keep it this one loses least"
        return replace(unknown, better=True, reason=reason)
    if len(start.losses) > 1 and len(found.losses) == len(start.losses):
        return accepted(start.losses, found.losses, floor, candidates=candidates)
    reason = "not confirmed: the objective has no values on parts of the data, so chance is unknown"
    return replace(unknown, reason=f"{reason}; the difference is {unknown.difference:.4g}")
