"""From lm-eval's results to estimates with intervals, from the values of single examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from autoq.evaluators._task_metrics import PLAIN_FILTER
from autoq.evaluators.estimate import Estimate
from autoq.evaluators.resampling import Numbers, ratio_estimate

_NO_METRICS = ("alias", "name", "sample_len", "sample_count")


def task_estimates(asked: str, main: str, results: Mapping[str, Any]) -> dict[str, Estimate]:
    """ "task.metric" -> estimate of everything, and the first metric of each task by its name.

    Args:
        asked: what the user called the task; the main task's metrics are found by it, too.
        main: the task, or the group, that was asked for.
    """
    found: dict[str, Estimate] = {}
    for part, values in results["results"].items():
        samples = _samples(part, results)
        for key, value in values.items():
            metric, _, chosen_filter = key.partition(",")
            if metric in _NO_METRICS or metric.endswith("_stderr") or not _is_number(value):
                continue
            name = metric if chosen_filter == PLAIN_FILTER else key
            estimate = _estimate(float(value), _of_examples(samples, metric, chosen_filter))
            found[f"{part}.{name}"] = estimate
            first = _first_metric(part, results)
            if first in (None, metric):
                found.setdefault(part, estimate)
    for name in [name for name in found if name == main or name.startswith(f"{main}.")]:
        found.setdefault(asked + name[len(main) :], found[name])
    return found


def _first_metric(part: str, results: Mapping[str, Any]) -> str | None:
    """The metric that the task's author names first; None for groups."""
    metrics = results["configs"].get(part, {}).get("metric_list") or [{}]
    name = metrics[0].get("metric")
    return None if name is None else str(name)


def _samples(part: str, results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of a task its own, of a group those of its members."""
    members = results.get("group_subtasks", {}).get(part) or []
    own = list(results["samples"].get(part, []))
    return own + [sample for member in members for sample in _samples(member, results)]


def _of_examples(
    samples: Sequence[Mapping[str, Any]], metric: str, chosen_filter: str
) -> list[Any]:
    """The metric on each example, in the examples' order."""
    own = [s for s in samples if s.get("filter") == chosen_filter and metric in s]
    return [sample[metric] for sample in own]


def _estimate(value: float, examples: Sequence[Any]) -> Estimate:
    """The value with a bootstrap interval, where it can be made from the examples' own values.

    Means are made from numbers, perplexities from (log-likelihood, words or bytes). Where neither
    gives lm-eval's value the interval is unknown, which means unbounded.
    """
    if examples and all(map(_is_number, examples)):
        found = ratio_estimate([float(e) for e in examples], [1.0] * len(examples))
        if found is not None and math.isclose(found.value, value, rel_tol=1e-9, abs_tol=1e-12):
            return found
    if examples and all(isinstance(e, tuple | list) and len(e) == 2 for e in examples):
        losses, weights = [-float(e[0]) for e in examples], [float(e[1]) for e in examples]
        for transform in _TRANSFORMS:
            found = ratio_estimate(losses, weights, transform)
            if found is not None and math.isclose(found.value, value, rel_tol=1e-9):
                return found
    return Estimate(value, -math.inf, math.inf)


def _bits(nats: Numbers) -> Numbers:
    return nats / math.log(2)


_TRANSFORMS: tuple[Callable[[Numbers], Numbers], ...] = (np.exp, _bits)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)
