"""The stages of a search: each leaves its result in the store before the next begins."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from autoq.api.measuring import measure_plans
from autoq.api.serialize import calibration_to_plain, model_map_to_json
from autoq.api.study import (
    CALIBRATION,
    DISCOVERY,
    MEASURE,
    SENSITIVITY,
    SOLVE,
    Study,
    peak_rss_bytes,
)
from autoq.api.task import LoadedModel, ScoringTask
from autoq.calibration import calibrate
from autoq.data import TokenData
from autoq.formats import NONE, Target
from autoq.models import ModelMap
from autoq.progress import Progress
from autoq.search import SensitivityTable
from autoq.search.estimators import Estimator, make_estimator
from autoq.studies import PlanRecord, SensitivityCell, WorkStatus


def is_done(study: Study, stage: str) -> bool:
    """Whether the store has the stage's result."""
    record = study.store.stage(study.id, stage)
    return record is not None and record.status is WorkStatus.DONE


def discovery_payload(
    loaded: LoadedModel, model_map: ModelMap, unusable: Mapping[tuple[Any, Any], str]
) -> dict[str, Any]:
    """What discovery found, as plain data."""
    return {
        "model_map": model_map_to_json(model_map),
        "storage_dtype": str(loaded.storage_dtype).removeprefix("torch."),
        "inexpressible": [
            {"group": group, "format": fmt, "reason": reason}
            for (group, fmt), reason in unusable.items()
        ],
    }


def run_discovery(study: Study, discovered: Mapping[str, Any]) -> None:
    """Store what discovery found."""
    started = time.perf_counter()
    study.store.begin_stage(study.id, DISCOVERY)
    study.store.finish_stage(study.id, DISCOVERY, time.perf_counter() - started, discovered)


def run_calibration(
    study: Study, loaded: LoadedModel, task: ScoringTask, progress: Progress
) -> None:
    """Calibrate every slot in every format, in one pass over the data."""
    started = time.perf_counter()
    study.store.begin_stage(study.id, CALIBRATION)
    quantised = [name for name in study.config.formats if name != NONE]
    with (
        progress.task("calibrating", len(task.batches)) as after_batch,
        progress.task(
            "finding scales", len(quantised) * len(study.model_map.groups)
        ) as after_group,
    ):
        table = calibrate(
            loaded.model,
            study.model_map,
            study.config.formats,
            task.batches,
            task.run,
            run_small=task.run_small,
            container=study.config.container,
            scale_dtype=loaded.storage_dtype,
            after_batch=after_batch,
            after_group=after_group,
        )
    records, arrays = calibration_to_plain(table)
    study.store.put_arrays(study.id, CALIBRATION, arrays)
    study.store.finish_stage(
        study.id, CALIBRATION, time.perf_counter() - started, {"records": records}
    )


def run_sensitivity(
    study: Study, loaded: LoadedModel, task: ScoringTask, progress: Progress
) -> None:
    """Score every group in every format; batches that the store has are not scored again."""
    config = study.config
    scorer = make_estimator(
        config.estimator,
        loaded.model,
        study.model_map,
        config.formats,
        study.calibration,
        container=config.container,
        scale_dtype=loaded.storage_dtype,
        row_fraction=config.row_fraction,
        seed=config.seed,
        draws=config.draws,
    )
    study.store.begin_stage(study.id, SENSITIVITY)
    stored = study.store.score_batches(study.id)
    with progress.task("scoring", len(task.batches)) as advance:
        advance(len(stored))
        for index in range(len(task.batches)):
            if index in stored:
                continue
            started = time.perf_counter()
            scores = scorer.score_batch(index, partial(task.loss, index))
            study.store.put_score_batch(study.id, index, scores, time.perf_counter() - started)
            advance()
    _finish_sensitivity(study, scorer)


def _finish_sensitivity(study: Study, scorer: Estimator) -> None:
    payload = {
        "formats": list(scorer.formats),
        "unit": scorer.unit,
        "estimator": scorer.name,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    table = study.sensitivity_from(payload)
    study.store.put_sensitivity(study.id, _sensitivity_cells(table))
    seconds = study.store.score_seconds(study.id)
    study.store.finish_stage(study.id, SENSITIVITY, seconds, payload)


def _sensitivity_cells(table: SensitivityTable) -> list[SensitivityCell]:
    scores, errors = table.scores(), table.standard_errors()
    return [
        SensitivityCell(
            group=group,
            format=fmt,
            score=float(scores[row, column]),
            standard_error=float(errors[row, column]),
        )
        for row, group in enumerate(table.groups)
        for column, fmt in enumerate(table.formats)
    ]


def run_solve(
    study: Study, effective_bits: float, rules: Sequence[str], *, target: Target | None = None
) -> PlanRecord:
    """Solve for a budget, and remember the plan as the study's choice, and where it is to run."""
    with study.repeated_stage(SOLVE) as payload:
        plan = study.solve(effective_bits, rules=rules)
        payload.update(plan_id=plan.id, label=plan.label, rules=list(rules))
        payload["target"] = None if target is None else str(target)
    return plan


def run_measure(
    study: Study, plan: PlanRecord, held_out: TokenData, compare_uniform: bool, progress: Progress
) -> None:
    """Measure the plan, and each format throughout if asked, unless that was done before."""
    plans = [plan]
    if compare_uniform:
        plans += [study.uniform(name) for name in study.config.formats if name != NONE]
    measured = {
        record.plan_id
        for record in study.store.measurements(study.id)
        if record.data_sha256 == held_out.sha256
    }
    missing = [entry for entry in plans if entry.id not in measured]
    if not missing:
        return
    with study.repeated_stage(MEASURE):
        measure_plans(study, missing, held_out, progress=progress)
