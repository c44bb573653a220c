"""Tokens: who may use the service, and for what; a file that holds no secret.

Each line of the file is a JSON object: the token's name, its scope, the SHA-256 of the token, and
when it was made. A token is 256 random bits, so its plain hash is as good as a slow one: there is
nothing to guess. The file is read again when it has changed; taking a line out revokes the token.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autoq.errors import InputError, UnknownNameError
from autoq.wire import Scope

TOKEN_PREFIX = "autoq_"
_SECRET_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MAXIMUM_FILE_BYTES = 1 << 20
_OTHERS = stat.S_IRWXG | stat.S_IRWXO

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """What the file says of a token; the token itself is nowhere."""

    name: str
    scope: Scope
    sha256: str  # hexadecimal, of the token's ASCII characters
    created: str  # ISO 8601, UTC


class TokenFile:
    """A file of tokens, read again when it changes.

    A file that cannot be read any more lets nobody in: the reason is logged, once for each change.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InputError: there is no such file, others may read or write it, or a line is no token.
        """
        self._path = path
        self._mark = _mark(path)
        self._entries = read_tokens(path)

    def find(self, token: str) -> TokenEntry | None:
        """The entry of a token, or None. Takes as long for any token of a length."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
        found = None
        for entry in self.entries():
            if hmac.compare_digest(entry.sha256, digest):
                found = entry
        return found

    def entries(self) -> Sequence[TokenEntry]:
        """What the file holds now."""
        mark = _mark(self._path)
        if mark != self._mark:
            self._mark, self._entries = mark, self._read_again()
        return self._entries

    def _read_again(self) -> tuple[TokenEntry, ...]:
        try:
            return read_tokens(self._path)
        except InputError as error:
            _log.error("no token is accepted: %s", error)
            return ()


def create_token(path: Path, name: str, scope: Scope) -> str:
    """Make a token and add its hash to the file, which is made where there is none.

    Returns:
        The token, which is nowhere else.
    Raises:
        InputError: the name breaks the rule or is taken, or the file is not as `read_tokens` says.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            "a token's name has up to 64 letters, digits and . _ @ -, and begins with a letter or "
            f"digit, got {name[:80]!r}; choose another"
        )
    token = TOKEN_PREFIX + base64.urlsafe_b64encode(
        secrets.token_bytes(_SECRET_BYTES)
    ).decode().rstrip("=")
    made = TokenEntry(
        name=name,
        scope=scope,
        sha256=hashlib.sha256(token.encode()).hexdigest(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    with _alone(path):
        entries = read_tokens(path) if os.path.lexists(path) else ()
        if any(entry.name == name for entry in entries):
            raise InputError(
                f"a token's name is its own, and {name!r} is in use; choose another, or revoke it"
            )
        _write(path, (*entries, made))
    return token


def revoke_token(path: Path, name: str) -> None:
    """Take a token out of the file; a server that runs refuses it from then on.

    Raises:
        UnknownNameError: there is none of this name.
        InputError: as `read_tokens`.
    """
    with _alone(path):
        entries = read_tokens(path)
        kept = tuple(entry for entry in entries if entry.name != name)
        if len(kept) == len(entries):
            known = ", ".join(entry.name for entry in entries) or "none"
            raise UnknownNameError(
                f"no token is named {name[:80]!r} (there are: {known}); see list"
            )
        _write(path, kept)


def read_tokens(path: Path) -> tuple[TokenEntry, ...]:
    """The entries of a token file, in its order.

    Raises:
        InputError: there is no such file, others than its owner may read or write it, or a line is
            no token; the message does not repeat the line.
    """
    lines = _text(path).splitlines()
    entries = [_entry(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"a token's name is its own, and {path} has {name!r} twice; drop one")
    return tuple(entries)


def _text(path: Path) -> str:
    try:
        # Not blocking: a pipe in its place must not hold the server.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise InputError(
            f"the token file {path} cannot be read: {error.strerror}; "
            "`autoq token create --token-file` makes one"
        ) from error
    try:
        _check_state(path, os.fstat(descriptor))
        return os.read(descriptor, _MAXIMUM_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the token file {path} must be UTF-8 text; mend it") from error
    finally:
        os.close(descriptor)


def _check_state(path: Path, state: os.stat_result) -> None:
    if not stat.S_ISREG(state.st_mode) or state.st_size > _MAXIMUM_FILE_BYTES:
        raise InputError(f"a token file is a file of at most 1 MiB, and {path} is none; check it")
    if state.st_mode & _OTHERS:
        raise InputError(
            f"a token file is its owner's alone, and {path} has the mode "
            f"{stat.S_IMODE(state.st_mode):04o}; run: chmod 600 {path}"
        )


def _entry(path: Path, number: int, line: str) -> TokenEntry:
    try:
        fields: Any = json.loads(line)
        entry = TokenEntry(
            name=fields["name"],
            scope=Scope(fields["scope"]),
            sha256=fields["sha256"],
            created=str(fields["created"])[:40],
        )
        if not (_NAME.fullmatch(entry.name) and _HASH.fullmatch(entry.sha256)):
            raise ValueError
    except (ValueError, LookupError, TypeError, RecursionError):
        raise InputError(
            f"a line of a token file is a JSON object with name, scope (read, run or admin), "
            f"sha256 and created, and line {number} of {path} is none; mend it or take it out"
        ) from None
    return entry


def _write(path: Path, entries: Sequence[TokenEntry]) -> None:
    """Put the entries in the file's place, complete at every moment and closed to others."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(asdict(entry)) + "\n" for entry in entries)
            stream.flush()
            _keep_owner(path, descriptor)
            os.fsync(descriptor)
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise InputError(
            f"the token file {path} cannot be written: {error.strerror}; choose another place"
        ) from error


def _keep_owner(path: Path, descriptor: int) -> None:
    """Of the file that is there: the server that reads it may be another user than who writes."""
    with suppress(FileNotFoundError):
        before, now = os.stat(path), os.fstat(descriptor)
        if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
            os.fchown(descriptor, before.st_uid, before.st_gid)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process changes a token file of this folder meanwhile."""
    try:
        descriptor = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(
            f"the token file {path} lies in a folder that cannot be opened: {error.strerror}; "
            "make it first"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _mark(path: Path) -> tuple[int, ...]:
    """Differs when the file is another, or has been written."""
    try:
        state = os.stat(path)
    except OSError:
        return ()
    return (state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_size)
