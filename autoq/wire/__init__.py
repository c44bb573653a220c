"""What the service and its clients say to each other: requests, replies, events and problems.

Both sides use these types, so neither can drift from the other; they load neither torch nor the
service. Unknown fields of requests are refused, and unknown fields of replies are passed over, so
that an older client reads a newer server.
"""

from autoq.wire._jobs import Event, EventKind, Job, JobKind, JobPage, JobProgress, JobStatus
from autoq.wire._plans import (
    Frontier,
    FrontierPoint,
    PlanReply,
    PlanRequest,
    Sensitivities,
    SensitivityGroup,
)
from autoq.wire._problem import PROBLEM_MEDIA_TYPE, Problem
from autoq.wire._requests import (
    ExportRequest,
    MeasureRequest,
    RefineRequest,
    SearchRequest,
    VerifyRequest,
)
from autoq.wire._service import (
    FormatEntry,
    Identity,
    ModelEntry,
    Readiness,
    Scope,
    TargetEntry,
)
from autoq.wire._studies import (
    ExportEntry,
    ExportFileEntry,
    Measurement,
    StageEntry,
    StudyDetail,
    StudyEntry,
    StudyPage,
    StudyStatus,
    TrialEntry,
    TrialPage,
)

__all__ = [
    "PROBLEM_MEDIA_TYPE",
    "Event",
    "EventKind",
    "ExportEntry",
    "ExportFileEntry",
    "ExportRequest",
    "FormatEntry",
    "Frontier",
    "FrontierPoint",
    "Identity",
    "Job",
    "JobKind",
    "JobPage",
    "JobProgress",
    "JobStatus",
    "MeasureRequest",
    "Measurement",
    "ModelEntry",
    "PlanReply",
    "PlanRequest",
    "Problem",
    "Readiness",
    "RefineRequest",
    "Scope",
    "SearchRequest",
    "Sensitivities",
    "SensitivityGroup",
    "StageEntry",
    "StudyDetail",
    "StudyEntry",
    "StudyPage",
    "StudyStatus",
    "TargetEntry",
    "TrialEntry",
    "TrialPage",
    "VerifyRequest",
]
