"""Frozen snapshots of what is stored: plain data that `json.dumps(asdict(record))` accepts.

Times are ISO 8601 text in UTC. A number that was NaN or infinite reads as None.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoq.search import Plan


class WorkStatus(StrEnum):
    """How far a study or one of its stages is."""

    TODO = "todo"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class ExportStatus(StrEnum):
    """How far an export is."""

    WRITING = "writing"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """What was asked, of which model, by which versions."""

    id: int
    name: str
    key: str  # SHA-256 of configuration and model fingerprint
    status: WorkStatus
    created: str
    updated: str
    model_path: str
    model_fingerprint: str
    architecture: str
    configuration: dict[str, Any]
    versions: dict[str, Any]  # package -> version
    seed: int
    schema_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySummary:
    """One line of a list of studies."""

    id: int
    name: str
    status: WorkStatus
    created: str
    updated: str
    model_path: str
    architecture: str
    stages: dict[str, WorkStatus]  # in the order they were begun
    plans: int
    exports: int  # complete ones
    is_held: bool  # a process works on it, as far as can be told

    @property
    def is_interrupted(self) -> bool:
        """Whether the process that worked on it ended before the work did."""
        return self.status is WorkStatus.RUNNING and not self.is_held


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One step of a study."""

    study_id: int
    name: str
    status: WorkStatus
    started: str | None
    finished: str | None
    seconds: float | None
    payload: dict[str, Any]  # of a failed stage: {"reason": ...}


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityCell:
    """Expected loss increase of one group in one format; None where it cannot take it."""

    group: str
    format: str
    score: float | None
    standard_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRecord:
    """A solved assignment; the fields are those of `autoq.search.Plan`."""

    id: int
    study_id: int
    label: str
    created: str
    budget_bits: float
    effective_bits: float
    peer_effective_bits: float
    stored_bits_per_weight: float
    stored_bytes: int
    predicted_loss: float | None
    predicted_loss_interval: tuple[float | None, float | None]
    bound: float | None
    gap: float | None
    assignment: dict[str, str]  # group -> format
    details: dict[str, Any]  # "budgets", "takes" and "least"; plans of old versions have none

    @property
    def budgets(self) -> dict[str, float]:
        """Resource -> limit that was asked for."""
        return {entry["resource"]: entry["limit"] for entry in self.details.get("budgets", ())}

    @property
    def takes(self) -> dict[str, float]:
        """Resource -> what the plan takes of it, for every resource that had costs."""
        return dict(self.details.get("takes", {}))

    def to_plan(self) -> Plan:
        """The plan as search made it; a number that was not finite is NaN."""
        from autoq.formats import FormatName
        from autoq.models import GroupName
        from autoq.search import Budget, Least, Plan, Resource

        low, high = self.predicted_loss_interval
        least = self.details.get("least")
        return Plan(
            assignment={GroupName(g): FormatName(f) for g, f in self.assignment.items()},
            budget_bits=self.budget_bits,
            effective_bits=self.effective_bits,
            peer_effective_bits=self.peer_effective_bits,
            stored_bits_per_weight=self.stored_bits_per_weight,
            stored_bytes=self.stored_bytes,
            predicted_loss=_number(self.predicted_loss),
            predicted_loss_interval=(_number(low), _number(high)),
            bound=_number(self.bound),
            gap=_number(self.gap),
            budgets=tuple(
                Budget(resource=Resource(name), limit=_number(limit))
                for name, limit in self.budgets.items()
            ),
            takes={Resource(name): _number(value) for name, value in self.takes.items()},
            least=None if least is None else Least(**_with_resource(least)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementRecord:
    """One number that was measured, and on what."""

    id: int
    study_id: int
    plan_id: int | None
    label: str
    metric: str
    value: float | None
    interval: tuple[float, float] | None
    details: dict[str, Any]
    tokens: int | None
    data_sha256: str | None
    created: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportFile:
    """One file of an export; the path is relative to the export's folder."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecord:
    """One checkpoint that was written, or was being written."""

    id: int
    study_id: int
    plan_id: int
    container: str
    path: str
    status: ExportStatus
    bytes_written: int | None
    verification: dict[str, Any]
    started: str
    finished: str | None
    files: tuple[ExportFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """Who works on a study."""

    study_id: int
    host: str
    pid: int
    acquired: str
    heartbeat: str
    expires: str


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _with_resource(least: dict[str, Any]) -> dict[str, Any]:
    from autoq.search import Resource

    numbers = {name: _number(value) for name, value in least.items() if name != "resource"}
    return {"resource": Resource(least["resource"]), **numbers}
