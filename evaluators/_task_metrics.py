"""Which metrics a task gives, as far as its configuration says, without its data."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoq.errors import InputError, UnknownNameError
from autoq.evaluators._task_files import TaskFile, find_task

PLAIN_FILTER = "none"
"""lm-eval's name for the filter of tasks that have none."""

_ANY_FILTER = ",*"


@dataclass(frozen=True, slots=True)
class TaskMetrics:
    """What stands behind "task." in the names of a task's metrics."""

    names: tuple[str, ...]  # "acc", "exact_match,strict-match"; the first that is named first
    is_complete: bool  # False where the task's own code may give others
    is_single: bool  # whether the task's own name stands for a number

    def has(self, metric: str) -> bool:
        """Whether the task gives the metric, or may give it."""
        plain = metric.partition(",")[0]
        return not self.is_complete or metric in self.names or f"{plain}{_ANY_FILTER}" in self.names


def task_metrics(file: TaskFile) -> TaskMetrics:
    """What the configuration says: the metric list, or lm-eval's own, for each of the filters.

    Raises:
        InputError: the file cannot be read.
    """
    found = file.configuration()
    if "class" in found or not file.is_main_name(found):
        is_task = "class" in found
        return TaskMetrics((), is_complete=not is_task, is_single=is_task)
    if file.is_group:
        return _group_metrics(found)
    metrics = _metrics(found)
    filters = [entry["name"] for entry in found.get("filter_list") or () if "name" in entry]
    names = [
        metric if chosen == PLAIN_FILTER else f"{metric},{chosen}"
        for metric in metrics
        for chosen in filters or [PLAIN_FILTER]
    ]
    return TaskMetrics(tuple(names), is_complete=_is_complete(found), is_single=True)


def check_task_metric(task: str, metric: str) -> None:
    """Refuse a metric that the task will not give, before the task is run.

    Raises:
        UnknownNameError: names what it gives, the near misses first.
    """
    file = find_task(task)
    assert file is not None  # whoever asks has found it
    known = task_metrics(file)
    if known.has(metric):
        return
    names = [name.replace(_ANY_FILTER, "") for name in known.names]
    close = difflib.get_close_matches(metric, names, cutoff=0.5)
    hint = f" (did you mean {task}.{close[0]}?)" if close else ""
    listed = ", ".join(f"{task}.{name}" for name in names) or "none of its own, name its tasks"
    raise UnknownNameError(
        f"the task {task} gives no metric {metric!r}{hint}; its metrics: {listed}"
    )


def check_is_single_number(task: str) -> None:
    """Refuse a name that stands for several tasks without a number of their own.

    Raises:
        InputError: it is a tag, or a group that aggregates nothing.
    """
    file = find_task(task)
    if file is not None and not task_metrics(file).is_single:
        raise InputError(
            f"{task} must have one number to be minimised or kept, and stands for several tasks "
            "without one of their own; name the tasks, or a group with an aggregate_metric_list"
        )


def is_higher_better(name: str) -> bool | None:
    """Whether a task's number is the better the higher it is; None where nothing says so.

    Args:
        name: a task, whose number is its first metric, or "task.metric".
    """
    task, _, metric = (name, "", "") if find_task(name) is not None else name.rpartition(".")
    file = find_task(task)
    assert file is not None  # whoever asks has found it
    found = file.configuration()
    if "class" in found or not file.is_main_name(found):
        return None
    names = task_metrics(file).names
    plain = (metric or next(iter(names), "")).partition(",")[0]
    for entry in found.get("metric_list") or ():
        if entry.get("metric") == plain and "higher_is_better" in entry:
            return bool(entry["higher_is_better"])
    return _usual_direction(plain)


def _usual_direction(metric: str) -> bool | None:
    """What lm-eval says of a metric of its own."""
    from lm_eval.api import metrics  # noqa: F401  (they register themselves)
    from lm_eval.api.registry import HIGHER_IS_BETTER_REGISTRY

    found = HIGHER_IS_BETTER_REGISTRY.get(metric, None)
    return None if found is None else bool(found)


def _group_metrics(found: Mapping[str, Any]) -> TaskMetrics:
    listed = found.get("aggregate_metric_list") or []
    names = []
    for entry in [listed] if isinstance(listed, dict) else listed:
        filters = entry.get("filter_list")
        filters = [filters] if isinstance(filters, str) else filters
        if filters is None:  # lm-eval takes those of the members
            names.append(f"{entry.get('metric')}{_ANY_FILTER}")
        else:
            names += [
                f"{entry.get('metric')}" if one == PLAIN_FILTER else f"{entry.get('metric')},{one}"
                for one in filters
            ]
    return TaskMetrics(tuple(names), is_complete=True, is_single=bool(names))


def _metrics(found: Mapping[str, Any]) -> list[str]:
    listed = found.get("metric_list")
    if listed is None:
        from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

        kind = found.get("output_type", "generate_until")  # as lm-eval's TaskConfig
        return list(DEFAULT_METRIC_REGISTRY.get(kind, ()))
    return [str(entry.get("metric")) for entry in listed]


def _is_complete(found: Mapping[str, Any]) -> bool:
    """Whether no function of the task's own, or of the hub's, gives further metrics."""
    if found.get("process_results") is not None:
        return False
    return not any(
        entry.get("hf_evaluate") or "/" in str(entry.get("metric"))  # functions are paths here
        for entry in found.get("metric_list") or ()
    )
