"""Studies: create, find, list, and the lease on one."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import PurePath
from typing import Any

from sqlalchemy import Row, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from autoq.errors import InputError, StoreError, UnknownNameError
from autoq.studies._base import Repository
from autoq.studies._clock import now
from autoq.studies._database import StoreConflictError
from autoq.studies._encoding import iso_time, json_clean, utc_now
from autoq.studies._leases import LEASE_SECONDS, StudyLease, is_alive
from autoq.studies._schema import SCHEMA_VERSION, ExportRow, LeaseRow, PlanRow, StageRow, StudyRow
from autoq.studies.records import ExportStatus, StudyRecord, StudySummary, WorkStatus

_NAMES_SHOWN = 10


class StudyRepository(Repository):
    """The studies of a store."""

    def create_or_get(
        self,
        *,
        name: str | None,
        key: str,
        model_path: str,
        fingerprint: str,
        architecture: str,
        configuration: Mapping[str, Any],
        versions: Mapping[str, str],
        seed: int,
    ) -> StudyRecord:
        """The study with this key; a new one where there is none.

        An existing study is returned as it is: under its own name, with the versions that began
        it. Without a name, a new study is called after its model folder and its key.

        Raises:
            InputError: another study has the name already, or the name cannot be one.
        """
        if name is not None:
            check_name(name)
        created = utc_now()
        fresh = StudyRow(
            key=key,
            status=WorkStatus.TODO,
            created=created,
            updated=created,
            model_path=str(model_path),
            model_fingerprint=fingerprint,
            architecture=architecture,
            configuration=json_clean(configuration),
            versions=json_clean(versions),
            seed=seed,
            schema_version=SCHEMA_VERSION,
        )
        try:
            return self._get_or_insert(fresh, name)
        except StoreConflictError:
            # Another process created it between our look and our insert; now it is found.
            return self._get_or_insert(fresh, name)

    def find(self, name_or_prefix_or_id: str | int) -> StudyRecord:
        """The study with this name, id or key, else the one whose name or key starts so.

        Raises:
            UnknownNameError: no study fits; the message lists near misses.
            InputError: the beginning fits several studies.
        """
        wanted = str(name_or_prefix_or_id)
        names = select(StudyRow.id, StudyRow.name, StudyRow.key).order_by(StudyRow.id)
        with self._database.read() as session:
            rows = session.execute(names).all()
            found = (
                _named(rows, wanted)
                or _numbered(rows, wanted)
                or _keyed(rows, wanted)
                or _only_one_starting_with(rows, wanted)
            )
            return study_record(session.get_one(StudyRow, found.id))

    def study(self, study_id: int) -> StudyRecord:
        """The study with this id.

        Raises:
            UnknownNameError: there is none.
        """
        with self._database.read() as session:
            row = session.get(StudyRow, study_id)
        if row is None:
            raise UnknownNameError(
                f"no study has id {study_id}; `autoq list` shows those there are"
            )
        return study_record(row)

    def newest(self) -> StudyRecord:
        """The study that was worked on last.

        Raises:
            UnknownNameError: the store is empty.
        """
        with self._database.read() as session:
            last = select(StudyRow).order_by(StudyRow.updated.desc(), StudyRow.id).limit(1)
            row = session.scalars(last).first()
        if row is None:
            raise UnknownNameError(
                "the store has no study yet; make one with `autoq search MODEL --bits B`"
            )
        return study_record(row)

    def count_studies(self) -> int:
        """How many there are."""
        with self._database.read() as session:
            return session.scalar(select(func.count()).select_from(StudyRow)) or 0

    def list_studies(
        self, *, in_detail: bool = True, newest: int | None = None
    ) -> list[StudySummary]:
        """All studies, oldest first; their rows are not compared with their hashes.

        Args:
            in_detail: with their stages and numbers of plans; without, a list of thousands is read
                in half the time.
            newest: only so many, those that were worked on last.
        """
        shown = select(
            StudyRow.id,
            StudyRow.name,
            StudyRow.status,
            StudyRow.created,
            StudyRow.updated,
            StudyRow.model_path,
            StudyRow.architecture,
        )
        last = select(StudyRow.id).order_by(StudyRow.updated.desc(), StudyRow.id.desc())
        if newest is not None:
            shown = shown.where(StudyRow.id.in_(last.limit(newest)))
        with self._database.read() as session:
            rows = session.execute(shown.order_by(StudyRow.id)).all()
            stages = _stages_by_study(session) if in_detail else {}
            plans = _counts(session, PlanRow.study_id) if in_detail else {}
            exports = _counts(session, ExportRow.study_id, ExportRow.status, ExportStatus.COMPLETE)
            leases = session.scalars(select(LeaseRow)).all()
            held = {row.study_id for row in leases if is_alive(row, now(session))}
        known = {status.value: status for status in WorkStatus}  # an enum's own search is slow
        return [
            StudySummary(
                id=row.id,
                name=row.name,
                status=_known_status(known, row.status, row.name),
                created=iso_time(row.created),
                updated=iso_time(row.updated),
                model_path=row.model_path,
                architecture=row.architecture,
                stages=stages.get(row.id, {}),
                plans=plans.get(row.id, 0),
                exports=exports.get(row.id, 0),
                is_held=row.id in held,
            )
            for row in rows
        ]

    def plan_wishes(
        self, studies: Collection[int] | None = None
    ) -> list[tuple[int, str, float, dict[str, Any]]]:
        """(study, label, budget in bits, details) of all plans, oldest first.

        Without the plans' assignments, which are most of what a large store has of them.

        Args:
            studies: only plans of these, at most some thousands; None is of all.
        """
        wishes = select(PlanRow.study_id, PlanRow.label, PlanRow.budget_bits, PlanRow.details)
        if studies is not None:
            wishes = wishes.where(PlanRow.study_id.in_(studies))
        with self._database.read() as session:
            rows = session.execute(wishes.order_by(PlanRow.id)).all()
        return [(row.study_id, row.label, row.budget_bits, row.details) for row in rows]

    def set_status(self, study_id: int, status: WorkStatus) -> None:
        """Say how far the study as a whole is."""
        with self._database.write() as session:
            self._touched(session, study_id).status = status

    def lease(
        self, study_id: int, *, wait_seconds: float = 0.0, lease_seconds: float = LEASE_SECONDS
    ) -> StudyLease:
        """The right to work on the study, as a context manager with `heartbeat()`.

        Raises:
            UnknownNameError: there is no such study.
            StudyLockedError: on entry, when another process still holds it after the wait.
        """
        self.study(study_id)
        return StudyLease(
            self._database, study_id, wait_seconds=wait_seconds, lease_seconds=lease_seconds
        )

    def _get_or_insert(self, fresh: StudyRow, name: str | None) -> StudyRecord:
        with self._database.write() as session:
            existing = session.scalars(select(StudyRow).where(StudyRow.key == fresh.key)).first()
            if existing is not None:
                return study_record(existing)
            fresh.name = name or _free_name(session, fresh)
            refuse_taken_name(session, fresh.name)
            session.add(fresh)
            session.flush()
            return study_record(fresh)


def study_record(row: StudyRow) -> StudyRecord:
    """A snapshot of the row."""
    return StudyRecord(
        id=row.id,
        name=row.name,
        key=row.key,
        status=WorkStatus(row.status),
        created=iso_time(row.created),
        updated=iso_time(row.updated),
        model_path=row.model_path,
        model_fingerprint=row.model_fingerprint,
        architecture=row.architecture,
        configuration=row.configuration,
        versions=row.versions,
        seed=row.seed,
        schema_version=row.schema_version,
    )


def check_name(name: str) -> None:
    """
    Raises:
        InputError: a study cannot be called so.
    """
    if not name.strip() or name.isdigit() or not name.isprintable():
        raise InputError(
            "a study's name must have printable characters and not be a mere number "
            f"(numbers are ids), got {name!r}; choose another name"
        )


def _free_name(session: Session, fresh: StudyRow) -> str:
    folder = PurePath(fresh.model_path).name or "study"
    short, full = f"{folder}-{fresh.key[:8]}", f"{folder}-{fresh.key}"
    return full if _holder_of(session, short) is not None else short


def _holder_of(session: Session, name: str) -> Row[int, str, datetime] | None:
    # Single columns: another study that is damaged stands in nobody's way.
    query = select(StudyRow.id, StudyRow.model_path, StudyRow.created)
    return session.execute(query.where(StudyRow.name == name)).first()


def refuse_taken_name(session: Session, name: str) -> None:
    """
    Raises:
        InputError: another study is called so.
    """
    holder = _holder_of(session, name)
    if holder is not None:
        raise InputError(
            f"a study's name is unique, and {name!r} belongs to study {holder.id} of model "
            f"{holder.model_path} with other settings, begun {iso_time(holder.created)}; "
            "choose another name, or give the arguments that began it to continue it"
        )


def _named(rows: Sequence[Row[int, str, str]], wanted: str) -> Row[int, str, str] | None:
    return next((row for row in rows if row.name == wanted), None)


def _numbered(rows: Sequence[Row[int, str, str]], wanted: str) -> Row[int, str, str] | None:
    return next((row for row in rows if str(row.id) == wanted), None)


def _keyed(rows: Sequence[Row[int, str, str]], wanted: str) -> Row[int, str, str] | None:
    return next((row for row in rows if row.key == wanted), None)


def _only_one_starting_with(rows: Sequence[Row[int, str, str]], wanted: str) -> Row[int, str, str]:
    fitting = [row for row in rows if row.name.startswith(wanted) or row.key.startswith(wanted)]
    if not fitting or not wanted:
        raise UnknownNameError(_unknown_study(wanted, [row.name for row in rows]))
    if len(fitting) > 1:
        names = ", ".join(row.name for row in fitting[:_NAMES_SHOWN])
        raise InputError(
            f"{wanted!r} must name one study, and {len(fitting)} start with it: {names}; "
            "give more of the name, or the id"
        )
    return fitting[0]


def _unknown_study(wanted: str, names: list[str]) -> str:
    if not names:
        return f"no study named {wanted!r}: the store is empty; `autoq search` begins a study"
    close = ", ".join(difflib.get_close_matches(wanted, names, cutoff=0.5))
    hint = f" (did you mean {close}?)" if close else ""
    shown = ", ".join(names[-_NAMES_SHOWN:])
    more = " and older ones" if len(names) > _NAMES_SHOWN else ""
    return f"no study named {wanted!r}{hint}; known: {shown}{more}"


def _known_status(known: Mapping[str, WorkStatus], status: str, study: str) -> WorkStatus:
    found = known.get(status)
    if found is None:
        raise StoreError(
            f"study {study!r} is damaged: its status is {status!r}; `autoq store check` names "
            "what else is, so restore the store from a copy"
        )
    return found


def _stages_by_study(session: Session) -> dict[int, dict[str, WorkStatus]]:
    """Study -> stage -> how far it is, in the order in which they were begun."""
    query = select(StageRow.study_id, StageRow.name, StageRow.status).order_by(StageRow.id)
    found: dict[int, dict[str, WorkStatus]] = {}
    known = {status.value: status for status in WorkStatus}
    for study_id, name, status in session.execute(query):
        found.setdefault(study_id, {})[name] = _known_status(known, status, str(study_id))
    return found


def _counts(
    session: Session,
    study_id: InstrumentedAttribute[int],
    column: InstrumentedAttribute[str] | None = None,
    value: str = "",
) -> dict[int, int]:
    query = select(study_id, func.count()).group_by(study_id)
    if column is not None:
        query = query.where(column == value)
    return {row[0]: row[1] for row in session.execute(query)}
