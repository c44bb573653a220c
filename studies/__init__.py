"""The SQL study store: every step's result, as rows, as soon as it exists."""

from autoq.studies._base import SCORING_STAGE
from autoq.studies._encoding import study_key
from autoq.studies._leases import LEASE_SECONDS, StudyLease
from autoq.studies.records import (
    ExportFile,
    ExportRecord,
    ExportStatus,
    MeasurementRecord,
    PlanRecord,
    SensitivityCell,
    StageRecord,
    StudyRecord,
    StudySummary,
    WorkStatus,
)
from autoq.studies.repository import StudyStore

__all__ = [
    "LEASE_SECONDS",
    "SCORING_STAGE",
    "ExportFile",
    "ExportRecord",
    "ExportStatus",
    "MeasurementRecord",
    "PlanRecord",
    "SensitivityCell",
    "StageRecord",
    "StudyLease",
    "StudyRecord",
    "StudyStore",
    "StudySummary",
    "WorkStatus",
    "study_key",
]
