"""A study and all that it led to, taken out of the store."""

from __future__ import annotations

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from autoq.errors import StudyLockedError, UnknownNameError
from autoq.studies._base import Repository
from autoq.studies._blobs import drop_unused
from autoq.studies._clock import now
from autoq.studies._leases import is_alive
from autoq.studies._schema import ArrayRow, JobRow, LeaseRow, StudyRow
from autoq.studies._trial_deletion import delete_trials
from autoq.studies.job_records import JobStateError, JobStatus

_UNFINISHED = tuple(status for status in JobStatus if not status.is_ended)


class DeletionRepository(Repository):
    """What makes a study go."""

    def delete_study(self, study_id: int) -> None:
        """Delete a study with its stages, arrays, plans, measurements, records of exports and trials.

        Its checkpoints stay where they are, and so do its jobs, which name no study any more.

        Raises:
            UnknownNameError: there is no such study.
            StudyLockedError: a process works on it.
            JobStateError: a job does, or waits to.
        """
        lease = select(LeaseRow).where(LeaseRow.study_id == study_id)
        with self._database.write() as session:
            # Locked before the study, as by who holds it: else each could wait for the other.
            session.scalars(lease.with_for_update()).all()
            row = session.get(StudyRow, study_id, with_for_update=True)
            if row is None:
                raise UnknownNameError(
                    f"no study has id {study_id}; `autoq list` shows those there are"
                )
            _refuse_held(session, row, session.scalars(lease).one_or_none())
            _refuse_unfinished_jobs(session, row)
            of_study = JobRow.study_name == row.name
            session.execute(update(JobRow).where(of_study).values(study_name=None))
            hashes = session.scalars(
                select(ArrayRow.sha256).where(ArrayRow.study_id == study_id)
            ).all()
            delete_trials(session, row.name)
            session.execute(delete(StudyRow).where(StudyRow.id == study_id))
            drop_unused(session, hashes)


def _refuse_held(session: Session, study: StudyRow, lease: LeaseRow | None) -> None:
    if lease is not None and is_alive(lease, now(session)):
        raise StudyLockedError(
            f"a study is deleted when no process works on it, and {study.name!r} is held by process "
            f"{lease.pid} on host {lease.host}; wait until it ends or stop it"
        )


def _refuse_unfinished_jobs(session: Session, study: StudyRow) -> None:
    unfinished = select(JobRow).where(
        JobRow.study_name == study.name, JobRow.status.in_(_UNFINISHED)
    )
    job = session.scalars(unfinished.limit(1)).first()
    if job is not None:
        raise JobStateError(
            f"a study is deleted when no job works on it or waits to, and job {job.public_id} of "
            f"{study.name!r} is {job.status}; cancel it first"
        )
