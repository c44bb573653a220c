"""Bring a database to this version's schema, with the migrations inside the package."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from autoq.errors import StoreError
from autoq.studies._schema import VERSION_TABLE

_SCRIPTS = Path(__file__).parent / "migrations"


def upgrade_schema(connection: Connection, described: str) -> None:
    """Run what migrations are missing, inside the caller's transaction.

    Raises:
        StoreError: the schema is newer than this version of autoq.
    """
    config = _configuration(connection)
    scripts = ScriptDirectory.from_config(config)
    current = schema_revision(connection)
    if current == scripts.get_current_head():
        return
    _refuse_unknown_revision(scripts, current, described)
    command.upgrade(config, "head")


def schema_revision(connection: Connection) -> str | None:
    """The revision of the database, None for one without our tables."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def _configuration(connection: Connection) -> Config:
    config = Config()
    # The value goes through a format where "%" has a meaning.
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _refuse_unknown_revision(scripts: ScriptDirectory, current: str | None, described: str) -> None:
    known = {script.revision for script in scripts.walk_revisions()}
    if current is not None and current not in known:
        raise StoreError(
            f"{described} has schema revision {current!r}, which is newer than this version of "
            f"autoq knows (up to {scripts.get_current_head()!r}); upgrade autoq or name another store"
        )
