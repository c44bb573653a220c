"""The runners that a server starts: watched, started again when they die, ended with it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from autoq.service.jobs.runner import RunnerSettings

logger = logging.getLogger(__name__)

STOP_SECONDS = 10.0
"""How long runners may take to give their jobs back when the server ends."""

_LOOK_SECONDS = 0.5
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0
_HEALTHY_SECONDS = 60.0
"""A runner that lived so long is started again at once when it dies."""


class RunnerPool:
    """Runners as processes of their own, from `__enter__` to `__exit__`.

    They end by themselves when this process is gone, however it ended, and give back what they
    were at.
    """

    def __init__(
        self, settings: RunnerSettings, count: int, *, command: Sequence[str] | None = None
    ) -> None:
        """
        Args:
            settings: of each runner; the parent is this process.
            count: how many.
            command: that starts one; None is `autoq.service.jobs.runner`.
        """
        self._settings = replace(settings, parent=os.getpid())
        self._command = command or (sys.executable, "-m", "autoq.service.jobs.runner")
        self._places = [_Place() for _ in range(count)]
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="runners", daemon=True)

    def __enter__(self) -> Self:
        """Start the runners.

        Raises:
            OSError: one cannot be started.
        """
        for place in self._places:
            self._start(place)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End them: jobs that are at work go back into the queue."""
        self._ending.set()
        self._watcher.join()
        for place in self._places:
            if place.process is not None:
                place.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for place in self._places:
            _end(place, deadline)

    @property
    def alive(self) -> int:
        """How many run now."""
        return sum(place.is_alive() for place in self._places)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of those that run now."""
        return tuple(
            place.process.pid
            for place in self._places
            if place.process is not None and place.is_alive()
        )

    def _watch(self) -> None:
        while not self._ending.wait(_LOOK_SECONDS):
            for place in self._places:
                if not place.is_alive() and time.monotonic() >= place.not_before:
                    self._start_again(place)

    def _start_again(self, place: _Place) -> None:
        status = None if place.process is None else place.process.returncode
        logger.warning("a runner ended (%s) and is started again", status)
        if time.monotonic() - place.started > _HEALTHY_SECONDS:
            place.pause = _FIRST_PAUSE_SECONDS
        place.not_before = time.monotonic() + place.pause
        place.pause = min(2 * place.pause, _LONGEST_PAUSE_SECONDS)
        try:
            self._start(place)
        except OSError as error:
            logger.error("a runner cannot be started: %s", error)

    def _start(self, place: _Place) -> None:
        # Of a group of its own: Ctrl-C is for the server, which ends its runners when it is done.
        place.process = subprocess.Popen(self._command, stdin=subprocess.PIPE, process_group=0)
        place.started = time.monotonic()
        assert place.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already, and is started again
            place.process.stdin.write(json.dumps(self._settings.to_json()).encode())
            place.process.stdin.close()


class _Place:
    """One of the runners that there are to be."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.started = self.not_before = 0.0
        self.pause = _FIRST_PAUSE_SECONDS

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


def _end(place: _Place, deadline: float) -> None:
    if place.process is None:
        return
    try:
        place.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        # Its job's process dies with it, and the next server finds the job without a runner.
        place.process.kill()
        place.process.wait()
