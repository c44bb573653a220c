"""The process that does a job, as its runner sees it: started, listened to, watched, ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from autoq.service.jobs._lines import EventLines, LogLines, Message

JOB_COMMAND = (sys.executable, "-m", "autoq.service.jobs.job")

GRACE_SECONDS = 0.5
"""Between the request to end and the end: what is left to do is to remove temporary files."""

_CHUNK_BYTES = 65_536
_CHUNKS_AT_ONCE = 16
_SHOWN_OF_ID = 12  # in names of folders; sockets in them have at most 107 bytes

_SECRETS = ("AUTOQ_STORE", "AUTOQ_TOKEN", "AUTOQ_SERVER")
"""Beginnings of names in the environment that no job is to see."""

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # models and data lie in the roots, and nowhere else
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONUNBUFFERED": "1",
}


class JobProcess:
    """A job's process with its group, its output and its folder for temporary files.

    `messages()` gives what it said since the last call. The process ends when its runner does:
    see `autoq.service.jobs._parents`. Start it in the main thread: Linux tells a process that its parent
    ended when the thread ended that started it.
    """

    def __init__(self, order: Mapping[str, Any], command: Sequence[str] = JOB_COMMAND) -> None:
        """
        Args:
            order: what `autoq.service.jobs.job` reads; it may hold a password, so it goes through a
                pipe.
            command: that does jobs; the number of a descriptor is added to it.
        """
        self._temporary = _temporary_folder(order["job"]["id"])
        reading, writing = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*command, str(writing)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(writing,),
                start_new_session=True,  # its own group, so that it ends with all it started
                env=_environment(self._temporary),
            )
        except BaseException:
            os.close(reading)
            shutil.rmtree(self._temporary, ignore_errors=True)
            raise
        finally:
            os.close(writing)
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._reading = reading
        for descriptor, lines in (
            (reading, EventLines()),
            (self._process.stdout.fileno(), LogLines("stdout")),
            (self._process.stderr.fileno(), LogLines("stderr")),
        ):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, lines)
        self._say({**order, "parent": os.getpid()})

    @property
    def pid(self) -> int:
        """Of the process; its group has the same number."""
        return self._process.pid

    def wait(self, seconds: float) -> None:
        """Until the process says something or ends, or the time is over."""
        if self._selector.get_map():
            self._selector.select(seconds)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)

    def messages(self) -> list[Message]:
        """What the process said and printed since the last call."""
        said: list[Message] = []
        for key in list(self._selector.get_map().values()):
            said += self._read(key.fd, key.data)
        return said

    def ended(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def memory_bytes(self) -> int:
        """Resident memory of the process and of those that it started."""
        try:
            process = psutil.Process(self.pid)
            family = [process, *process.children(recursive=True)]
        except psutil.Error:
            return 0
        return sum(_resident_bytes(member) for member in family)

    def stop(self) -> list[Message]:
        """End the process and all of its group: asked first, then killed.

        Returns:
            What it said meanwhile: it may just have been done.
        """
        said: list[Message] = []
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            said += self.messages()  # a full pipe would keep it from ending
            time.sleep(0.01)
        self._signal(signal.SIGKILL)
        self._process.wait()
        return said + self.messages()

    def close(self) -> None:
        """Kill what is left of the group, and give pipes and temporary files back."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._selector.close()
        os.close(self._reading)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _say(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already; its exit status tells
            self._process.stdin.write(json.dumps(order).encode())
            self._process.stdin.close()

    def _read(self, descriptor: int, lines: EventLines | LogLines) -> list[Message]:
        said: list[Message] = []
        for _ in range(_CHUNKS_AT_ONCE):
            try:
                chunk = os.read(descriptor, _CHUNK_BYTES)
            except BlockingIOError:
                return said
            if not chunk:
                self._selector.unregister(descriptor)
                return said + lines.rest()
            said += lines.add(chunk)
        return said

    def _signal(self, number: signal.Signals) -> None:
        # The leader has not been waited for, or others of the group hold its number; an empty
        # group's number may be given to another only after the process was waited for.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def _temporary_folder(job_id: str) -> str:
    """A new folder; what an attempt left whose runner was killed with it is removed."""
    prefix = f"autoq-{job_id[:_SHOWN_OF_ID]}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=prefix)


def _environment(temporary: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SECRETS)}
    # Ray finds its cluster there, and the sockets of one of its own have to have short names.
    ray = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
    return {**kept, **_ENVIRONMENT, "TMPDIR": temporary, "RAY_TMPDIR": ray}


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
