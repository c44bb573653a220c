"""Cuts the database's connection in the middle of a transaction; `fork_server` calls `install`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

TRANSACTION, WHERE, COUNTED = "AUTOQ_CUT_TRANSACTION", "AUTOQ_CUT_WHERE", "AUTOQ_CUT_COUNTED"
AT_STATEMENT, AT_COMMIT = "statement", "commit"


def cut(transaction: int, where: str, counted: Path) -> dict[str, Any]:
    """What makes a command lose its connection in its so-many-th write transaction, 0 for never.

    Args:
        counted: file for the number of write transactions that were begun.
    """
    environment = {TRANSACTION: str(transaction), WHERE: where, COUNTED: str(counted)}
    return {"setup": f"{__name__}:install", "environment": environment}


def install(environment: Mapping[str, str]) -> None:
    """Close the driver's connection once, as a network that fails would."""
    last, where = int(environment[TRANSACTION]), environment[WHERE]
    begun = 0
    is_writing = False

    def before_statement(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal begun, is_writing
        if statement.startswith("BEGIN"):
            is_writing = statement == "BEGIN IMMEDIATE"
            begun += is_writing
            Path(environment[COUNTED]).write_text(str(begun))
        elif where == AT_STATEMENT:
            lose(connection)

    def before_commit(connection: Connection) -> None:
        if where == AT_COMMIT:
            lose(connection)

    def lose(connection: Connection) -> None:
        nonlocal is_writing
        if is_writing and begun == last:
            is_writing = False
            driver = connection.connection.dbapi_connection
            assert driver is not None
            driver.close()

    event.listen(Engine, "before_cursor_execute", before_statement)
    event.listen(Engine, "commit", before_commit)
