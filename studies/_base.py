"""What the parts of the repository share."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from autoq.errors import StoreError, StudyLockedError, UnknownNameError
from autoq.studies._database import Database
from autoq.studies._encoding import utc_now
from autoq.studies._leases import LOST
from autoq.studies._schema import LeaseRow, StageRow, StudyRow
from autoq.studies.records import WorkStatus

SCORING_STAGE = "sensitivity"
"""The stage that owns score batches and sensitivity rows: resetting it deletes them."""


class Repository:
    """Base of the parts; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def _touched(self, session: Session, study_id: int) -> StudyRow:
        """The study's row, marked as changed now.

        Raises:
            UnknownNameError: there is no such study.
            StudyLockedError: this process had the lease on the study, and another has it now.
        """
        self._refuse_lost_lease(session, study_id)
        # Locked: its seal is of all columns, so they are not read by two who write them.
        row = session.get(StudyRow, study_id, with_for_update={"key_share": True})
        if row is None:
            raise UnknownNameError(
                f"no study has id {study_id}; `autoq list` shows those there are"
            )
        row.updated = utc_now()
        return row

    def _refuse_lost_lease(self, session: Session, study_id: int) -> None:
        """What a process writes that hung while another took its study over would be done twice."""
        owner = self._database.held_leases.get(study_id)
        if owner is None:
            return
        # Locked, so that the study changes hands before this transaction or after it.
        query = select(LeaseRow.owner).where(LeaseRow.study_id == study_id)
        if session.scalar(query.with_for_update(read=True)) != owner:
            raise StudyLockedError(LOST)

    def _open_for_results(self, session: Session, study_id: int, stage: str) -> StudyRow:
        """The study's row, if results may still go into the stage.

        Raises:
            StoreError: the stage is done.
        """
        study = self._touched(session, study_id)
        row = stage_row(session, study_id, stage)
        if row is not None and row.status == WorkStatus.DONE:
            raise StoreError(
                f"a finished stage does not change, and {stage!r} of study {study.name!r} is "
                "finished; reset the stage to run it again"
            )
        return study


def stage_row(session: Session, study_id: int, stage: str) -> StageRow | None:
    """The stage's row, None before it was begun."""
    query = select(StageRow).where(StageRow.study_id == study_id, StageRow.name == stage)
    return session.scalars(query).one_or_none()
