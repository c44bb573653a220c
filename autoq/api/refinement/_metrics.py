"""The metrics that an objective and its constraints ask for, gathered while a trial runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from autoq.api.measured import KL_DIVERGENCE
from autoq.api.task import LoadedModel, output_properties
from autoq.errors import EvaluationError, InputError
from autoq.evaluators import (
    EVALUATORS,
    Constraint,
    Estimate,
    Objective,
    Reference,
    Subject,
    known_metrics,
    measure_metrics,
    sequence_divergences,
)
from autoq.evaluators.builtin import OutputEvaluator
from autoq.evaluators.metrics import Wanted, is_better_higher, wanted
from autoq.evaluators.metrics import check_can_have as check_metrics_of
from autoq.evaluators.outputs import SequenceOutputs
from autoq.evaluators.tasks import ExamplePart, check_can_run, check_is_single_number

_FEWEST_PARTS = 8
"""Into which data are parted for a paired difference; with fewer it says next to nothing."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What trials minimise, and what they must keep."""

    objective: Objective
    constraints: tuple[Constraint, ...] = ()
    examples: ExamplePart | None = None  # of tasks: the half that is run; None is all

    @property
    def metrics(self) -> frozenset[str]:
        """Full names of everything that has to be measured."""
        return self.objective.metrics | {constraint.metric for constraint in self.constraints}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Evaluation tasks among the metrics.

        Raises:
            UnknownNameError, InputError: a metric is not known.
        """
        return self.asked.tasks

    @property
    def asked(self) -> Wanted:
        """Metrics beside the divergence, which is measured in any case, and tasks.

        Raises:
            UnknownNameError, InputError: a metric is not known.
        """
        return wanted(sorted(self.metrics - {KL_DIVERGENCE}))

    @property
    def is_divergence(self) -> bool:
        """Whether the objective is the KL divergence itself, whose noise floor is known."""
        return self.objective.text in ("kl", KL_DIVERGENCE)


def check_names(aim: Aim) -> None:
    """Refuse an aim that no model can have, without one.

    Raises:
        UnknownNameError, InputError: a metric or a task is not known, a name stands for no single
            number, or the objective is a metric that is better the higher it is.
    """
    for task in aim.metrics & set(aim.asked.tasks):
        check_is_single_number(task)
    for name in aim.metrics & EVALUATORS.keys() - known_metrics().keys():
        given = ", ".join(metric.name for metric in EVALUATORS[name].metrics)
        raise InputError(f"{name} stands for several numbers; name one of {given}")
    only = aim.objective.only_metric
    if only is not None and only != KL_DIVERGENCE and is_better_higher(only):
        text = aim.objective.text
        raise InputError(
            f"trials minimise the objective, and {text} is better the higher it is; write "
            f"1 - {text} as the objective"
        )


def check_can_have(aim: Aim, subject: Subject) -> None:
    """Refuse metrics and tasks that such a model cannot have; its weights may be missing.

    Raises:
        InputError: names what is asked for, and what is missing.
    """
    check_metrics_of(aim.asked, subject)
    if aim.asked.tasks:
        check_can_run(subject)


class AimedMetrics:
    """Which of an aim's metrics come from outputs for the tokens, and which from elsewhere."""

    def __init__(self, aim: Aim, loaded: LoadedModel) -> None:
        """
        Raises:
            InputError: a metric is not one of such a model.
        """
        self.aim = aim
        self.properties = output_properties(loaded.model)
        asked = aim.asked
        self.tokenizer = loaded.tokenizer_if_any if asked.evaluators or asked.tasks else None
        self.subject = Subject(model=loaded.model, tokenizer=self.tokenizer)
        check_can_have(aim, self.subject)
        self.by_outputs = [e for e in asked.evaluators if isinstance(e, OutputEvaluator)]
        given = {metric.name for each in self.by_outputs for metric in each.metrics}
        self.elsewhere = sorted(aim.metrics - given - {KL_DIVERGENCE})
        needed = aim.objective.metrics
        self.is_per_sequence = not needed & set(self.elsewhere)

    def gathered(self) -> Gathered:
        """Empty hands, for one trial."""
        return Gathered(self)

    def finished(self, gathered: Gathered, reference: Reference) -> dict[str, float]:
        """Metric -> value over all tokens, with those that are measured elsewhere.

        Where the objective needs these, of fresh examples, `gathered.losses` are from then on the
        objective on parts of tokens and examples that have none in common, so that plans compare
        pairwise.

        Raises:
            EvaluationError: this model has no such number.
        """
        values = gathered.totals()
        if self.elsewhere:
            found = self._measure(reference, self.elsewhere)
            values |= {name: estimate.value for name, estimate in found.items()}
            are_fresh = self.aim.examples is not None and self.aim.examples.fresh
            if are_fresh and not self.is_per_sequence:
                gathered.losses = self._in_parts(gathered, found)
        return values

    def _measure(self, reference: Reference, names: Sequence[str]) -> dict[str, Estimate]:
        return measure_metrics(self.subject, reference, names, examples=self.aim.examples)

    def _in_parts(self, gathered: Gathered, found: Mapping[str, Estimate]) -> list[float]:
        """The objective on parts of the data; empty where a metric has no values on parts.

        As many parts as the metric of fewest values has, or fewer where the objective (such as a
        logarithm) has no value on a part that small. Values of other metrics are averaged by part.
        """
        values = {**gathered.per_sequence(), **{n: e.per_sequence for n, e in found.items()}}
        own = {name: values.get(name, ()) for name in self.aim.objective.metrics}
        count = min(map(len, own.values()))
        while count >= _FEWEST_PARTS:
            parts = {
                name: [fmean(part) for part in np.array_split(np.asarray(entry), count)]
                for name, entry in own.items()
            }
            try:
                return list(self.aim.objective.per_sequence(parts))
            except InputError:
                count //= 2
        return []

    def of_the_original(self, reference: Reference) -> dict[str, float]:
        """What the original has of the metrics that constraints compare with.

        Raises:
            InputError: a task has no metric of the name.
        """
        names = [c.metric for c in self.aim.constraints if c.relative_to_original]
        if not names:
            return {}
        found = self._measure(reference, sorted(set(names)))
        missing = [name for name in names if name not in found]
        if missing:
            raise InputError(
                f"tasks give no metric {', '.join(missing)}; found: {', '.join(sorted(found))}"
            )
        return {name: found[name].value for name in names}

    def value(self, metrics: Mapping[str, float]) -> float:
        """The objective of one model.

        Raises:
            EvaluationError: it divides by zero, or the like.
        """
        try:
            return self.aim.objective.value(metrics)
        except InputError as error:
            raise EvaluationError(str(error)) from None

    def violations(
        self, metrics: Mapping[str, float], original: Mapping[str, float]
    ) -> dict[str, float]:
        """Constraint -> by how much it is broken; 0 or less where it is kept."""
        found = {}
        for constraint in self.aim.constraints:
            limit = constraint.limit(original.get(constraint.metric))
            if constraint.metric not in metrics:
                raise EvaluationError(
                    f"no task gave the metric {constraint.metric}; leave the constraint out"
                )
            excess = metrics[constraint.metric] - limit
            found[str(constraint)] = excess if constraint.kind == "at_most" else -excess
        return found


class Gathered:
    """What one trial's outputs have shown so far."""

    def __init__(self, metrics: AimedMetrics) -> None:
        self._metrics = metrics
        self._meters = [each.meter(metrics.tokenizer) for each in metrics.by_outputs]
        self.divergences: list[float] = []
        self.losses: list[float] = []  # per sequence, where the objective has such

    def add(self, ids: Tensor, expected: Any, found: Tensor) -> None:
        """Look at a batch: [sequences, tokens] and both outputs.

        Raises:
            EvaluationError: an output is not finite, or the objective has no value.
        """
        metrics = self._metrics
        divergences = sequence_divergences(
            expected, found, has_vocabulary=metrics.properties["has_vocabulary"]
        )
        values: dict[str, Sequence[float]] = {KL_DIVERGENCE: divergences}
        own = [each.meter(metrics.tokenizer) for each in metrics.by_outputs]
        for row in range(ids.shape[0]) if own else ():
            outputs = SequenceOutputs(ids[row], expected[row], found[row])
            for meter in (*own, *self._meters):
                meter.add(outputs)
        for meter in own:
            values |= {name: found.per_sequence for name, found in meter.result().items()}
        self.divergences.extend(divergences)
        if metrics.is_per_sequence:
            try:
                self.losses.extend(metrics.aim.objective.per_sequence(values))
            except InputError as error:
                raise EvaluationError(str(error)) from None

    def per_sequence(self) -> dict[str, Sequence[float]]:
        """Metric -> its values on the sequences that were seen."""
        found = {n: e.per_sequence for meter in self._meters for n, e in meter.result().items()}
        return {KL_DIVERGENCE: self.divergences, **found}

    def totals(self) -> dict[str, float]:
        """Metric -> value over all tokens that were seen."""
        found = {name: e.value for meter in self._meters for name, e in meter.result().items()}
        return {KL_DIVERGENCE: sum(self.divergences) / len(self.divergences), **found}
