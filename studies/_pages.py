"""What a service looks up all the time, in few and small statements: pages of studies, marks, names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, func, not_, or_, select
from sqlalchemy.orm import Session

from autoq.errors import UnknownNameError
from autoq.studies._base import Repository
from autoq.studies._clock import now
from autoq.studies._encoding import iso_time
from autoq.studies._leases import is_alive
from autoq.studies._schema import ExportRow, LeaseRow, PlanRow, StageRow, StudyRow
from autoq.studies._studies import study_record
from autoq.studies.records import ExportStatus, StageRecord, StudyRecord, StudySummary, WorkStatus

INTERRUPTED = "interrupted"
"""Status of a study that says it runs while no process works on it, beside those of `WorkStatus`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyFilter:
    """Which studies a page is of; None is any."""

    status: str | None = None  # one of `WorkStatus`, or `INTERRUPTED`
    models: Collection[str] | None = None  # paths as the store has them
    text: str | None = None  # in name, model or architecture, whatever the case


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyMarks:
    """What changes whenever a study's tables do, at the price of one statement."""

    study_id: int
    key: str
    created: str
    stages: tuple[tuple[int, str, str, str | None], ...]  # id, name, status, when it ended


class PageRepository(Repository):
    """Pages of studies, and what tells whether one has changed."""

    def study_named(self, name: str) -> StudyRecord:
        """The study of exactly this name.

        Raises:
            UnknownNameError: there is none.
        """
        with self._database.read() as session:
            row = session.scalars(select(StudyRow).where(StudyRow.name == name)).one_or_none()
        if row is None:
            raise UnknownNameError(f"no study is named {name!r}; the list of studies has the names")
        return study_record(row)

    def study_marks(self, name: str) -> StudyMarks:
        """What tells one state of a study's tables from another.

        Raises:
            UnknownNameError: there is no such study.
        """
        columns = select(
            StudyRow.id.label("study_id"),
            StudyRow.key,
            StudyRow.created,
            StageRow.id.label("stage_id"),
            StageRow.name,
            StageRow.status,
            StageRow.finished,
        )
        query = columns.outerjoin(StageRow, StageRow.study_id == StudyRow.id)
        with self._database.read() as session:
            of_study = query.where(StudyRow.name == name).order_by(StageRow.id)
            rows = session.execute(of_study).all()
        if not rows:
            raise UnknownNameError(f"no study is named {name!r}; the list of studies has the names")
        return StudyMarks(
            study_id=rows[0].study_id,
            key=rows[0].key,
            created=iso_time(rows[0].created),
            stages=tuple(
                (row.stage_id, row.name, row.status, row.finished and iso_time(row.finished))
                for row in rows
                if row.stage_id is not None
            ),
        )

    def stage_times(self, study_id: int) -> list[StageRecord]:
        """The stages that were begun, in that order, without their payloads, which may be large."""
        columns = (StageRow.name, StageRow.status, StageRow.started, StageRow.finished)
        query = select(*columns, StageRow.seconds).where(StageRow.study_id == study_id)
        with self._database.read() as session:
            rows = session.execute(query.order_by(StageRow.id)).all()
        return [
            StageRecord(
                study_id=study_id,
                name=row.name,
                status=WorkStatus(row.status),
                started=row.started and iso_time(row.started),
                finished=row.finished and iso_time(row.finished),
                seconds=row.seconds,
                payload={},
            )
            for row in rows
        ]

    def plan_labelled(self, study_id: int, label: str) -> int | None:
        """Id of the study's oldest plan of this label."""
        query = select(PlanRow.id).where(PlanRow.study_id == study_id, PlanRow.label == label)
        with self._database.read() as session:
            return session.scalars(query.order_by(PlanRow.id).limit(1)).first()

    def model_paths(self) -> list[str]:
        """The models of all studies, each once."""
        query = select(StudyRow.model_path).distinct().order_by(StudyRow.model_path)
        with self._database.read() as session:
            return list(session.scalars(query))

    def study_page(
        self, wanted: StudyFilter, *, limit: int, after: tuple[str, int] | None = None
    ) -> tuple[list[StudySummary], int]:
        """(studies, those worked on last first; how many the filter lets through in all).

        Args:
            limit: studies of the page.
            after: `updated` and id of the last study of the page before. Studies that come or go
                meanwhile neither repeat others nor hide them.
        """
        with self._database.read() as session:
            held = _held(session)
            conditions = _conditions(wanted, held)
            count = select(func.count()).select_from(StudyRow).where(*conditions)
            total = session.scalar(count) or 0
            if after is not None:
                conditions.append(_behind(datetime.fromisoformat(after[0]), after[1]))
            query = select(*_SHOWN).where(*conditions)
            last = query.order_by(StudyRow.updated.desc(), StudyRow.id.desc()).limit(limit)
            rows = session.execute(last).all()
            exports = _complete_exports(session, [row.id for row in rows])
        summaries = [
            StudySummary(
                id=row.id,
                name=row.name,
                status=WorkStatus(row.status),
                created=iso_time(row.created),
                updated=iso_time(row.updated),
                model_path=row.model_path,
                architecture=row.architecture,
                stages={},
                plans=0,
                exports=exports.get(row.id, 0),
                is_held=row.id in held,
            )
            for row in rows
        ]
        return summaries, total

    def is_held(self, study_id: int) -> bool:
        """Whether a process works on the study, as far as can be told."""
        with self._database.read() as session:
            return study_id in _held(session, study_id)


_SHOWN = (
    StudyRow.id,
    StudyRow.name,
    StudyRow.status,
    StudyRow.created,
    StudyRow.updated,
    StudyRow.model_path,
    StudyRow.architecture,
)


def _held(session: Session, study_id: int | None = None) -> set[int]:
    query = select(LeaseRow)
    if study_id is not None:
        query = query.where(LeaseRow.study_id == study_id)
    leases = session.scalars(query).all()
    moment = now(session)
    return {row.study_id for row in leases if is_alive(row, moment)}


def _conditions(wanted: StudyFilter, held: Collection[int]) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if wanted.status is not None:
        found += _of_status(wanted.status, held)
    if wanted.models is not None:
        found.append(StudyRow.model_path.in_(wanted.models))
    if wanted.text is not None:
        text = wanted.text.lower()
        searched = (StudyRow.name, StudyRow.model_path, StudyRow.architecture)
        found.append(or_(*(_holds(column, text) for column in searched)))
    return found


def _of_status(status: str, held: Collection[int]) -> list[ColumnElement[bool]]:
    """A study that runs and one that was interrupted differ by whether a process works on it."""
    if status not in (WorkStatus.RUNNING, INTERRUPTED):
        return [StudyRow.status == status]
    is_held = StudyRow.id.in_(held)
    return [
        StudyRow.status == WorkStatus.RUNNING.value,
        is_held if status == WorkStatus.RUNNING else not_(is_held),
    ]


def _holds(column: ColumnElement[str] | object, text: str) -> ColumnElement[bool]:
    return func.lower(column).contains(text, autoescape=True)


def _behind(updated: datetime, study_id: int) -> ColumnElement[bool]:
    same = and_(StudyRow.updated == updated, StudyRow.id < study_id)
    return or_(StudyRow.updated < updated, same)


def _complete_exports(session: Session, studies: Collection[int]) -> dict[int, int]:
    query = select(ExportRow.study_id, func.count()).group_by(ExportRow.study_id)
    of_page = query.where(
        ExportRow.study_id.in_(studies), ExportRow.status == ExportStatus.COMPLETE.value
    )
    return {row[0]: row[1] for row in session.execute(of_page)}
