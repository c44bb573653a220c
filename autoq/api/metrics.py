"""Further metrics of checkpoints and plans by name, from the registered evaluators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from autoq.api.config import ScoringConfig
from autoq.api.measured import OTHER_DATA, PER_SEQUENCE
from autoq.api.task import LoadedModel, token_batches
from autoq.api.task_evaluation import folder_subject
from autoq.data import TokenData
from autoq.errors import InputError
from autoq.evaluators import Estimate, Reference, Subject, known_metrics, measure_metrics
from autoq.evaluators.metrics import wanted
from autoq.layers.simulate import SimulatedModel
from autoq.progress import Progress
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study


def wanted_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """Full names of metrics; refuses tasks, which are named otherwise.

    Raises:
        InputError: a name is unknown, or that of a task.
    """
    found = wanted(names)
    if found.tasks:
        raise InputError(
            f"{', '.join(found.tasks)} must be a metric, and is an evaluation task; name it with "
            "--tasks"
        )
    return found.metrics


def plan_metrics(
    study: Study,
    plan: PlanRecord,
    tokens: TokenData,
    names: Sequence[str],
    *,
    data: str | None,
    progress: Progress,
) -> dict[str, dict[str, float | None]]:
    """Measure metrics of a study's plan, simulated in its own model, and store them."""
    loaded = study.loaded()
    batches = token_batches(tokens, study.config.batch_size, loaded.device)
    simulated = study.simulate(plan)
    try:
        subject = Subject(model=simulated.model, tokenizer=loaded.tokenizer)
        reference = Reference(batches, lambda: _paused(simulated))
        found = _measure(subject, reference, names, progress)
    finally:
        simulated.restore()
    other_data: dict[str, Any] = {} if data is None else {OTHER_DATA: data}
    study.store.add_measurements(
        study.id,
        {name: (estimate.value, _interval(estimate)) for name, estimate in found.items()},
        plan_id=plan.id,
        label=plan.label,
        details=other_data,
        details_by_metric={
            name: {PER_SEQUENCE: list(estimate.per_sequence)} for name, estimate in found.items()
        },
        tokens=int(tokens.ids.size),
        data_sha256=tokens.sha256,
    )
    return {name: _plain(estimate) for name, estimate in found.items()}


@contextmanager
def _paused(simulated: SimulatedModel) -> Iterator[nn.Module]:
    with simulated.paused():
        yield simulated.model


def folder_metrics(
    path: Path,
    original: LoadedModel,
    batches: Sequence[Tensor],
    names: Sequence[str],
    config: ScoringConfig,
    progress: Progress,
) -> dict[str, dict[str, float | None]]:
    """Measure metrics of a checkpoint, packed as it runs, beside the original."""
    subject = folder_subject(
        path,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    reference = Reference(batches, lambda: nullcontext(original.model))
    found = _measure(subject, reference, names, progress)
    return {name: _plain(estimate) for name, estimate in found.items()}


def _measure(
    subject: Subject, reference: Reference, names: Sequence[str], progress: Progress
) -> dict[str, Estimate]:
    with progress.task(f"measuring {', '.join(names)}", len(reference.batches)) as advance:
        found = measure_metrics(subject, reference, names, advance=advance)
    # What else the same evaluators gave was not asked for.
    known = known_metrics()
    return {name: found[name] for name in names if name in found and name in known}


def _interval(estimate: Estimate) -> tuple[float, float] | None:
    known = math.isfinite(estimate.low) and math.isfinite(estimate.high)
    return (estimate.low, estimate.high) if known else None


def _plain(estimate: Estimate) -> dict[str, float | None]:
    low, high = _interval(estimate) or (None, None)
    return {"value": estimate.value, "low": low, "high": high}
