"""Frozen snapshots of jobs and of what happened to them; see `records` for what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from autoq.errors import AutoqError, InputError


class JobStatus(StrEnum):
    """How far a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"  # it runs, and is to stop
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_ended(self) -> bool:
        """Whether no process works on it, or will unless it is resumed."""
        return self in _ENDED


_ENDED = (JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED)


class JobStateError(AutoqError):
    """A job is not in the state in which that can be done, such as cancelled after its end."""


class IdempotencyError(InputError):
    """A key that stands for one request was given with another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """Something that the service was asked to do."""

    number: int  # rises with every job
    id: str  # 32 hexadecimal digits
    kind: str
    status: JobStatus
    study: str | None  # name, as soon as it is known
    request: dict[str, Any]
    created_by: str
    created: str
    started: str | None  # of the first attempt
    finished: str | None
    attempts: int
    deaths: int  # attempts that ended with the death of a process
    worker: str | None  # host:pid of the last
    progress: dict[str, Any] | None
    problem: dict[str, Any] | None
    result: dict[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that is to be told of a job."""

    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEventRecord(JobEvent):
    """Something that happened to a job; ids rise, over all jobs."""

    id: int
    job: str
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobClaim:
    """The right to run a job, for as long as signs of life are given."""

    job: JobRecord
    owner: str
    lease_seconds: float
