"""Work that the service does in processes of its own."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from autoq.wire._base import Reply
from autoq.wire._problem import Problem


class JobKind(StrEnum):
    """What a job does."""

    SEARCH = "search"
    REFINE = "refine"
    MEASURE = "measure"
    EXPORT = "export"
    VERIFY = "verify"


class JobStatus(StrEnum):
    """How far a job is; `resume` queues a failed or cancelled one again."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class JobProgress(Reply):
    """The task that runs now; `total` is 0 where nobody knows."""

    task: str
    done: int
    total: int
    seconds_left: float | None = None


class Job(Reply):
    """One job. Times are ISO 8601 in UTC."""

    id: str
    kind: JobKind
    status: JobStatus
    study: str | None  # name, as soon as it is known
    request: dict[str, Any]
    created: str
    started: str | None
    finished: str | None
    attempts: int
    worker: str | None  # host:pid
    progress: JobProgress | None
    problem: Problem | None
    result: dict[str, Any] | None


class JobPage(Reply):
    """Jobs, the newest first."""

    items: tuple[Job, ...]
    next_cursor: str | None


class EventKind(StrEnum):
    """What an event tells; `data` has the keys that stand beside each."""

    STATUS = "status"  # status, and of an ended job problem
    PROGRESS = "progress"  # task, done, total, seconds_left
    STAGE = "stage"  # name, status, seconds
    NOTE = "note"  # text
    TRIAL = "trial"  # number, state, values, accepted
    LOG = "log"  # text, stream


class Event(Reply):
    """Something that happened to a job; ids rise, so reading goes on after the last one seen."""

    id: int
    job: str
    time: str
    kind: EventKind
    data: dict[str, Any]
