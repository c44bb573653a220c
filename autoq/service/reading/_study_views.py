"""Studies as the service shows them: lists, details, trials, exports."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from autoq.service.problems import shown
from autoq.studies import (
    ExportRecord,
    MeasurementRecord,
    StageRecord,
    StudyRecord,
    TrialRecord,
    WorkStatus,
)
from autoq.wire import (
    ExportEntry,
    ExportFileEntry,
    Measurement,
    StageEntry,
    StudyEntry,
    StudyStatus,
    TrialEntry,
)

PublicPath = Callable[[str], str]
"""A path of the server's -> what clients see of it."""


def study_entry(entry: Mapping[str, Any], public_path: PublicPath) -> StudyEntry:
    """A line of the list, of what `autoq.studies.listing` says."""
    return StudyEntry(
        name=entry["name"],
        model=public_path(entry["model"]),
        status=StudyStatus(entry["status"]),
        created=entry["created"],
        updated=entry["updated"],
        budgets=tuple(entry["budgets"]),
        other_budgets=tuple(entry["other_budgets"]),
        exports=entry["exports"],
    )


def study_status(record: StudyRecord, *, is_held: bool) -> StudyStatus:
    """How far the study is; one that runs in no process was interrupted."""
    if record.status is WorkStatus.RUNNING and not is_held:
        return StudyStatus.INTERRUPTED
    return StudyStatus(record.status.value)


def stage_entry(stage: StageRecord) -> StageEntry:
    """A step of the study."""
    return StageEntry(
        name=stage.name,
        status=stage.status.value,
        started=stage.started,
        finished=stage.finished,
        seconds=stage.seconds,
    )


def measurement_entry(record: MeasurementRecord) -> Measurement:
    """A measured number."""
    return Measurement(
        plan=record.plan_id,
        label=record.label,
        metric=record.metric,
        value=record.value,
        interval=record.interval,
        tokens=record.tokens,
        created=record.created,
    )


def export_entry(record: ExportRecord, public_path: PublicPath) -> ExportEntry:
    """A checkpoint."""
    return ExportEntry(
        id=record.id,
        plan=record.plan_id,
        container=record.container,
        path=public_path(record.path),
        status=record.status.value,
        bytes=record.bytes_written,
        verification=shown(record.verification),
        started=record.started,
        finished=record.finished,
        files=tuple(
            ExportFileEntry(path=file.path, bytes=file.size_bytes, sha256=file.sha256)
            for file in record.files
        ),
    )


def trial_entry(record: TrialRecord) -> TrialEntry:
    """A trial; attributes that Optuna holds as JSON in text are read."""
    attributes = {name: shown(_plain(value)) for name, value in record.attributes.items()}
    return TrialEntry(
        number=record.number,
        refinement=record.refinement,
        state=record.state,
        started=record.started,
        finished=record.finished,
        values=record.values,
        effective_bits=_number(attributes.pop("effective_bits", None)),
        predicted_loss=_number(attributes.pop("predicted_loss", None)),
        attributes=attributes,
    )


def without_places(value: Any, public_path: PublicPath) -> Any:
    """Plain data whose texts that are absolute paths are shown as clients see them."""
    if isinstance(value, str):
        return public_path(value) if os.path.isabs(value) else shown(value)
    if isinstance(value, Mapping):
        return {key: without_places(entry, public_path) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(entry, public_path) for entry in value]
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
