"""How a job's process tells its runner what happens: lines of JSON through a pipe."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from autoq.progress import Advance
from autoq.studies._encoding import json_clean
from autoq.wire import EventKind

PROGRESS_SECONDS = 0.25
"""Between two events of progress, at least; a task's beginning and end are always told."""

UNCHANGED_SECONDS = 10.0
"""Between two events of progress that say the same, such as while a cluster is waited for."""

_FEWEST_FOR_ESTIMATE = 2
"""Steps of a task that must be done before the rest is estimated: the first is often slow."""


class Speech:
    """Says events, the study's name, and in the end a result or a problem."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def event(self, kind: EventKind, **data: Any) -> None:
        """Something happened."""
        self._say({"kind": kind, "data": data})

    def study(self, name: str) -> None:
        """The study that the job works on."""
        self._say({"study": name})

    def result(self, found: Mapping[str, Any]) -> None:
        """The job is done."""
        self._say({"result": found})

    def problem(self, problem: Mapping[str, Any]) -> None:
        """The job failed."""
        self._say({"problem": problem})

    def _say(self, message: Mapping[str, Any]) -> None:
        line = json.dumps(json_clean(message), allow_nan=False).encode() + b"\n"
        with self._lock:
            while line:
                line = line[os.write(self._descriptor, line) :]


class EventProgress:
    """Tells work as it advances, a few times a second, and how long it will take."""

    def __init__(self, speech: Speech) -> None:
        self._speech = speech
        self._looked = 0.0
        self.listeners: list[Callable[[str], None]] = []
        """Called with a task's description when it begins, whenever it advances, and at its end."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `autoq.progress.Progress.task`."""
        task = _Task(description, total)
        self._tell(task)

        def advance(steps: int = 1) -> None:
            task.done += steps
            if time.monotonic() - self._looked >= PROGRESS_SECONDS:
                self._tell(task)

        try:
            yield advance
        finally:
            self._tell(task)

    def note(self, text: str) -> None:
        """See `autoq.progress.Progress.note`."""
        self._speech.event(EventKind.NOTE, text=text)

    def _tell(self, task: _Task) -> None:
        self._looked = time.monotonic()
        if task.has_news(self._looked):
            self._speech.event(EventKind.PROGRESS, **task.told(self._looked))
        for listen in self.listeners:
            listen(task.description)


class _Task:
    def __init__(self, description: str, total: int) -> None:
        self.description, self.total, self.done = description, total, 0
        self._began = time.monotonic()
        self._last: tuple[float, int] | None = None  # when, and how much was done, when it was told

    def has_news(self, now: float) -> bool:
        """Whether it is not as it was told last, or that is long ago."""
        if self._last is None:
            return True
        when, done = self._last
        return done != self.done or now - when >= UNCHANGED_SECONDS

    def told(self, now: float) -> dict[str, Any]:
        """As the event says it; it is told now."""
        self._last = now, self.done
        return {
            "task": self.description,
            "done": self.done,
            "total": self.total,
            "seconds_left": self._seconds_left(now),
        }

    def _seconds_left(self, now: float) -> float | None:
        if not self.total or self.done < min(_FEWEST_FOR_ESTIMATE, self.total):
            return None
        left = max(0, self.total - self.done)
        return round((now - self._began) / self.done * left, 1)
