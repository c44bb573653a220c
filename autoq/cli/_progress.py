"""Progress on standard error: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from autoq.progress import Advance

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

LINE_INTERVAL_SECONDS = 20.0


class QuietProgress:
    """No bars; notes are still shown, because they may be warnings."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `autoq.progress.Progress.task`."""
        yield lambda steps=1: None

    def note(self, text: str) -> None:
        """See `autoq.progress.Progress.note`."""
        self._console.print(Text(f"note: {text}", style="yellow"), soft_wrap=True)


class BarProgress(QuietProgress):
    """A bar per task: stage, count, elapsed, estimated remaining."""

    def __init__(self) -> None:
        super().__init__()
        self._bars: Bars | None = None
        self._running = 0

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `autoq.progress.Progress.task`."""
        bars = self._started()
        identifier = bars.add_task(description, total=total or None)

        def advance(steps: int = 1) -> None:
            bars.advance(identifier, steps)

        self._running += 1
        try:
            yield advance
            if not total:
                done = bars.tasks[identifier].completed
                bars.update(identifier, total=done or 1, completed=done or 1)
        finally:
            self._running -= 1
            if not self._running:
                bars.stop()
                self._bars = None

    def _started(self) -> Bars:
        if self._bars is None:
            self._bars = _bars(self._console)
            self._bars.start()
        return self._bars


def _bars(console: Console) -> Bars:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=False,
        redirect_stderr=False,
    )


class LineProgress(QuietProgress):
    """For logs: a line when a task ends, and now and then while it runs."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `autoq.progress.Progress.task`."""
        started = written = time.monotonic()
        done = 0

        def advance(steps: int = 1) -> None:
            nonlocal done, written
            done += steps
            now = time.monotonic()
            if now - written >= LINE_INTERVAL_SECONDS and done < total:
                written = now
                self._line(_running_line(description, done, total, now - started))

        yield advance
        self._line(_finished_line(description, done, total, time.monotonic() - started))

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)


def _running_line(description: str, done: int, total: int, elapsed_seconds: float) -> str:
    line = f"{description}: {done} of {total}, {_took(elapsed_seconds)}"
    if not done:  # a long first step says nothing of the rest
        return line
    return f"{line}, about {_took(elapsed_seconds * (total - done) / done)} left"


def _finished_line(description: str, done: int, total: int, elapsed_seconds: float) -> str:
    count = f"{done} of {total}" if total else str(done) if done else "done"
    return f"{description}: {count}, {_took(elapsed_seconds)}"


def _took(seconds: float) -> str:
    # Here, as autoq.report takes longer to load than most commands that show no progress run.
    from autoq.report.numbers import seconds_text

    return seconds_text(seconds)


def make_progress(*, quiet: bool) -> QuietProgress:
    """The progress that suits standard error."""
    if quiet:
        return QuietProgress()
    return BarProgress() if sys.stderr.isatty() else LineProgress()
