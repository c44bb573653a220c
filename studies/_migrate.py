"""Bring a database to this version's schema, with the migrations inside the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, inspect, text

from autoq.errors import StoreError
from autoq.studies._schema import SCHEMA_REVISION, VERSION_TABLE

if TYPE_CHECKING:
    from alembic.config import Config

_SCRIPTS = Path(__file__).parent / "migrations"


def is_current(connection: Connection) -> bool:
    """Whether the database has this version's schema; does without Alembic, which loads slowly."""
    return schema_revision(connection) == SCHEMA_REVISION


def upgrade_schema(connection: Connection, described: str) -> None:
    """Run what migrations are missing, inside the caller's transaction.

    Raises:
        StoreError: the schema is newer than this version of autoq.
    """
    if missing_revisions(connection, described):
        from alembic import command

        command.upgrade(_configuration(connection), "head")


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
