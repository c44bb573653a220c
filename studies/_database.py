"""The engine, its settings, schema migration, and the one transaction scope."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, StaticPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from autoq.errors import StoreError, without_password

BUSY_TIMEOUT_MS = 60_000
_BEGIN_OPTION = "autoq_begin"
_DIALECTS = ("sqlite", "postgresql")


class StoreConflictError(StoreError):
    """Another process wrote the same record first; reading it again finds it."""


class Database:
    """One open database: `read()` and `write()` are the only ways in."""

    def __init__(self, engine: Engine, url: URL) -> None:
        self.url = url
        self.described = describe(url)
        self._engine = engine
        # Taking SQLite's write lock at once makes a writer wait its turn. A transaction that
        # reads first and writes later cannot wait: its snapshot is stale by then, and it fails.
        writer = engine.execution_options(**{_BEGIN_OPTION: "BEGIN IMMEDIATE"})
        self._write_sessions = sessionmaker(writer, expire_on_commit=False)
        # PostgreSQL gives each statement a view of its own unless told otherwise; SQLite does not.
        reader = engine
        if url.get_backend_name() == "postgresql":
            reader = engine.execution_options(isolation_level="REPEATABLE READ")
        self._read_sessions = sessionmaker(reader, expire_on_commit=False)
        self._writer = writer
        self.held_leases: dict[int, str] = {}  # study -> owner of the lease that is held here

    @classmethod
    def open(cls, url_or_path: str, *, migrate: bool = True) -> Database:
        """Connect, create the file where there is none, and bring the schema up to date.

        Args:
            migrate: False leaves the schema as it is, to be looked at.
        Raises:
            StoreError: the place cannot be used; one line saying why and what to do.
        """
        url = parse_url(url_or_path)
        engine = _create_engine(url)
        try:
            with translated_errors(describe(url)):
                if url.get_backend_name() == "sqlite":
                    _use_write_ahead_log(engine)
                database = cls(engine, url)
                if migrate:
                    database.migrate()
        except BaseException:
            engine.dispose()
            raise
        return database

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One consistent view; nothing is written."""
        with translated_errors(self.described), self._read_sessions.begin() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One unit of work: committed whole, or rolled back and raised as an error of ours.

        Raises:
            StoreConflictError: another process wrote the same record first.
            StoreError: the database refused or failed.
        """
        with translated_errors(self.described), self._write_sessions.begin() as session:
            yield session

    def close(self) -> None:
        """Give all connections back."""
        self._engine.dispose()

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """A connection outside of any transaction, for commands that refuse to run in one."""
        if self.url.get_backend_name() == "sqlite":
            with self._engine.execution_options(**{_BEGIN_OPTION: None}).connect() as connection:
                yield connection
            return
        with self._engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    def missing_revisions(self) -> list[tuple[str, str]]:
        """(revision, what it does) of the migrations that the database lacks, oldest first.

        Raises:
            StoreError: the schema is newer than this version of autoq.
        """
        from autoq.studies._migrate import missing_revisions

        with translated_errors(self.described), self._engine.begin() as connection:
            return missing_revisions(connection, self.described)

    def migrate(self) -> None:
        """Bring the schema up to date."""
        from autoq.studies._migrate import is_current, upgrade_schema

        # Looking takes no lock: readers do not wait for a writer.
        with self._engine.begin() as connection:
            if is_current(connection):
                return
        # One transaction round the whole upgrade: of two processes that open a new file at
        # once, the second waits and then finds nothing left to do.
        with self._writer.begin() as connection:
            upgrade_schema(connection, self.described)


def parse_url(url_or_path: str) -> URL:
    """`url_or_path` as a URL; SQLite paths become absolute, so that a later chdir is harmless.

    Raises:
        StoreError: not a URL, or a database that the store does not run on.
    """
    if "://" not in url_or_path:
        return _with_absolute_path(URL.create("sqlite", database=url_or_path))
    try:
        url = make_url(url_or_path)
    except (ArgumentError, ValueError) as error:
        raise StoreError(
            f"the study store must be a file path or a URL like sqlite:///autoq.db, "
            f"got {without_password(url_or_path)!r}"
        ) from error
    if url.get_backend_name() not in _DIALECTS:
        raise StoreError(
            f"the study store runs on {' and '.join(_DIALECTS)}, got {url.get_backend_name()!r}; "
            "give a URL like sqlite:///autoq.db"
        )
    return _with_absolute_path(url) if url.get_backend_name() == "sqlite" else url


def file_of(url_or_path: str) -> Path | None:
    """The file that a SQLite store is; None for other databases and in memory.

    Raises:
        StoreError: not a URL, or a database that the store does not run on.
    """
    url = parse_url(url_or_path)
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)) if is_file else None


def describe(url: URL) -> str:
    """The store as messages name it: the file, or the URL without its password."""
    if url.get_backend_name() == "sqlite":
        return f"study store {url.database or ':memory:'}"
    return f"study store {without_password(url.render_as_string(hide_password=False))}"


@contextmanager
def translated_errors(described: str) -> Iterator[None]:
    """Turn the driver's errors into ours."""
    try:
        yield
    except IntegrityError as error:
        raise StoreConflictError(
            f"{described} refused a record: {_first_line(error)}; "
            "another process may have written it first, so read it again"
        ) from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise StoreError(explain(error, described)) from error
    except UnicodeDecodeError as error:  # what SQLite reads as text is decoded by its driver
        raise StoreError(_EXPLANATIONS["SQLITE_CORRUPT"].format(described)) from error


# Driver's error code (its beginning) -> what to say of store {0} and error {1}.
_EXPLANATIONS = {
    "SQLITE_NOTADB": "{0} is not a SQLite database; name another file",
    "SQLITE_READONLY": "{0} must be writable, and it is read-only; change that or name another",
    "SQLITE_CANTOPEN": "{0} cannot be opened: it must be a file in a folder that you may write to; "
    "change the permissions or name another place",
    "SQLITE_FULL": "{0} cannot grow: the disk is full; what was stored before is intact, "
    "so free some space and run the same command again",
    "SQLITE_BUSY": "{0} stayed locked by another process for "
    f"{BUSY_TIMEOUT_MS // 1000} s; wait for that process or stop it, then try again",
    "SQLITE_CORRUPT": "{0} is damaged; restore the file from a copy or name another",
    "SQLITE_IOERR": "{0} cannot be read or written: the disk reports an error ({1}); "
    "check the disk, then run the same command again",
}


def explain(error: Exception, described: str) -> str:
    """One line for a driver's error: what is wrong with the store, and what to do."""
    code = str(getattr(_from_driver(error), "sqlite_errorname", ""))
    for prefix, text in _EXPLANATIONS.items():
        if code.startswith(prefix):
            return text.format(described, _first_line(error))
    return f"{described} failed: {_first_line(error)}"


def _from_driver(error: Exception) -> BaseException:
    return getattr(error, "orig", None) or error


def _first_line(error: Exception) -> str:
    text = str(_from_driver(error))
    return text.splitlines()[0] if text else type(error).__name__


def _with_absolute_path(url: URL) -> URL:
    if url.database in (None, "", ":memory:"):
        return url.set(database=":memory:")
    path = Path(str(url.database)).expanduser().absolute()
    if not path.parent.is_dir():
        raise StoreError(
            f"the study store's folder must exist, and {path.parent} does not; create it first"
        )
    if path.is_dir():
        raise StoreError(f"the study store must be a file, and {path} is a folder; name a file")
    return url.set(database=str(path))


def _create_engine(url: URL) -> Engine:
    options: dict[str, Any] = {}
    if url.database == ":memory:":
        # Every connection to :memory: is a database of its own, so there must be only one.
        options = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    try:
        engine = create_engine(url, **options)
    except (ImportError, NoSuchModuleError) as error:
        raise StoreError(
            f"{describe(url)} needs a driver that is not installed ({error}); "
            "install it, or use a SQLite file"
        ) from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _set_connection_pragmas)
        event.listen(engine, "begin", _begin_explicitly)
    return engine


def _set_connection_pragmas(connection: Any, _record: object) -> None:
    # The driver would begin transactions where it sees fit; `_begin_explicitly` does it instead.
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_explicitly(connection: Connection) -> None:
    statement = connection.get_execution_options().get(_BEGIN_OPTION, "BEGIN")
    if statement is not None:
        connection.exec_driver_sql(statement)


def _use_write_ahead_log(engine: Engine) -> None:
    """Switch the file to WAL, which it then stays in.

    SQLite does not wait for its busy timeout here, so two processes that create a store
    together need the retry.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_MS / 1000
    connection = engine.raw_connection()
    try:
        while not _switched_to_wal(connection.cursor(), deadline):
            time.sleep(0.02)
    finally:
        connection.close()


def _switched_to_wal(cursor: Any, deadline: float) -> bool:
    try:
        cursor.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        busy = error.sqlite_errorname.startswith("SQLITE_BUSY")
        if not busy or time.monotonic() > deadline:
            raise
        return False
    return True
