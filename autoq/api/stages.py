"""The stages of a search: each leaves its result in the store before the next begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from autoq.api._model_map_json import model_map_to_json
from autoq.api._study_batches import StudyBatches
from autoq.api.certainty import Certainty
from autoq.api.costing import SIZES, sizes_of, sizes_to_plain
from autoq.api.measuring import measure_plans
from autoq.api.remarks import note_silent_groups
from autoq.api.reuse import (
    REUSED,
    calibration_fingerprint,
    merged_records,
    scores_fingerprint,
    take_over_calibration,
    take_over_scores,
    without_taken,
)
from autoq.api.scoring import BatchHelpers, ScoringPass, make_scoring_estimator
from autoq.api.serialize import array_names, calibration_to_plain
from autoq.api.streamed.streaming import CalibrationByBlocks, calibrate_streamed, streamed_estimator
from autoq.api.study import Study
from autoq.api.study_tables import CALIBRATION, DISCOVERY, MEASURE, SENSITIVITY, SOLVE
from autoq.api.task import LoadedModel, ScoringTask
from autoq.calibration import calibrate
from autoq.data import TokenData
from autoq.formats import NONE, FormatName, Target
from autoq.layers import LayerCalibration
from autoq.memory import give_back_freed_memory, peak_rss_bytes
from autoq.models import ModelMap, SlotName
from autoq.models.forward import layers_see_all
from autoq.progress import Progress, in_turn
from autoq.search import SensitivityTable
from autoq.search.stability import Solver
from autoq.studies import PlanRecord, SensitivityCell, WorkStatus

_NAMED = 6
"""Matrices that a note names before it counts the others."""


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
    """Calibrate every slot in every format that no other study has, in one pass over the data."""
    started = time.perf_counter()
    study.store.begin_stage(study.id, CALIBRATION)
    fingerprint = calibration_fingerprint(study, loaded, task)
    taken = take_over_calibration(study, fingerprint, progress)
    left = without_taken(study, taken)
    records: Sequence[Mapping[str, Any]] = ()
    if left is not None:
        calibrated = _calibrate_whole
        if loaded.stream is not None:
            calibrated = partial(calibrate_streamed, fingerprint=fingerprint)
        records, table = calibrated(left, loaded, task, progress)
        note_unseen_slots(table, progress)
        del table  # the next stages read it from the store
        give_back_freed_memory()
    tokens = sum(int(ids.numel()) for ids in task.batches)
    merged = merged_records(study, records, taken)
    payload = {"records": merged, "tokens": tokens}
    if taken.sources:
        payload[REUSED] = taken.sources
    seconds = time.perf_counter() - started
    study.store.finish_stage(
        study.id,
        CALIBRATION,
        seconds,
        payload,
        fingerprint=fingerprint,
        arrays={name for record in merged for name in array_names(record)},
    )


def _calibrate_whole(
    study: Study, loaded: LoadedModel, task: ScoringTask, progress: Progress
) -> tuple[list[dict[str, Any]], Mapping[tuple[SlotName, FormatName], LayerCalibration]]:
    """Calibrate the model in memory; see `calibrate_streamed`."""
    quantised = [name for name in study.config.formats if name != NONE]
    with in_turn(
        progress,
        ("calibrating", len(task.batches)),
        ("finding scales", len(quantised) * len(study.model_map.groups)),
    ) as (after_batch, after_group):
        table = calibrate(
            loaded.model,
            study.model_map,
            study.config.formats,
            task.batches,
            task.run_layers if layers_see_all(study.model_map) else task.run,
            run_small=task.run_small,
            container=study.config.container,
            scale_dtype=loaded.storage_dtype,
            method=study.config.calibration,
            after_batch=after_batch,
            after_group=after_group,
        )
    records, arrays = calibration_to_plain(table)
    study.store.put_arrays(study.id, CALIBRATION, arrays)
    return records, table


def note_unseen_slots(
    table: Mapping[tuple[SlotName, FormatName], LayerCalibration], progress: Progress
) -> None:
    """Name the matrices that no token of the calibration text reached, experts for the most part.

    Their scales follow from their weights, and those of their inputs from experts beside them.
    """
    unseen = list(
        dict.fromkeys(slot for (slot, _), entry in table.items() if entry.input_rows == 0)
    )
    if unseen:
        named = ", ".join(unseen[:_NAMED])
        more = f" and {len(unseen) - _NAMED} more" if len(unseen) > _NAMED else ""
        progress.note(
            f"no calibration token reached {named}{more}: scales follow from the weights there; more "
            "calibration text may reach them (--calib-sequences)"
        )


def run_sizes(study: Study, loaded: LoadedModel) -> None:
    """Count what the container writes in each format; calibration says which input scales."""
    started = time.perf_counter()
    study.store.begin_stage(study.id, SIZES)
    calibration = study.calibration if loaded.stream is None else CalibrationByBlocks(study)
    sizes = sizes_of(loaded, study.model_map, study.config, calibration)
    seconds = time.perf_counter() - started
    study.store.finish_stage(study.id, SIZES, seconds, sizes_to_plain(sizes))


def run_sensitivity(
    study: Study,
    loaded: LoadedModel,
    task: ScoringTask,
    progress: Progress,
    solver: Solver | None = None,
    helpers: BatchHelpers | None = None,
) -> None:
    """Score every group in every format; what the store has is not scored again.

    Args:
        solver: scores -> the plan that is asked for; the pass ends once the plan is as sure as
            the configuration's `confidence`. None scores all batches.
        helpers: who score beside this process.
    """
    study.store.begin_stage(study.id, SENSITIVITY)
    fingerprint = scores_fingerprint(study, loaded, task)
    payload = take_over_scores(study, fingerprint, progress)
    if payload is None:
        payload = _score(study, loaded, task, progress, solver, helpers)
    table = study.sensitivity_from(payload)
    note_silent_groups(study.model_map, table.contributions, progress)
    study.store.put_sensitivity(study.id, _sensitivity_cells(table))
    StudyBatches(study.store, study.id, SENSITIVITY).drop_states()
    seconds = study.store.score_seconds(study.id)
    study.store.finish_stage(study.id, SENSITIVITY, seconds, payload, fingerprint=fingerprint)


def _score(
    study: Study,
    loaded: LoadedModel,
    task: ScoringTask,
    progress: Progress,
    solver: Solver | None,
    helpers: BatchHelpers | None,
) -> dict[str, Any]:
    """One pass over the batches; see `run_sensitivity`. Returns the payload of the stage."""
    config = study.config
    make = partial(
        make_scoring_estimator,
        loaded=loaded,
        model_map=study.model_map,
        calibration=study.calibration,
        config=config,
    )
    if loaded.stream is not None:
        make = partial(streamed_estimator, study=study, loaded=loaded, task=task)
    batches = StudyBatches(study.store, study.id, SENSITIVITY)
    certainty = None if solver is None else Certainty(study.model_map, config.confidence, solver)
    with progress.task("scoring", len(task.batches)) as advance:
        scoring = ScoringPass(
            make=make,
            batches=len(task.batches),
            loss=task.loss,
            store=batches,
            advance=advance,
            note=progress.note,
            enough=None if certainty is None else certainty.is_enough,
            helpers=helpers,
        )
        estimator, contributions = scoring.run(config.estimator)
    batches.finish(contributions, estimator.results())
    payload: dict[str, Any] = {
        "formats": list(estimator.formats),
        "unit": estimator.unit,
        "estimator": estimator.name,
        "sequences": len(contributions),
        "batches": len(batches.batches()),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if helpers is not None:
        payload["workers"] = helpers.report()
    if certainty is not None:
        payload["stability"] = certainty.report(estimator, contributions, progress)
    return payload


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
    study: Study,
    choose: Callable[[], PlanRecord],
    rules: Sequence[str],
    *,
    target: Target | None = None,
) -> PlanRecord:
    """Choose a plan, and remember it as the study's choice, and where it is to run.

    Where there is none, or the process dies looking for it, the choice before stays.
    """
    started = time.perf_counter()
    plan = choose()
    seconds = time.perf_counter() - started
    place = None if target is None else str(target)
    payload = {"plan_id": plan.id, "label": plan.label, "rules": list(rules), "target": place}
    study.store.reset_stage(study.id, SOLVE)
    study.store.begin_stage(study.id, SOLVE)
    study.store.finish_stage(study.id, SOLVE, seconds, payload)
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
    if not missing and not _was_interrupted(study, MEASURE):
        return
    with study.repeated_stage(MEASURE):
        if missing:
            measure_plans(study, missing, held_out, progress=progress)


def _was_interrupted(study: Study, stage: str) -> bool:
    """Whether the stage was begun and not ended, be it that all its results are there."""
    record = study.store.stage(study.id, stage)
    return record is not None and record.status is not WorkStatus.DONE
