"""Measuring any metrics and evaluation tasks of a model in memory, by their names."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from autoq.errors import EvaluationError, InputError, UnknownNameError
from autoq.evaluators import floor, generation, packed_cost  # noqa: F401  (they register themselves)
from autoq.evaluators._task_examples import ExamplePart
from autoq.evaluators.builtin import OutputEvaluator, evaluate_outputs
from autoq.evaluators.estimate import Estimate
from autoq.evaluators.objective import canonical_name
from autoq.evaluators.protocol import EVALUATORS, Evaluator, Metric, Reference, Subject, check_needs


def known_metrics() -> dict[str, tuple[Evaluator, Metric]]:
    """Metric -> the registered evaluator that gives it, and what is known about it."""
    return {
        metric.name: (evaluator, metric)
        for evaluator in EVALUATORS.values()
        for metric in evaluator.metrics
    }


@dataclass(frozen=True, slots=True)
class Wanted:
    """What some names ask for."""

    metrics: tuple[str, ...]  # full names
    tasks: tuple[str, ...]  # of the harness: names, or paths of YAML files

    @property
    def evaluators(self) -> tuple[Evaluator, ...]:
        """Those that give the metrics, each once."""
        known = known_metrics()
        return tuple({known[name][0].name: known[name][0] for name in self.metrics}.values())


def wanted(names: Iterable[str]) -> Wanted:
    """Sort names into metrics and tasks.

    Args:
        names: metrics, their short names ("kl"), evaluators' names, tasks of lm-eval or their YAML
            files, or one metric of a task ("arc_easy.acc_norm").
    Raises:
        UnknownNameError: it is no metric, and no task that is known; lists near misses.
        InputError: a task is asked for, and lm-eval is not installed.
    """
    known = known_metrics()
    metrics: dict[str, None] = {}
    tasks: dict[str, None] = {}
    for name in map(canonical_name, names):
        if name in known:
            metrics[name] = None
        elif name in EVALUATORS:
            metrics.update((metric.name, None) for metric in EVALUATORS[name].metrics)
        else:
            tasks[_task_of(name, known)] = None
    return Wanted(tuple(metrics), tuple(tasks))


def _task_of(name: str, metrics: Collection[str]) -> str:
    from autoq.evaluators.tasks import known_task, similar_tasks

    task = known_task(name)
    if task is None:
        close = difflib.get_close_matches(name, metrics, cutoff=0.6) + similar_tasks(name)
        hint = f" (did you mean {', '.join(close)}?)" if close else ""
        raise UnknownNameError(
            f"{name!r} is no metric and no evaluation task{hint}; metrics: "
            f"{', '.join(sorted(metrics))}; tasks are those of `lm_eval ls tasks`, or YAML files"
        )
    return task


def is_better_higher(name: str) -> bool | None:
    """Whether a metric or a task is better the higher it is; None where nothing says so.

    Args:
        name: one that `wanted` takes.
    """
    known = known_metrics()
    name = canonical_name(name)
    if name in known:
        return known[name][1].better == "higher"
    if name in EVALUATORS:
        return None
    from autoq.evaluators.tasks import is_higher_better

    return is_higher_better(name)


def measure_metrics(
    subject: Subject,
    reference: Reference,
    names: Collection[str],
    *,
    limit: int | None = None,
    examples: ExamplePart | None = None,
    advance: Callable[[], None] | None = None,
) -> dict[str, Estimate]:
    """Measure metrics and tasks of a model in memory, simulated, packed or original.

    What looks only at outputs costs one pass over the reference's tokens, however much of it is
    asked for. The model is left as it was.

    Args:
        names: as `wanted` takes them.
        limit: examples of each task; None is all.
        examples: the half of each task's examples to run; None is all.
        advance: called after every batch of the reference's tokens.
    Returns:
        Full name -> estimate, of everything that the evaluators gave: at least what was asked for,
        where the data define it. Of a task: "task" (its first metric) and "task.metric" for each.
        `Estimate.per_sequence` has the values per sequence, of tasks per example: the same ones in
        the same order for every model, so that models compare pairwise.
    Raises:
        UnknownNameError, InputError: a name is unknown, or the model cannot have the metric; before
            anything is measured.
        EvaluationError: this model has no such number, for example because its output is NaN.
    """
    asked = wanted(names)
    check_can_have(asked, subject)
    by_outputs = [e for e in asked.evaluators if isinstance(e, OutputEvaluator)]
    found: dict[str, Estimate] = {}
    if by_outputs:
        found.update(evaluate_outputs(by_outputs, subject, reference, advance))
    for evaluator in asked.evaluators:
        if not isinstance(evaluator, OutputEvaluator):
            found.update(evaluator.evaluate(subject, reference))
    if asked.tasks:
        found.update(_task_estimates(subject, asked.tasks, limit, examples))
    check_values(found)
    return found


def check_can_have(asked: Wanted, subject: Subject) -> None:
    """Refuse metrics that such a model cannot have; tasks are not looked at.

    Raises:
        InputError: names what is asked for, and what is missing.
    """
    for evaluator in asked.evaluators:
        check_needs(evaluator, subject)
    known = known_metrics()
    of_text = [name for name in asked.metrics if known[name][1].of_text]
    if of_text and subject.tokenizer is None:
        raise InputError(
            f"words and bytes of {', '.join(of_text)} are counted with the model's tokenizer, and "
            "there is none; copy tokenizer.json into the model's folder, or ask for perplexity"
        )


def _task_estimates(
    subject: Subject, tasks: Sequence[str], limit: int | None, examples: ExamplePart | None
) -> dict[str, Estimate]:
    from autoq.evaluators.tasks import run_tasks

    results = run_tasks(subject, tasks, limit=limit, examples=examples)
    for failure in results.failures:
        raise failure.error
    return {name: value for run in results.runs for name, value in run.estimates.items()}


def check_values(estimates: dict[str, Estimate]) -> None:
    """Refuse numbers that are none.

    Raises:
        EvaluationError: a value is NaN or infinite; names it.
    """
    for name, estimate in estimates.items():
        if not math.isfinite(estimate.value):
            raise EvaluationError(
                f"{name} came out as {estimate.value}; the model's output is unusable, so this "
                "plan is not judged by it; search or measure with --dtype float32, or take another plan"
            )
