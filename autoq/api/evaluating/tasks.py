"""Evaluation tasks on checkpoints, studies' plans and originals, beside the original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.api.loading import load as load_checkpoint
from autoq.api.measured import OTHER_DATA, PER_SEQUENCE
from autoq.api.opening import open_study
from autoq.api.task import resolve_device
from autoq.evaluators import Estimate, compare
from autoq.evaluators.protocol import Subject
from autoq.evaluators.tasks import TaskFailure, TaskRun, run_tasks
from autoq.models.loading import load_tokenizer_if_any
from autoq.progress import Progress
from autoq.studies import PlanRecord, StudyStore

if TYPE_CHECKING:
    from autoq.api.study import Study

ORIGINAL = "original"
"""Label of what was measured on the original model."""


def is_model_folder(target: str | Path) -> bool:
    """Whether the target is a checkpoint or an original, and not a study."""
    return (Path(target) / "config.json").is_file()


def folder_subject(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> Subject:
    """A checkpoint as it runs, packed; or an unquantised model.

    Args:
        dtype: of activations and unquantised weights; "auto" is float32 on CPUs, else the
            checkpoint's own.
    Raises:
        ExportError, InputError: as `autoq.load`.
        ModelError: the folder has a tokenizer that cannot be read.
    """
    place = resolve_device(device)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"  # CPUs without bfloat16 units emulate it, slowly
    model = load_checkpoint(
        path,
        device=place,
        dtype=None if dtype == "auto" else dtype,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = load_tokenizer_if_any(path, trust_remote_code=trust_remote_code)
    return Subject(model=model, tokenizer=tokenizer)


@contextmanager
def plan_subject(study: Study, plan: PlanRecord) -> Iterator[Subject]:
    """A study's plan, simulated in its own model until the context ends."""
    simulated = study.simulate(plan)
    try:
        yield Subject(model=simulated.model, tokenizer=study.loaded().tokenizer_if_any)
    finally:
        simulated.restore()


def opened_plan(
    name: str,
    store: str | StudyStore,
    *,
    effective_bits: float | None = None,
    trust_remote_code: bool = False,
) -> tuple[Study, PlanRecord]:
    """A study and one of its plans; the last if no budget is given."""
    study = open_study(name, store, trust_remote_code=trust_remote_code)
    return study, study.plan(effective_bits)


def study_tasks(
    study: Study,
    plan: PlanRecord,
    names: Sequence[str],
    *,
    limit: int | None,
    batch_size: int | str,
    progress: Progress,
) -> dict[str, Any]:
    """Run tasks on a plan and on the original, and store both.

    Returns:
        "tasks" and "task_failures", as plain data.
    """
    original = Subject(model=study.loaded().model, tokenizer=study.loaded().tokenizer_if_any)
    with progress.task(f"tasks on the {ORIGINAL}", len(names)) as advance:
        own, failures = _run(original, names, limit, batch_size, advance)
    for run in own:
        _store(study, run, None, ORIGINAL)
    runnable = [run.name for run in own]
    with (
        plan_subject(study, plan) as subject,
        progress.task(f"tasks on {plan.label}", len(runnable)) as advance,
    ):
        runs, more = _run(subject, runnable, limit, batch_size, advance)
    for run in runs:
        _store(study, run, plan.id, plan.label)
    return _plain(runs, own, [*failures, *more])


def folder_tasks(
    subject: Subject,
    original: Subject | None,
    names: Sequence[str],
    *,
    limit: int | None,
    batch_size: int | str,
    progress: Progress,
) -> dict[str, Any]:
    """Run tasks on a checkpoint, and on the original if there is one to compare with."""
    with progress.task("tasks", len(names)) as advance:
        runs, failures = _run(subject, names, limit, batch_size, advance)
    own: list[TaskRun] = []
    if original is not None:
        runnable = [run.name for run in runs]
        with progress.task(f"tasks on the {ORIGINAL}", len(runnable)) as advance:
            own, more = _run(original, runnable, limit, batch_size, advance)
            failures += more
    return _plain(runs, own, failures)


def _run(
    subject: Subject,
    names: Sequence[str],
    limit: int | None,
    batch_size: int | str,
    advance: Any,
) -> tuple[list[TaskRun], list[TaskFailure]]:
    runs: list[TaskRun] = []
    failures: list[TaskFailure] = []
    for name in dict.fromkeys(names):
        found = run_tasks(subject, [name], limit=limit, batch_size=batch_size)
        runs += found.runs
        failures += found.failures
        advance()
    return runs, failures


def _store(study: Study, run: TaskRun, plan_id: int | None, label: str) -> None:
    values = {name: _pair(estimate) for name, estimate in _named(run).items()}
    study.store.add_measurements(
        study.id,
        values,
        plan_id=plan_id,
        label=label,
        details={
            OTHER_DATA: f"task {run.name}",
            "task": run.name,
            "versions": dict(run.versions),
            "configurations": dict(run.configurations),
            "examples": dict(run.examples),
            "limit": run.limit,
            "harness": f"lm_eval {run.harness_version}",
        },
        details_by_metric={
            name: {PER_SEQUENCE: list(estimate.per_sequence)}
            for name, estimate in _named(run).items()
        },
        data_sha256=run.data_sha256,
    )


def _named(run: TaskRun) -> dict[str, Estimate]:
    """ "task.metric" -> estimate, each once; the task's own name is a short one for one of them."""
    named = {name: e for name, e in run.estimates.items() if _metric(name) in run.higher_is_better}
    return named or dict(run.estimates)


def _metric(name: str) -> str:
    """Without the filter that the harness names after a comma."""
    return name.partition(",")[0]


def _pair(estimate: Estimate) -> tuple[float, tuple[float, float] | None]:
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return estimate.value, (estimate.low, estimate.high) if known else None


def _plain(
    runs: Sequence[TaskRun], originals: Sequence[TaskRun], failures: Sequence[TaskFailure]
) -> dict[str, Any]:
    beside = {run.name: run for run in originals}
    return {
        "tasks": [_plain_run(run, beside.get(run.name)) for run in runs],
        "task_failures": [{"task": f.name, "error": str(f.error)} for f in failures],
    }


def _plain_run(run: TaskRun, original: TaskRun | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name, estimate in _named(run).items():
        metrics[name] = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        if original is not None and name in original.estimates:
            metrics[name].update(
                _beside(
                    estimate,
                    original.estimates[name],
                    run.higher_is_better.get(_metric(name), False),
                )
            )
    return {
        "task": run.name,
        "metrics": metrics,
        "versions": dict(run.versions),
        "examples": dict(run.examples),
        "limit": run.limit,
        "data_sha256": run.data_sha256,
        "harness": f"lm_eval {run.harness_version}",
        "configurations": dict(run.configurations),
    }


def _is_mean(estimate: Estimate) -> bool:
    """Whether the value is the mean of its examples' values; perplexities are not."""
    values = estimate.per_sequence
    return bool(values) and math.isclose(
        sum(values) / len(values), estimate.value, rel_tol=1e-9, abs_tol=1e-12
    )


def _beside(found: Estimate, original: Estimate, higher_is_better: bool) -> Mapping[str, Any]:
    """The original's value, and of means over examples the paired difference."""
    if not (_is_mean(found) and _is_mean(original)):
        return {"original": original.value, "difference": None}
    if len(found.per_sequence) != len(original.per_sequence):
        return {"original": original.value, "difference": None}
    paired = compare(found.per_sequence, original.per_sequence)
    verdict = paired.verdict
    if higher_is_better and verdict != "tie":
        verdict = "worse" if verdict == "better" else "better"
    return {
        "original": original.value,
        "difference": {
            "value": paired.difference,
            "low": paired.low,
            "high": paired.high,
            "verdict": verdict,
        },
    }
