"""Jobs: added once, looked at, cancelled, queued again."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from autoq.errors import UnknownNameError
from autoq.studies._base import Repository
from autoq.studies._clock import now
from autoq.studies._database import StoreConflictError
from autoq.studies._encoding import canonical_json, iso_time, json_clean, sha256_hex
from autoq.studies._job_events import add_events, status_event
from autoq.studies._schema import JobRow
from autoq.studies.job_records import (
    IdempotencyError,
    JobRecord,
    JobStateError,
    JobStatus,
)


class JobRepository(Repository):
    """The jobs of a store, as whoever asks for them sees them; `_job_claims` is for who runs them."""

    def add_job(
        self,
        *,
        kind: str,
        request: Mapping[str, Any],
        created_by: str,
        study: str | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[JobRecord, bool]:
        """Queue a job; whether it is new, too.

        Args:
            created_by: who asks; keys of one say nothing of another's.
            study: the name of the study that it works on, where that is known.
            idempotency_key: the same key and request give the same job again.
        Raises:
            IdempotencyError: the key stands for another request.
        """
        asked: dict[str, Any] = {"kind": kind, "request": request}
        if study is not None:  # the same request on another study is another one
            asked["study"] = study
        sha256 = sha256_hex(canonical_json(asked).encode())
        fresh = JobRow(
            public_id=uuid.uuid4().hex,
            kind=str(kind),
            status=JobStatus.QUEUED,
            study_name=study,
            request=json_clean(request),
            request_sha256=sha256,
            created_by=created_by,
            idempotency_key=idempotency_key,
            attempts=0,
            deaths=0,
        )
        try:
            return self._get_or_queue(fresh)
        except StoreConflictError:
            # Another process queued it between our look and our insert; now it is found.
            return self._get_or_queue(fresh)

    def job(self, job_id: str) -> JobRecord:
        """The job with this id.

        Raises:
            UnknownNameError: there is none.
        """
        with self._database.read() as session:
            return job_record(job_row(session, job_id))

    def jobs(
        self,
        *,
        limit: int = 50,
        before: int | None = None,
        status: str | None = None,
        study: str | None = None,
        kind: str | None = None,
    ) -> list[JobRecord]:
        """Jobs, the newest first.

        Args:
            before: only those of lower numbers: a page goes on after the last of the one before.
        """
        query = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
        if before is not None:
            query = query.where(JobRow.id < before)
        for column, wanted in (
            (JobRow.status, status),
            (JobRow.study_name, study),
            (JobRow.kind, kind),
        ):
            if wanted is not None:
                query = query.where(column == str(wanted))
        with self._database.read() as session:
            return [job_record(row) for row in session.scalars(query)]

    def count_jobs(self) -> dict[JobStatus, int]:
        """How many there are of every status."""
        query = select(JobRow.status, func.count()).group_by(JobRow.status)
        with self._database.read() as session:
            found = {row[0]: row[1] for row in session.execute(query)}
        return {status: found.get(status.value, 0) for status in JobStatus}

    def request_cancel(self, job_id: str) -> JobRecord:
        """Let a job stop; one that nobody has begun is cancelled at once.

        Raises:
            UnknownNameError: there is no such job.
            JobStateError: it has ended.
        """
        with self._database.write() as session:
            row = job_row(session, job_id, lock=True)
            status = JobStatus(row.status)
            if status.is_ended:
                raise JobStateError(
                    f"a job can be cancelled until it has ended, and job {job_id} is {status}; "
                    "resume it to go on with a failed or cancelled one"
                )
            moment = now(session).wall
            if status is JobStatus.QUEUED:
                end_job(session, row, JobStatus.CANCELLED, moment)
            elif status is JobStatus.RUNNING:
                row.status = JobStatus.CANCELLING
                add_events(session, row, [status_event(row)], moment)
            return job_record(row)

    def resume_job(self, job_id: str) -> JobRecord:
        """Queue a failed or cancelled job again; what its study has found is not done twice.

        Raises:
            UnknownNameError: there is no such job.
            JobStateError: it has not ended, or it is done.
        """
        with self._database.write() as session:
            row = job_row(session, job_id, lock=True)
            if row.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
                raise JobStateError(
                    f"a job is resumed after it failed or was cancelled, and job {job_id} is "
                    f"{row.status}"
                )
            row.deaths = 0
            queue_again(session, row, now(session).wall)
            return job_record(row)

    def _get_or_queue(self, fresh: JobRow) -> tuple[JobRecord, bool]:
        with self._database.write() as session:
            known = _with_key(session, fresh)
            if known is not None:
                return job_record(known), False
            fresh.created = now(session).wall
            session.add(fresh)
            session.flush()
            add_events(session, fresh, [status_event(fresh)], fresh.created)
            return job_record(fresh), True


def job_row(session: Session, job_id: str, *, lock: bool = False) -> JobRow:
    """
    Raises:
        UnknownNameError: there is no such job.
    """
    query = select(JobRow).where(JobRow.public_id == job_id)
    row = session.scalars(query.with_for_update() if lock else query).one_or_none()
    if row is None:
        raise UnknownNameError(f"no job has id {job_id!r}; the list of jobs shows those there are")
    return row


def queue_again(session: Session, row: JobRow, moment: datetime) -> None:
    """Let the job wait for the next runner."""
    row.status = JobStatus.QUEUED
    row.finished = row.problem = row.result = None
    add_events(session, row, [status_event(row)], moment)


def end_job(
    session: Session,
    row: JobRow,
    status: JobStatus,
    moment: datetime,
    *,
    problem: Mapping[str, Any] | None = None,
    result: Mapping[str, Any] | None = None,
) -> None:
    """Say how the job ended."""
    row.status = status
    row.finished = moment
    row.problem = json_clean(problem)
    row.result = json_clean(result)
    add_events(session, row, [status_event(row)], moment)


def job_record(row: JobRow) -> JobRecord:
    """A snapshot of the row."""
    return JobRecord(
        number=row.id,
        id=row.public_id,
        kind=row.kind,
        status=JobStatus(row.status),
        study=row.study_name,
        request=row.request,
        created_by=row.created_by,
        created=iso_time(row.created),
        started=None if row.started is None else iso_time(row.started),
        finished=None if row.finished is None else iso_time(row.finished),
        attempts=row.attempts,
        deaths=row.deaths,
        worker=row.worker,
        progress=row.progress,
        problem=row.problem,
        result=row.result,
    )


def _with_key(session: Session, fresh: JobRow) -> JobRow | None:
    """The job that was made of the same request under the same key.

    Raises:
        IdempotencyError: the one under the key was made of another request.
    """
    if fresh.idempotency_key is None:
        return None
    known = session.scalars(
        select(JobRow).where(
            JobRow.created_by == fresh.created_by, JobRow.idempotency_key == fresh.idempotency_key
        )
    ).first()
    if known is not None and known.request_sha256 != fresh.request_sha256:
        raise IdempotencyError(
            f"an idempotency key stands for one request, and {fresh.idempotency_key!r} was given "
            f"with another before (job {known.public_id}); use a new key for a new request"
        )
    return known
