"""Evaluation tasks of lm-eval, on a model in memory.

lm-eval (the extra `eval`) is imported when a task is run, not before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from autoq.data.offline import cache_only_when_offline
from autoq.errors import AutoqError, DataError, EvaluationError, InputError
from autoq.evaluators._task_examples import (
    ExampleCount,
    ExamplePart,
    chosen_samples,
    samples_sha256,
)
from autoq.evaluators._task_files import TaskFile, find_task, require_harness, similar_tasks
from autoq.evaluators._task_metrics import (
    check_is_single_number,
    check_task_metric,
    is_higher_better,
)
from autoq.evaluators._task_results import task_estimates
from autoq.evaluators.estimate import Estimate
from autoq.evaluators.protocol import Subject

__all__ = [
    "ExampleCount",
    "ExamplePart",
    "TaskFailure",
    "TaskResults",
    "TaskRun",
    "check_can_run",
    "check_is_single_number",
    "count_examples",
    "is_higher_better",
    "known_task",
    "require_harness",
    "run_tasks",
    "similar_tasks",
]

FEWSHOT_SEED = 1234
"""lm-eval's own default: which examples stand before the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRun:
    """What one task gave."""

    name: str  # as it was asked for
    estimates: Mapping[str, Estimate]  # "task", "task.metric", of every part of a group
    versions: Mapping[str, Any]  # part -> version of the task
    configurations: Mapping[str, Any]  # part -> the task's settings, as plain data
    examples: Mapping[str, int]  # part -> how many were run
    higher_is_better: Mapping[str, bool]  # "task.metric" -> direction
    harness_version: str
    limit: int | None
    data_sha256: str  # of the documents that were run, with their prompts and answers


@dataclass(frozen=True, slots=True)
class TaskFailure:
    """A task that could not be run, and why."""

    name: str
    error: AutoqError


@dataclass(slots=True)
class TaskResults:
    """Runs and failures, in the order that was asked for."""

    runs: list[TaskRun] = field(default_factory=list)
    failures: list[TaskFailure] = field(default_factory=list)


def known_task(name: str) -> str | None:
    """The task that a name asks for; None if there is none.

    Args:
        name: a task, group or tag of lm-eval, a bundled task, a YAML file, or one of these with
            ".metric" after it.
    Raises:
        InputError: lm-eval is not installed, or the YAML file does not exist.
        UnknownNameError: the task is known, and its configuration says that it has no such metric.
    """
    require_harness()
    if find_task(name) is not None:
        return name
    task, _, metric = name.rpartition(".")
    if not task or not metric or find_task(task) is None:
        return None
    check_task_metric(task, metric)
    return task


def check_can_run(subject: Subject) -> None:
    """Refuse models that no task can run on.

    Raises:
        InputError: lm-eval is missing, the model does not predict the next token, or it has no
            tokenizer.
    """
    require_harness()
    from autoq.evaluators.harness_model import HarnessModel

    HarnessModel(subject.model, subject.tokenizer)


def run_tasks(
    subject: Subject,
    names: Sequence[str],
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int | str = "auto",
    examples: ExamplePart | None = None,
    show_progress: bool = False,
) -> TaskResults:
    """Run tasks one after another; one that fails does not stop the others.

    Args:
        subject: a causal model with its tokenizer.
        names: as `known_task` takes them, without metrics.
        limit: examples of each task; None is all.
        fewshot: examples before each question; None is what the task says.
        batch_size: sequences at once, or "auto".
        examples: the half of each task's examples to run; None is all. Not with a limit.
    Raises:
        InputError: lm-eval is missing, or no task can run on such a model.
        EvaluationError: the model's output holds NaN or Inf.
    """
    require_harness()
    from autoq.evaluators.harness_model import HarnessModel

    model = HarnessModel(
        subject.model, subject.tokenizer, batch_size=batch_size, show_progress=show_progress
    )
    results = TaskResults()
    for name in dict.fromkeys(names):
        try:
            with _quiet_harness(show_progress), _seeded():
                results.runs.append(_run_task(model, name, limit, fewshot, examples))
        except EvaluationError:
            raise  # the model's fault, so no other task fares better
        except AutoqError as error:
            results.failures.append(TaskFailure(name, error))
    return results


def count_examples(name: str, part: ExamplePart) -> ExampleCount:
    """How many of a task's examples the fresh half has, whichever half is given.

    Raises:
        InputError, DataError: the task is unknown, or its data cannot be had.
    """
    with _quiet_harness(show_progress=False), _seeded():
        loaded = _load(name, _found(name))
        examples = _examples(loaded)
    fresh = replace(part, fresh=True).indices(examples)
    return ExampleCount(
        fresh=sum(map(len, fresh.values())), everything=sum(map(len, examples.values()))
    )


def _examples(loaded: Any) -> dict[str, list[Any]]:
    return {name: list(task.eval_docs) for name, task in loaded["tasks"].items()}


def _found(name: str) -> TaskFile:
    file = find_task(name)
    if file is None:
        close = ", ".join(similar_tasks(name))
        hint = f" (did you mean {close}?)" if close else ""
        raise InputError(
            f"no evaluation task is named {name!r}{hint}; see `lm_eval ls tasks`, or name a YAML "
            "file"
        )
    return file


def _run_task(
    model: Any, name: str, limit: int | None, fewshot: int | None, part: ExamplePart | None
) -> TaskRun:
    import lm_eval

    file = _found(name)
    loaded = _load(name, file)
    for task in loaded["tasks"].values():
        _set_fewshot(task, fewshot)
    samples = None if part is None else chosen_samples(name, part, _examples(loaded))
    try:
        found = lm_eval.evaluate(
            model, loaded, limit=limit, samples=samples, bootstrap_iters=0, log_samples=True
        )
    except (AutoqError, MemoryError):
        raise
    except Exception as error:  # whatever the task's own templates and functions may raise
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise InputError(f"the task {name} cannot be run: {_reason(error)}") from error
    parts = list(found["configs"])
    is_renamed = file.task not in found["results"] and len(parts) == 1
    return TaskRun(
        name=name,
        estimates=task_estimates(name, parts[0] if is_renamed else file.task, found),
        versions={part: found["versions"].get(part) for part in parts},
        configurations={part: _plain(found["configs"][part]) for part in parts},
        examples={part: len({s["doc_id"] for s in found["samples"][part]}) for part in parts},
        higher_is_better={
            f"{part}.{metric}": bool(higher)
            for part, metrics in found["higher_is_better"].items()
            for metric, higher in metrics.items()
        },
        harness_version=lm_eval.__version__,
        limit=limit,
        data_sha256=samples_sha256(found["samples"]),
    )


def _load(name: str, file: TaskFile) -> Any:
    with cache_only_when_offline() as offline:
        try:
            return file.load()
        except AutoqError:
            raise
        except Exception as error:  # whatever the hub, a cache or the task's own code may raise
            if offline is None or _is_local(file.dataset):
                raise InputError(f"the task {name} cannot be loaded: {_reason(error)}") from error
            raise DataError(
                f"the task {name} needs the dataset {file.dataset}, which is not in the cache of "
                f"`datasets`, and {offline}; fetch it where there is a network, or leave the task "
                "out"
            ) from error


def _is_local(dataset: str | None) -> bool:
    return dataset in ("json", "csv", "parquet", "text", "arrow")


def _set_fewshot(task: Any, fewshot: int | None) -> None:
    """As `lm_eval run` does it: a task that says 0 itself keeps it."""
    said = task.get_config("num_fewshot")
    if said is None:
        task.set_config(key="num_fewshot", value=fewshot or 0)
    elif fewshot is not None and said != 0:
        task.set_config(key="num_fewshot", value=fewshot)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _plain(configuration: Any) -> Any:
    """JSON data; functions become text."""
    return json.loads(json.dumps(configuration, default=str))


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


@contextmanager
def _quiet_harness(show_progress: bool) -> Iterator[None]:
    """Keep lm-eval's log and bars off the terminal, unless they are wanted."""
    if show_progress:
        yield
        return
    import datasets
    import lm_eval.api.task as building

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bar, bars_shown = building.tqdm, datasets.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        building.tqdm = _no_bar
        datasets.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        building.tqdm = bar
        if bars_shown:
            datasets.enable_progress_bars()


def _no_bar(items: Any, *_: Any, **__: Any) -> Any:
    return items


@contextmanager
def _seeded() -> Iterator[None]:
    """lm-eval's default seeds for whatever a task draws; the generators are as before afterwards."""
    import random

    import numpy as np
    import torch

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        random.seed(0)
        np.random.seed(FEWSHOT_SEED)
        torch.manual_seed(FEWSHOT_SEED)
        yield
