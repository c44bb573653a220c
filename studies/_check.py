"""Is a store sound: its file, its schema, its references, and every byte that has a hash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import exists, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from autoq.errors import StoreError
from autoq.studies._blobs import blob_bytes
from autoq.studies._database import Database, explain
from autoq.studies._encoding import sha256_hex
from autoq.studies._migrate import schema_revision
from autoq.studies._results import is_plan_as_written
from autoq.studies._schema import (
    SCHEMA_REVISION,
    ArrayRow,
    Base,
    BlobRow,
    ExportFileRow,
    ExportRow,
    PlanRow,
    ScoreBatchRow,
    StageRow,
    StudyRow,
)
from autoq.studies._seals import Sealed, is_sealed, name_of
from autoq.studies._trial_seals import damaged_trials

_MOST_OF_ONE_KIND = 100

SEALED: list[Any] = sorted(
    (mapper.class_ for mapper in Base.registry.mappers if issubclass(mapper.class_, Sealed)),
    key=lambda table: str(table.__tablename__),
)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something in a store that is not as it was written."""

    study: str | None  # name; None where it belongs to no study, or which is not known
    stage: str | None
    what: str


def check_database(database: Database) -> list[Fault]:
    """Every fault that can be found, without changing anything.

    Raises:
        StoreError: the database cannot be asked at all, or its schema is newer than this version.
    """
    checks: list[Callable[[Session], Iterator[Fault]]] = [_of_file, _of_schema]
    faults = [fault for check in checks for fault in _run(database, check)]
    if faults:
        return faults  # what is in tables that are broken or of another schema cannot be told
    for check in (_of_references, _of_rows, _of_plans, _of_blobs, _of_score_batches, _of_trials):
        faults += _run(database, check)
    return faults


def _run(database: Database, check: Callable[[Session], Iterator[Fault]]) -> list[Fault]:
    found: list[Fault] = []
    try:
        with database.read() as session:
            found.extend(check(session))
    except StoreError as error:
        found.append(Fault(None, None, str(error)))
    return found


def _of_file(session: Session) -> Iterator[Fault]:
    """SQLite's own check of its pages and indices; PostgreSQL has no such command for users."""
    if session.get_bind().dialect.name != "sqlite":
        return
    for line in session.scalars(text(f"PRAGMA integrity_check({_MOST_OF_ONE_KIND})")):
        if line != "ok":
            yield Fault(None, None, f"the file is damaged: {' '.join(str(line).split())}")


def _of_schema(session: Session) -> Iterator[Fault]:
    connection = session.connection()
    revision = schema_revision(connection)
    if revision != SCHEMA_REVISION:
        yield Fault(
            None,
            None,
            f"the schema is revision {revision or 'none'}, and this version of autoq writes "
            f"{SCHEMA_REVISION}; run `autoq store upgrade`",
        )
        return
    inspector = inspect(connection)
    for table in Base.metadata.sorted_tables:
        if not inspector.has_table(table.name):
            yield Fault(None, None, f"table {table.name} is missing")
            continue
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                yield Fault(None, None, f"column {table.name}.{column.name} is missing")


def _of_references(session: Session) -> Iterator[Fault]:
    """Rows whose parent is gone; PostgreSQL enforces its references always, SQLite only when asked."""
    for table in Base.metadata.sorted_tables:
        for constraint in table.foreign_key_constraints:
            (own,), (key,) = constraint.columns, constraint.elements
            parent = key.column
            orphans = select(table.c.id).where(
                own.is_not(None), ~exists().where(parent == own).correlate(table)
            )
            for row_id in session.scalars(orphans.order_by(table.c.id).limit(_MOST_OF_ONE_KIND)):
                study, stage = _place(session, table.name, row_id)
                what = f"row {row_id} of table {table.name} refers to a {parent.table.name} that is gone"
                yield Fault(study, stage, what)


def _place(session: Session, table: str, row_id: int) -> tuple[str | None, str | None]:
    if table != ArrayRow.__tablename__:
        return None, None
    query = select(StudyRow.name, ArrayRow.stage).join(StudyRow, StudyRow.id == ArrayRow.study_id)
    found = session.execute(query.where(ArrayRow.id == row_id)).first()
    return (None, None) if found is None else (found[0], found[1])


def _of_rows(session: Session) -> Iterator[Fault]:
    """Columns that cannot be read, such as JSON that is none, and rows that their seal is not of."""
    names = dict(iter(session.execute(select(StudyRow.id, StudyRow.name))))
    for table in SEALED:
        for row_id in session.scalars(select(table.id).order_by(table.id)).all():
            columns = [column for column in table.__table__.columns if column.name != "data"]
            try:
                found = session.execute(select(*columns).where(table.id == row_id)).one()
            except (ValueError, TypeError, SQLAlchemyError, StoreError) as error:
                study, stage = _owner(session, table, row_id, names)
                line = explain(error, f"row {row_id} of table {table.__tablename__}")
                yield Fault(study, stage, f"it cannot be read: {line}")
                continue
            row = found._asdict()
            if not is_sealed(table, row):
                study, stage = _owner(session, table, row_id, names)
                what = f"row {row_id} of table {table.__tablename__}, {name_of(table, row)}"
                yield Fault(study, stage, f"{what}, is damaged: it does not match its SHA-256")


def _owner(
    session: Session, table: Any, row_id: int, names: dict[int, str]
) -> tuple[str | None, str | None]:
    if table is StudyRow:
        return names.get(row_id), None
    study_id = session.scalar(_study_ids(table).where(table.id == row_id))
    stage = None
    if table is StageRow:
        stage = session.scalar(select(StageRow.name).where(StageRow.id == row_id))
    if table is ArrayRow:
        stage = session.scalar(select(ArrayRow.stage).where(ArrayRow.id == row_id))
    return names.get(study_id or 0), stage


def _study_ids(table: Any) -> Any:
    if table is not ExportFileRow:
        return select(table.study_id)
    of_export = ExportFileRow.export_id == ExportRow.id
    return select(ExportRow.study_id).select_from(ExportFileRow).join(ExportRow, of_export)


def _of_plans(session: Session) -> Iterator[Fault]:
    """Plans have had a hash of what they say since before rows had seals."""
    query = select(PlanRow, StudyRow.name).join(StudyRow, StudyRow.id == PlanRow.study_id)
    for row_id in session.scalars(select(PlanRow.id).order_by(PlanRow.id)).all():
        try:
            plan, study = session.execute(query.where(PlanRow.id == row_id)).one()
        except (ValueError, TypeError, SQLAlchemyError, StoreError):
            continue  # a row that is damaged is named by `_of_rows`
        if not is_plan_as_written(plan):
            what = f"plan {plan.label!r} is damaged: it does not match its SHA-256"
            yield Fault(study, None, what)


def _of_blobs(session: Session) -> Iterator[Fault]:
    """Every blob is read, one at a time, and named by the arrays that it is the bytes of."""
    sizes = session.execute(select(BlobRow.sha256, BlobRow.size_bytes).order_by(BlobRow.id)).all()
    for sha256, size_bytes in sizes:
        ((_, data),) = blob_bytes(session, [sha256])
        if sha256_hex(data) == sha256 and len(data) == size_bytes:
            continue
        what = f"{len(data)} of {size_bytes} bytes are there, and they do not match their SHA-256"
        users = select(StudyRow.name, ArrayRow.stage, ArrayRow.name).join(
            StudyRow, StudyRow.id == ArrayRow.study_id
        )
        rows = session.execute(users.where(ArrayRow.sha256 == sha256).order_by(ArrayRow.id)).all()
        for study, stage, name in rows:
            yield Fault(study, stage, f"array {name!r} is damaged: {what}")
        if not rows:
            yield Fault(None, None, f"blob {sha256}, which nothing uses, is damaged: {what}")


def _of_score_batches(session: Session) -> Iterator[Fault]:
    known = select(ScoreBatchRow.id, StudyRow.name, ScoreBatchRow.batch_index)
    joined = known.join(StudyRow, StudyRow.id == ScoreBatchRow.study_id)
    for row_id, study, index in session.execute(joined.order_by(ScoreBatchRow.id)).all():
        values = select(ScoreBatchRow.data, ScoreBatchRow.sha256)
        data, sha256 = session.execute(values.where(ScoreBatchRow.id == row_id)).one()
        if sha256_hex(bytes(data)) != sha256:
            yield Fault(
                study,
                "sensitivity",
                f"score batch {index} is damaged: its bytes do not match their SHA-256",
            )


def _of_trials(session: Session) -> Iterator[Fault]:
    for refinement, number in damaged_trials(session):
        study = refinement.split(" · ")[0]
        what = f"trial {number} of {refinement!r} is damaged: it does not match its SHA-256"
        yield Fault(study, None, what)
