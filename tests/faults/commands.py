"""What fault tests have in common: commands that can be killed, and all that a study holds."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.fork_server import KILLED

ROOT = Path(__file__).parents[2]

_TIMES = {
    "created", "updated", "started", "finished", "seconds", "heartbeat", "versions", "id",
    "row_sha256",
}  # fmt: skip
"""Columns that differ between two runs of the same search, and the seal, which is of these, too."""
_OF_THE_CODE = {"fingerprint"}
"""Hashes of autoq's own modules among other things, which may be edited while tests run."""
_OF_THE_RUN = {"peak_rss_bytes", "seconds", "workers", "reused"}
"""Fields of a stage's payload that say how it was computed, and not what."""


@dataclass(frozen=True)
class Ended:
    """A command that ended, or was killed."""

    code: int
    seconds: float  # of processor time
    out: str
    err: str

    @property
    def was_killed(self) -> bool:
        """Whether it ended by SIGKILL."""
        return self.code == KILLED


@dataclass
class Commands:
    """`autoq` in processes that fork from one which has imported everything."""

    server: subprocess.Popen[str]
    folder: Path
    logs: dict[int, str] = field(default_factory=dict)
    begun: int = 0

    @classmethod
    def begin(cls, folder: Path, *warm_up: str) -> Commands:
        """Start the server; it imports what the command `warm_up` does."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        commands = cls(server, folder)
        answer = commands._ask("warm_up", commands._request(warm_up))
        if answer["code"] != 0:
            raise RuntimeError((folder / "log1.err").read_text())
        return commands

    def run(self, *arguments: str, kill_after: float | None = None, **more: Any) -> Ended:
        """Run a command to its end, or kill it after so many seconds of processor time."""
        return self.wait(self.start(*arguments, **more), kill_after)

    def start(self, *arguments: str, **more: Any) -> int:
        """Start a command, and return its process id; see `fork_server._run` for `more`."""
        request = self._request(arguments, **more)
        pid: int = self._ask("start", request)["pid"]
        self.logs[pid] = request["log"]
        return pid

    def wait(self, pid: int, kill_after: float | None = None) -> Ended:
        """Wait for a command's end, and kill it when it has computed for so many seconds."""
        answer = self._ask("wait", {"pid": pid, "seconds": kill_after})
        log = self.logs.pop(pid)
        said = [Path(f"{log}.{name}").read_text(errors="replace") for name in ("out", "err")]
        return Ended(answer["code"], answer["seconds"], *said)

    def end(self) -> None:
        """End the server and what runs in it."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=60)

    def _request(self, arguments: Any, **more: Any) -> dict[str, Any]:
        environment = {"TMPDIR": str(self.folder), **more.pop("environment", {})}
        self.begun += 1
        log = str(self.folder / f"log{self.begun}")
        return {"arguments": list(arguments), "log": log, "environment": environment, **more}

    def _ask(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps({"what": what, **request}), file=self.server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.server.stdout.readline())
        return answer


def small_search(model: Path, place: Path, *more: str) -> list[str]:
    """Arguments of a search of about a second, its store and checkpoint in the folder `place`."""
    return [
        *("search", str(model), "--bits", "6", "--formats", "fp8,nvfp4", "--quiet"),
        *("--calib-sequences", "6", "--sequence-length", "32", "--batch-size", "2"),
        *("--held-out-sequences", "2", "--compare-uniform", "--store", store_in(place)),
        *("--export", str(place / "checkpoint"), "--overwrite", *more),
    ]  # fmt: skip


def store_in(place: Path) -> str:
    """URL of the store in the folder."""
    return f"sqlite:///{place / 'autoq.db'}"


def content_of(place: Path) -> dict[str, list[Any]]:
    """All that the store in `place` holds and the bytes of its checkpoint, without times.

    Rows of what failed on the way (exports that were killed) are left out: they are its history.
    """
    with sqlite3.connect(place / "autoq.db") as connection:
        connection.row_factory = sqlite3.Row
        content = {table: _rows(connection, table) for table in _TABLES}
    connection.close()
    content["export"] = [row for row in content["export"] if row["status"] == "complete"][-1:]
    text = json.dumps(content).replace(str(place), "PLACE")
    plain: dict[str, list[Any]] = json.loads(text)
    plain["files"] = files_of(place / "checkpoint")
    return plain


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Where two plain values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted({*found, *expected})
        pairs = [(key, found.get(key), expected.get(key)) for key in keys]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(found, expected, strict=True))]
    else:
        return [] if found == expected else [f"{where}: {found!r} instead of {expected!r}"]
    return [line for key, a, b in pairs for line in differences(a, b, f"{where}/{key}")]


def files_of(folder: Path) -> list[Any]:
    """(name, SHA-256) of each file."""
    import hashlib

    return [
        [str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


_TABLES = {
    "study": "SELECT * FROM study",
    "stage": "SELECT * FROM stage ORDER BY study_id, name",
    "stored_array": "SELECT stage, name, dtype, shape, sha256 FROM stored_array ORDER BY name",
    "blob": "SELECT b.sha256, b.size_bytes, sum(length(c.data)) AS there FROM blob b "
    "JOIN blob_chunk c ON c.blob_id = b.id GROUP BY b.id ORDER BY b.sha256",
    "score_batch": "SELECT batch_index, sha256 FROM score_batch ORDER BY batch_index",
    "sensitivity": "SELECT * FROM sensitivity ORDER BY group_name, format_name",
    "plan": "SELECT * FROM plan ORDER BY label",
    "measurement": "SELECT m.*, p.label AS plan FROM measurement m JOIN plan p ON p.id = m.plan_id "
    "ORDER BY p.label, m.metric",
    "export": "SELECT e.container, e.status, e.bytes_written, e.path, e.verification, p.label "
    "FROM export e JOIN plan p ON p.id = e.plan_id ORDER BY e.id",
    "export_file": "SELECT path, size_bytes, sha256 FROM export_file WHERE export_id = "
    "(SELECT max(id) FROM export) ORDER BY path",
    "lease": "SELECT * FROM lease",
}


def _rows(connection: sqlite3.Connection, table: str) -> list[dict[str, Any]]:
    return [_plain(dict(row)) for row in connection.execute(_TABLES[table])]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in row.items()
        if name not in _TIMES | _OF_THE_CODE | {"plan_id"}
    }
    if "payload" in kept:
        payload = json.loads(kept["payload"])
        kept["payload"] = {k: v for k, v in payload.items() if k not in _OF_THE_RUN | {"plan_id"}}
    return kept


def tally(name: str, counts: Mapping[str, Any]) -> None:
    """Print counts, and append them to the file that AUTOQ_FAULT_COUNTS names, as a JSON line."""
    line = json.dumps({name: counts})
    print(line)
    place = os.environ.get("AUTOQ_FAULT_COUNTS")
    if place:
        with open(place, "a") as file:
            print(line, file=file)
