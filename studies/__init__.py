"""The SQL study store: every step's result, as rows, as soon as it exists."""

from autoq.studies._base import SCORING_STAGE
from autoq.studies._encoding import study_key
from autoq.studies._job_claims import JOB_LEASE_SECONDS, MOST_DEATHS
from autoq.studies._leases import LEASE_SECONDS, StudyLease
from autoq.studies._pages import INTERRUPTED, StudyFilter, StudyMarks
from autoq.studies._trial_pages import TrialRecord
from autoq.studies._trial_seals import SEALED, refuse_damaged_trial, trial_seal
from autoq.studies._trials import (
    GRACE_SECONDS,
    HEARTBEAT_SECONDS,
    WORKER,
    grace_seconds_of,
    has_heartbeat,
    is_in_memory,
    rewrite_finished_trials,
    trial_storage,
    worker_identity,
    worker_is_gone,
)
from autoq.studies.job_records import (
    IdempotencyError,
    JobClaim,
    JobEvent,
    JobEventRecord,
    JobRecord,
    JobStateError,
    JobStatus,
)
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
    "GRACE_SECONDS",
    "HEARTBEAT_SECONDS",
    "INTERRUPTED",
    "JOB_LEASE_SECONDS",
    "LEASE_SECONDS",
    "MOST_DEATHS",
    "SCORING_STAGE",
    "SEALED",
    "WORKER",
    "ExportFile",
    "ExportRecord",
    "ExportStatus",
    "IdempotencyError",
    "JobClaim",
    "JobEvent",
    "JobEventRecord",
    "JobRecord",
    "JobStateError",
    "JobStatus",
    "MeasurementRecord",
    "PlanRecord",
    "SensitivityCell",
    "StageRecord",
    "StudyFilter",
    "StudyLease",
    "StudyMarks",
    "StudyRecord",
    "StudyStore",
    "StudySummary",
    "TrialRecord",
    "WorkStatus",
    "grace_seconds_of",
    "has_heartbeat",
    "is_in_memory",
    "refuse_damaged_trial",
    "rewrite_finished_trials",
    "study_key",
    "trial_seal",
    "trial_storage",
    "worker_identity",
    "worker_is_gone",
]
