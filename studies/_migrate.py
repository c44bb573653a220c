"""Bring a database to this version's schema, with the migrations inside the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, inspect, null, select, text

from autoq.errors import StoreError
from autoq.studies._clock import now
from autoq.studies._leases import is_alive
from autoq.studies._schema import (
    SCHEMA_REVISION,
    VERSION_TABLE,
    Base,
    JobLeaseRow,
    LeaseRow,
    RunnerRow,
)

if TYPE_CHECKING:
    from alembic.config import Config

_SCRIPTS = Path(__file__).parent / "migrations"
_UPGRADING = 0x73636865  # any number that nobody else locks: "sche"


def is_current(connection: Connection) -> bool:
    """Whether the database has this version's schema; does without Alembic, which loads slowly."""
    return schema_revision(connection) == SCHEMA_REVISION


def upgrade_schema(connection: Connection, described: str) -> None:
    """Run what migrations are missing, inside the caller's transaction.

    Of processes that do so at once the others wait for the first. Of SQLite the caller has the
    write lock.

    Raises:
        StoreError: the schema is newer than this version of autoq, or a process works on the store.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADING})
    if missing_revisions(connection, described):
        from alembic import command

        _refuse_while_at_work(connection, described)
        command.upgrade(_configuration(connection), "head")


def _refuse_while_at_work(connection: Connection, described: str) -> None:
    """What an older version goes on to write would have no seals, and count as damaged."""
    moment = now(connection)
    for table in (LeaseRow, JobLeaseRow, RunnerRow):
        for row in _rows_of_any_revision(connection, table):
            if is_alive(row, moment):
                raise StoreError(
                    f"{described} must be upgraded while no process works on it, and process "
                    f"{row.pid} on host {row.host} does; wait until it ends or stop it"
                )


def _rows_of_any_revision(connection: Connection, table: type[Base]) -> Sequence[Any]:
    """The table's rows; None in columns that it does not have yet."""
    schema, name = inspect(connection), table.__tablename__
    if not schema.has_table(name):
        return []
    there = {column["name"] for column in schema.get_columns(name)}
    columns = table.__table__.columns
    shown = [one if one.name in there else null().label(one.name) for one in columns]
    return connection.execute(select(*shown)).all()


def missing_revisions(connection: Connection, described: str) -> list[tuple[str, str]]:
    """(revision, what it does) of the migrations that the database lacks, oldest first.

    Raises:
        StoreError: the schema is newer than this version of autoq.
    """
    from alembic.script import ScriptDirectory

    current = schema_revision(connection)
    if current == SCHEMA_REVISION:
        return []
    scripts = list(ScriptDirectory.from_config(_configuration(connection)).walk_revisions())
    known = [script.revision for script in reversed(scripts)]
    if current is not None and current not in known:
        raise StoreError(
            f"{described} has schema revision {current!r}, which is newer than this version of "
            f"autoq knows (up to {SCHEMA_REVISION!r}); upgrade autoq or name another store"
        )
    done = 0 if current is None else known.index(current) + 1
    return [(script.revision, str(script.doc)) for script in reversed(scripts)][done:]


def schema_revision(connection: Connection) -> str | None:
    """The revision of the database, None for one without our tables."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    revision: str | None = connection.execute(
        text(f"SELECT version_num FROM {VERSION_TABLE}")
    ).scalar()
    return revision


def _configuration(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    # The value goes through a format where "%" has a meaning.
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    attributes: dict[Any, Any] = config.attributes
    attributes["connection"] = connection
    return config
