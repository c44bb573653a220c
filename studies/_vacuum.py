"""Room that nothing needs is given back: blobs without rows, rows without parents, free pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import CursorResult, delete, exists, func, select, text
from sqlalchemy.orm import Session

from autoq.studies._blobs import is_unused
from autoq.studies._database import Database, translated_errors
from autoq.studies._schema import Base, BlobRow


@dataclass(frozen=True, slots=True)
class Vacuumed:
    """What `vacuum` removed."""

    orphaned_rows: int
    unused_blobs: int
    unused_bytes: int
    bytes_before: int | None  # of the database; None where it does not say
    bytes_after: int | None


def vacuum_database(database: Database) -> Vacuumed:
    """Remove what nothing refers to, and let the database give the room back.

    Safe beside processes at work: what they have stored is referred to, or not there yet.

    Raises:
        StoreError: the database failed, or another process has it locked for too long.
    """
    before = _size_bytes(database)
    with database.write() as session:
        rows = _delete_orphans(session)
        # Locked first: the statement that removes them then sees who began to use one.
        found = select(BlobRow.id).where(is_unused()).order_by(BlobRow.sha256)
        session.execute(found.with_for_update())
        unused = select(func.count(), func.coalesce(func.sum(BlobRow.size_bytes), 0))
        blobs, freed = session.execute(unused.where(is_unused())).one()
        session.execute(delete(BlobRow).where(is_unused()))
    _compact(database)
    return Vacuumed(rows, blobs, int(freed), before, _size_bytes(database))


def _delete_orphans(session: Session) -> int:
    """Rows whose parent is gone, until there is none: a row may be the parent of others."""
    removed = 0
    for table in Base.metadata.sorted_tables:  # parents first
        for constraint in table.foreign_key_constraints:
            (own,), (key,) = constraint.columns, constraint.elements
            orphan = ~exists().where(key.column == own).correlate(table)
            result = session.execute(delete(table).where(own.is_not(None), orphan))
            removed += result.rowcount if isinstance(result, CursorResult) else 0
    return removed


def _compact(database: Database) -> None:
    with translated_errors(database.described), database.autocommit() as connection:
        if connection.dialect.name == "sqlite":
            connection.execute(text("VACUUM"))
            connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
            return
        for table in Base.metadata.sorted_tables:
            connection.execute(text(f'VACUUM "{table.name}"'))


def _size_bytes(database: Database) -> int | None:
    name = database.url.database
    if database.url.get_backend_name() == "sqlite":
        if name in (None, "", ":memory:"):
            return None
        files = (Path(f"{name}{end}") for end in ("", "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())
    with database.read() as session:
        tables = (f"'\"{table.name}\"'" for table in Base.metadata.sorted_tables)
        sizes = " + ".join(f"pg_total_relation_size({table})" for table in tables)
        return int(session.scalar(text(f"SELECT {sizes}")) or 0)
