"""What an operator does to a whole store; studies are not opened for it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from autoq.errors import StoreError
from autoq.studies._check import Fault, check_database
from autoq.studies._database import Database, file_of, translated_errors
from autoq.studies._schema import SCHEMA_REVISION
from autoq.studies._vacuum import Vacuumed, vacuum_database

__all__ = [
    "SCHEMA_REVISION",
    "Fault",
    "Vacuumed",
    "check",
    "file_of",
    "missing_revisions",
    "upgrade",
    "vacuum",
]


def check(url: str) -> list[Fault]:
    """Every fault of a store that can be found; nothing is changed, the schema neither.

    Raises:
        StoreError: the store cannot be opened, or its schema is newer than this version.
    """
    database = Database.open(url, migrate=False)
    try:
        return check_database(database)
    finally:
        database.close()


def vacuum(url: str) -> Vacuumed:
    """Remove what nothing refers to, and give the room back.

    Raises:
        StoreError: the store cannot be opened or written.
    """
    database = Database.open(url)
    try:
        return vacuum_database(database)
    finally:
        database.close()


def missing_revisions(url: str) -> list[tuple[str, str]]:
    """(revision, what it does) of the migrations that the store lacks, oldest first.

    Raises:
        StoreError: the store cannot be opened, or its schema is newer than this version.
    """
    database = Database.open(url, migrate=False)
    try:
        return database.missing_revisions()
    finally:
        database.close()


def upgrade(url: str, backup: Path | None) -> None:
    """Bring the schema up to date.

    Args:
        backup: where a copy of a SQLite store goes before; None makes none.
    Raises:
        StoreError: the store cannot be opened, copied or written; it is as before then.
    """
    database = Database.open(url, migrate=False)
    try:
        if backup is not None:
            _copy(database, backup)
        with translated_errors(database.described):
            database.migrate()
    finally:
        database.close()


def _copy(database: Database, backup: Path) -> None:
    """By SQLite itself: the copy is whole, whoever writes at the same time."""
    if backup.exists():
        raise StoreError(f"the copy {backup} exists already; move it away, or upgrade without one")
    described = f"the copy {backup}"
    with (
        translated_errors(described),
        closing(sqlite3.connect(str(database.url.database))) as source,
        closing(sqlite3.connect(backup)) as target,
    ):
        source.backup(target)
