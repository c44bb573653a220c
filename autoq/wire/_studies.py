"""Studies as the service shows them. Times are ISO 8601 in UTC."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from autoq.wire._base import Reply
from autoq.wire._plans import PlanReply


class StudyStatus(StrEnum):
    """How far a study is; `interrupted`: its process ended before its work did."""

    TODO = "todo"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class StudyEntry(Reply):
    """A line of the list of studies."""

    name: str
    model: str
    status: StudyStatus
    created: str
    updated: str
    budgets: tuple[float, ...]  # in effective bits
    other_budgets: tuple[str, ...]
    exports: int


class StudyPage(Reply):
    """Studies, those that were worked on last first."""

    items: tuple[StudyEntry, ...]
    total: int
    next_cursor: str | None


class StageEntry(Reply):
    """One step of a study."""

    name: str
    status: str
    started: str | None
    finished: str | None
    seconds: float | None


class Measurement(Reply):
    """One number that was measured."""

    plan: int | None
    label: str
    metric: str
    value: float | None
    interval: tuple[float, float] | None
    tokens: int | None
    created: str


class ExportFileEntry(Reply):
    """One file of a checkpoint; the path is relative to its folder."""

    path: str
    bytes: int
    sha256: str


class ExportEntry(Reply):
    """One checkpoint; the path begins with the name of its root where it lies in one."""

    id: int
    plan: int
    container: str
    path: str
    status: str
    bytes: int | None
    verification: dict[str, Any]
    started: str
    finished: str | None
    files: tuple[ExportFileEntry, ...]


class StudyDetail(Reply):
    """Everything about a study that is not a table."""

    name: str
    model: str
    architecture: str
    model_fingerprint: str
    status: StudyStatus
    created: str
    updated: str
    configuration: dict[str, Any]
    versions: dict[str, Any]
    stages: tuple[StageEntry, ...]
    groups: int | None  # None until discovery is done
    formats: tuple[str, ...]
    excluded: tuple[dict[str, Any], ...]
    rules: tuple[str, ...]
    target: str | None
    unit: str | None
    plan: PlanReply | None  # the last one that was asked for, refined if it was
    plans: tuple[PlanReply, ...]  # with assignments left empty; show one to see it
    measurements: tuple[Measurement, ...]
    exports: tuple[ExportEntry, ...]
    job: str | None  # the newest job of the study


class TrialEntry(Reply):
    """One measured trial of a refinement."""

    number: int
    refinement: str  # the Optuna study
    state: str
    started: str | None
    finished: str | None
    values: tuple[float, ...]
    effective_bits: float | None
    predicted_loss: float | None
    attributes: dict[str, Any]


class TrialPage(Reply):
    """Trials, the oldest first."""

    items: tuple[TrialEntry, ...]
    total: int
    next_cursor: str | None
