"""Starts `autoq` commands by forking, so that a hundred of them import torch once.

Run as a program: it takes requests on standard input, one JSON document a line, and answers each
with one. It never computes anything itself: torch's backward refuses to run in a fork of a process
that has run it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL


def main() -> None:
    """Answer requests until standard input ends; commands that still run then are killed."""
    import autoq.cli

    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    running: dict[int, int] = {}
    for line in requests:
        request = json.loads(line)
        answer = _ANSWERS[request.pop("what")](running, **request)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        os.killpg(pid, signal.SIGKILL)
    assert autoq.cli is not None


def _warm_up(_: Any, **command: Any) -> dict[str, Any]:
    """Import what the command imports, and find out what that is in a process of its own."""
    names = Path(command["log"] + ".modules")
    running: dict[int, int] = {}
    pid = _start(running, **command, modules=str(names))["pid"]
    ended = _wait(running, pid=pid, seconds=None)
    for name in json.loads(names.read_text()) if names.exists() else ():
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return ended


def _start(running: dict[int, int], **command: Any) -> dict[str, Any]:
    pid = os.fork()
    if pid == 0:
        os._exit(_run(**command))
    running[pid] = os.pidfd_open(pid)
    return {"pid": pid}


def _wait(running: dict[int, int], pid: int, seconds: float | None) -> dict[str, Any]:
    """Wait for the end of a command; kill it when it has computed for so many seconds.

    The processor's time and not the wall's, so that a kill strikes at the same place on machines
    that have other things to do.
    """
    descriptor = running.pop(pid)
    while not select.select([descriptor], [], [], _until(pid, seconds))[0]:
        if seconds is not None and _computed(pid) >= seconds:
            os.kill(pid, signal.SIGKILL)
            seconds = None
    os.close(descriptor)
    _, status, used = os.wait4(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}


def _until(pid: int, seconds: float | None) -> float | None:
    """How long it takes at least until a process has computed for so many seconds."""
    return None if seconds is None else max(seconds - _computed(pid), 0.001)


def _computed(pid: int) -> float:
    """Seconds of processor time of a process; one that has ended has all the time there is."""
    try:
        return time.clock_gettime((~pid << 3) | _ALL_THREADS)
    except OSError:
        return math.inf


_ALL_THREADS = 2
"""With the process id, Linux' number of the clock that counts what a whole process computes."""


def _run(
    arguments: list[str],
    log: str,
    environment: dict[str, str],
    most_file_bytes: int | None = None,
    setup: str | None = None,
    modules: str | None = None,
) -> int:
    """The command in this process, what it says in files; returns its exit code.

    Args:
        most_file_bytes: no file may become larger, as on a disk that is full.
        setup: "module:function" to call before, with the command's environment.
        modules: file for the names of all modules that are loaded at the end.
    """
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    import tempfile

    tempfile.tempdir = None  # to be looked up again
    from autoq.cli import main as autoq_main

    sys.argv = ["autoq", *arguments]
    code = 1
    try:
        if setup is not None:
            module, function = setup.split(":")
            getattr(importlib.import_module(module), function)(environment)
        if most_file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, resource.RLIM_INFINITY))
        autoq_main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001  (this process ends here)
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if modules is not None:
        Path(modules).write_text(json.dumps(sorted(sys.modules)))
    return code


_ANSWERS = {"warm_up": _warm_up, "start": _start, "wait": _wait}

if __name__ == "__main__":
    main()
