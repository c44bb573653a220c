"""Progress that also says that the process at work is alive."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from autoq.progress import Advance, Progress
from autoq.studies import StudyLease

RENEWAL_SECONDS = 5.0
"""How often a lease is renewed at most: each renewal is a write to the store."""


class RenewingProgress:
    """Shows work as `progress` does, and renews the lease on the study whenever it advances.

    Advancing raises StudyLockedError if the lease ran out and another process has it.
    """

    def __init__(self, progress: Progress, lease: StudyLease) -> None:
        self._progress = progress
        self._lease = lease
        self._renewed = time.monotonic()

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `autoq.progress.Progress.task`."""
        self._renew()
        with self._progress.task(description, total) as advance:

            def advance_and_renew(steps: int = 1) -> None:
                advance(steps)
                self._renew()

            yield advance_and_renew

    def note(self, text: str) -> None:
        """See `autoq.progress.Progress.note`."""
        self._progress.note(text)

    def _renew(self) -> None:
        if time.monotonic() - self._renewed >= RENEWAL_SECONDS:
            self._lease.heartbeat()
            self._renewed = time.monotonic()
