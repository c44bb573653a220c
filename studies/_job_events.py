"""Events of jobs: written in the order of their ids, kept within bounds, read after an id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.orm import Session

from autoq.studies._base import Repository
from autoq.studies._encoding import iso_time, json_clean
from autoq.studies._schema import JobEventRow, JobRow
from autoq.studies.job_records import JobEvent, JobEventRecord

STATUS, PROGRESS, LOG = "status", "progress", "log"

MOST_KEPT: Mapping[str, int] = {LOG: 5_000, PROGRESS: 200}
"""Kind of event -> how many of a job are kept, the newest; of other kinds all are."""

_WRITING_EVENTS = 0x6175746F  # any number that nobody else locks: "auto"


class JobEventRepository(Repository):
    """What happened to jobs."""

    def events_after(
        self,
        after: int = 0,
        *,
        job: str | None = None,
        study: str | None = None,
        kind: str | None = None,
        limit: int = 1000,
    ) -> list[JobEventRecord]:
        """Events of a higher id, by rising id: of a job, of all jobs of a study, or of all."""
        query = (
            select(JobEventRow, JobRow.public_id)
            .join(JobRow, JobRow.id == JobEventRow.job_id)
            .where(JobEventRow.id > after)
            .order_by(JobEventRow.id)
            .limit(limit)
        )
        if job is not None:
            query = query.where(JobRow.public_id == job)
        if study is not None:
            query = query.where(JobRow.study_name == study)
        if kind is not None:
            query = query.where(JobEventRow.kind == str(kind))
        with self._database.read() as session:
            return [_record(row, public_id) for row, public_id in session.execute(query)]

    def newest_event(self) -> int:
        """The highest id that was given; 0 before the first event."""
        with self._database.read() as session:
            return session.scalar(select(func.max(JobEventRow.id))) or 0


def status_event(row: JobRow) -> JobEvent:
    """The job's status, and its problem if it failed."""
    data: dict[str, Any] = {"status": str(row.status)}
    if row.problem is not None:
        data["problem"] = row.problem
    return JobEvent(kind=STATUS, data=data)


def add_events(session: Session, row: JobRow, events: Sequence[JobEvent], moment: datetime) -> None:
    """Write events of a job, as the last thing that the transaction does.

    Ids are given when rows are written, and seen when transactions end. So that nobody who reads
    on after an id misses a lower one, one transaction at a time has ids that are not seen yet.
    """
    if not events:
        return
    if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer anyway
        session.flush()
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITING_EVENTS})
    values = [
        {"job_id": row.id, "time": moment, "kind": str(event.kind), "data": json_clean(event.data)}
        for event in events
    ]
    session.execute(insert(JobEventRow), values)
    for kind in {str(event.kind) for event in events} & MOST_KEPT.keys():
        _prune(session, row.id, kind, MOST_KEPT[kind])


def _prune(session: Session, job_id: int, kind: str, most: int) -> None:
    """Delete all but the newest events of a kind."""
    of_kind = (JobEventRow.job_id == job_id, JobEventRow.kind == kind)
    newest = select(JobEventRow.id).where(*of_kind).order_by(JobEventRow.id.desc())
    last_to_go = session.scalar(newest.offset(most).limit(1))
    if last_to_go is not None:
        session.execute(delete(JobEventRow).where(*of_kind, JobEventRow.id <= last_to_go))


def _record(row: JobEventRow, public_id: str) -> JobEventRecord:
    return JobEventRecord(
        id=row.id, job=public_id, time=iso_time(row.time), kind=row.kind, data=row.data
    )
