"""Who runs a job: claimed by one process at a time, which says that it lives, and how it ends."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import getpid
from typing import Any

from sqlalchemy import Select, delete, func, or_, select, text, update
from sqlalchemy.orm import Session

from autoq.errors import StudyLockedError
from autoq.studies._base import Repository
from autoq.studies._clock import Instant, now
from autoq.studies._encoding import json_clean
from autoq.studies._job_events import add_events, status_event
from autoq.studies._jobs import end_job, job_record, queue_again
from autoq.studies._leases import hold, is_alive, renewed
from autoq.studies._schema import JobLeaseRow, JobRow, RunnerRow
from autoq.studies.job_records import JobClaim, JobEvent, JobRecord, JobStatus

JOB_LEASE_SECONDS = 60.0
"""How long a job is held without a sign of life; runners give one every few seconds."""

MOST_DEATHS = 3
"""A job whose process died so often is not begun again: it may be what kills them."""

LOST_JOB = (
    "this process no longer holds its job: it gave no sign of life for too long and another "
    "process took the job over"
)

_ACTIVE = (JobStatus.RUNNING, JobStatus.CANCELLING)
_CLAIMING = 0x6A6F6273  # any number that nobody else locks: "jobs"


class JobClaimRepository(Repository):
    """Jobs as their runners see them."""

    def claim_job(
        self, *, most_running: int | None = None, lease_seconds: float = JOB_LEASE_SECONDS
    ) -> JobClaim | None:
        """The oldest job that waits, for this process to run; None where there is none.

        Jobs whose runners gave no sign of life are taken back first. One job of a study runs at a
        time.

        Args:
            most_running: of all jobs of the store; no more is claimed while as many run.
        """
        if not self._may_have_work():
            return None
        with self._database.write() as session:
            _one_at_a_time(session)
            _take_back_from_the_dead(session)
            if most_running is not None and _count_active(session) >= most_running:
                return None
            row = session.scalars(_next_job().with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            return _claimed(session, row, now(session), lease_seconds)

    def heartbeat_job(self, claim: JobClaim) -> JobStatus:
        """Say that the job goes on; "cancelling" where it should not.

        Raises:
            StudyLockedError: another process has taken the job over.
        """
        return self.append_events(claim, ())

    def job_status(self, claim: JobClaim) -> JobStatus:
        """What became of the job; writes nothing.

        Raises:
            StudyLockedError: another process has taken the job over.
        """
        query = select(JobRow.status, JobLeaseRow.owner)
        query = query.outerjoin(JobLeaseRow, JobLeaseRow.job_id == JobRow.id)
        with self._database.read() as session:
            found = session.execute(query.where(JobRow.id == claim.job.number)).one_or_none()
        if found is None or found.owner != claim.owner:
            raise StudyLockedError(LOST_JOB)
        return JobStatus(found.status)

    def append_events(
        self,
        claim: JobClaim,
        events: Sequence[JobEvent],
        *,
        progress: Mapping[str, Any] | None = None,
        study: str | None = None,
    ) -> JobStatus:
        """Add events, in their order, which is a sign of life, too.

        Args:
            progress: the newest, which the job itself shows; None leaves it.
            study: the name of the study that the job works on, once it is known.
        Raises:
            StudyLockedError: another process has taken the job over.
        """
        with self._held(claim) as (session, row, moment):
            lease = update(JobLeaseRow).where(JobLeaseRow.job_id == row.id)
            session.execute(lease.values(renewed(moment, claim.lease_seconds)))
            if progress is not None:
                row.progress = json_clean(progress)
            if study is not None:
                row.study_name = study
            add_events(session, row, events, moment.wall)
            return JobStatus(row.status)

    def finish_job(self, claim: JobClaim, result: Mapping[str, Any]) -> JobRecord:
        """Say that the job is done, whether it was to be cancelled or not.

        Raises:
            StudyLockedError: another process has taken the job over.
        """
        return self._end(claim, JobStatus.DONE, result=result)

    def fail_job(self, claim: JobClaim, problem: Mapping[str, Any]) -> JobRecord:
        """Say why the job failed.

        Raises:
            StudyLockedError: another process has taken the job over.
        """
        return self._end(claim, JobStatus.FAILED, problem=problem)

    def end_cancelled_job(self, claim: JobClaim) -> JobRecord:
        """Say that the job's process was stopped because it was to be.

        Raises:
            StudyLockedError: another process has taken the job over.
        """
        return self._end(claim, JobStatus.CANCELLED)

    def give_back_job(self, claim: JobClaim) -> JobRecord:
        """Let another process go on with the job; one that is to be cancelled ends.

        Raises:
            StudyLockedError: another process has taken the job over.
        """
        with self._held(claim) as (session, row, moment):
            if row.status == JobStatus.CANCELLING:
                end_job(session, row, JobStatus.CANCELLED, moment.wall)
            else:
                queue_again(session, row, moment.wall)
            _drop_lease(session, row)
            return job_record(row)

    def record_death(self, claim: JobClaim, how: str) -> JobRecord:
        """The process that did the job was killed: queue the job again, unless that was too often.

        Args:
            how: it ended, as the reason of the last death says.
        Raises:
            StudyLockedError: another process has taken the job over.
        """
        with self._held(claim) as (session, row, moment):
            _after_death(session, row, moment, how)
            return job_record(row)

    def live_runners(self) -> int:
        """How many processes wait for jobs or run some."""
        with self._database.read() as session:
            moment = now(session)
            return sum(is_alive(row, moment) for row in session.scalars(select(RunnerRow)))

    def note_runner(self, owner: str, lease_seconds: float = JOB_LEASE_SECONDS) -> None:
        """Say that this process runs jobs; `forget_runner` takes that back.

        Args:
            owner: any name that is the process's own.
        """
        with self._database.write() as session:
            moment = now(session)
            row = session.scalars(select(RunnerRow).where(RunnerRow.owner == owner)).first()
            if row is None:
                _forget_dead_runners(session, moment)
                row = RunnerRow()
                session.add(row)
            hold(row, owner, moment, lease_seconds)

    def forget_runner(self, owner: str) -> None:
        """The process runs no jobs any more."""
        with self._database.write() as session:
            session.execute(delete(RunnerRow).where(RunnerRow.owner == owner))

    def _may_have_work(self) -> bool:
        """Whether claiming may find something: looking takes no lock, so idle runners stop nobody."""
        with self._database.read() as session:
            if session.scalars(_next_job()).first() is not None:
                return True
            moment = now(session)
            rows = session.execute(_active_jobs()).all()
            return any(lease is None or not is_alive(lease, moment) for _, lease in rows)

    def _end(
        self,
        claim: JobClaim,
        status: JobStatus,
        *,
        problem: Mapping[str, Any] | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> JobRecord:
        with self._held(claim) as (session, row, moment):
            end_job(session, row, status, moment.wall, problem=problem, result=result)
            _drop_lease(session, row)
            return job_record(row)

    @contextmanager
    def _held(self, claim: JobClaim) -> Iterator[tuple[Session, JobRow, Instant]]:
        """The job's row, locked, in a transaction of who holds it.

        Raises:
            StudyLockedError: another process has taken the job over.
        """
        with self._database.write() as session:
            row = session.get(JobRow, claim.job.number, with_for_update=True)
            owner = select(JobLeaseRow.owner).where(JobLeaseRow.job_id == claim.job.number)
            if row is None or session.scalar(owner) != claim.owner:
                raise StudyLockedError(LOST_JOB)
            yield session, row, now(session)


def _one_at_a_time(session: Session) -> None:
    """Claims of a PostgreSQL server wait for each other, as all writers of a SQLite file do.

    Rows alone could be locked, but not the rules about how many run, and of which study.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CLAIMING})


def _next_job() -> Select[JobRow]:
    busy = select(JobRow.study_name).where(
        JobRow.status.in_(_ACTIVE), JobRow.study_name.is_not(None)
    )
    is_free = or_(JobRow.study_name.is_(None), JobRow.study_name.not_in(busy))
    waits = select(JobRow).where(JobRow.status == JobStatus.QUEUED, is_free)
    return waits.order_by(JobRow.id).limit(1)


def _active_jobs() -> Select[JobRow, JobLeaseRow | None]:
    leased = select(JobRow, JobLeaseRow).outerjoin(JobLeaseRow, JobLeaseRow.job_id == JobRow.id)
    return leased.where(JobRow.status.in_(_ACTIVE)).order_by(JobRow.id)


def _count_active(session: Session) -> int:
    count = select(func.count()).select_from(JobRow).where(JobRow.status.in_(_ACTIVE))
    return session.scalar(count) or 0


def _claimed(session: Session, row: JobRow, moment: Instant, lease_seconds: float) -> JobClaim:
    owner = uuid.uuid4().hex
    lease = JobLeaseRow(job_id=row.id)
    hold(lease, owner, moment, lease_seconds)
    session.add(lease)
    row.status = JobStatus.RUNNING
    row.started = row.started or moment.wall
    row.attempts += 1
    row.worker = f"{socket.gethostname()}:{getpid()}"
    row.progress = None
    add_events(session, row, [status_event(row)], moment.wall)
    return JobClaim(job=job_record(row), owner=owner, lease_seconds=lease_seconds)


def _take_back_from_the_dead(session: Session) -> None:
    """Queue, end or fail the jobs whose runners gave no sign of life."""
    # Locked, so that a runner shows a sign of life before this look or loses its job.
    rows = session.execute(_active_jobs().with_for_update(of=JobRow, skip_locked=True)).all()
    moment = now(session)
    for row, lease in rows:
        if lease is None or not is_alive(lease, moment):
            _after_death(session, row, moment, "it gave no sign of life any more")


def _after_death(session: Session, row: JobRow, moment: Instant, how: str) -> None:
    row.deaths += 1
    if row.status == JobStatus.CANCELLING:
        end_job(session, row, JobStatus.CANCELLED, moment.wall)
    elif row.deaths >= MOST_DEATHS:
        end_job(session, row, JobStatus.FAILED, moment.wall, problem=_deadly(row, how))
    else:
        note = {"text": f"the process that did the job ended: {how}; it is begun again"}
        add_events(session, row, [JobEvent(kind="note", data=note)], moment.wall)
        queue_again(session, row, moment.wall)
    _drop_lease(session, row)


def _deadly(row: JobRow, how: str) -> dict[str, Any]:
    return {
        "type": "urn:autoq:problem:internal",
        "title": "The job's process died",
        "status": 500,
        "detail": (
            f"a job is begun again {MOST_DEATHS - 1} times when its process dies, and the process "
            f"of job {row.public_id} died {row.deaths} times, the last time because {how}; see "
            "that the machine has enough memory and the job's log, then resume it"
        ),
    }


def _drop_lease(session: Session, row: JobRow) -> None:
    session.execute(delete(JobLeaseRow).where(JobLeaseRow.job_id == row.id))


def _forget_dead_runners(session: Session, moment: Instant) -> None:
    for row in session.scalars(select(RunnerRow)).all():
        if not is_alive(row, moment):
            session.delete(row)
