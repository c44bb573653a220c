"""A job of the service, from outside."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Self

from autoq.client._events import follow
from autoq.client._failures import JobCancelledError, UnreachableError, error_of
from autoq.client._transport import pause_seconds
from autoq.errors import AutoqError, StoreError
from autoq.progress import Advance, Progress, SilentProgress
from autoq.wire import Event, EventKind, Job, JobStatus

if TYPE_CHECKING:
    from autoq.client._client import Client

ENDED = frozenset({JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED})


class JobHandle:
    """One job: look at it, wait for it, end it. The job itself does not need the handle."""

    def __init__(self, client: Client, job: Job) -> None:
        self._client = client
        self._job = job

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r}, {self._job.kind.value}, {self._job.status.value})"

    @property
    def id(self) -> str:
        """Of the job."""
        return self._job.id

    @property
    def job(self) -> Job:
        """The job as it was last seen."""
        return self._job

    @property
    def study(self) -> str | None:
        """Name of the job's study, as soon as it is known."""
        return self._job.study

    def refresh(self) -> Job:
        """The job as it is now."""
        self._job = self._client.job(self.id).job
        return self._job

    def cancel(self) -> Job:
        """Ask the job to end; what it finished is kept."""
        self._job = self._client.cancel(self.id).job
        return self._job

    def resume(self) -> Job:
        """Queue a failed or cancelled job again; it goes on where it was."""
        self._job = self._client.resume(self.id).job
        return self._job

    def events(self, after: int | None = None) -> Iterator[Event]:
        """What happens to the job, from its beginning or after an event, until it has ended.

        A lost connection is made again and goes on after the last event seen.

        Raises:
            UnreachableError: the server was away for minutes.
        """
        for attempt in count():
            seen = after
            for event in follow(self._client.transport, f"v1/jobs/{self.id}/events", after):
                after = event.id
                yield event
            # A server that ends lets its streams end, too: `follow` waits for it to come back.
            with suppress(UnreachableError, StoreError):
                if self.refresh().status in ENDED:
                    return
            if after == seen:  # a server that ends every stream at once is not asked without pause
                time.sleep(pause_seconds(attempt))

    def wait(self, progress: Progress | None = None) -> Job:
        """Wait until the job has ended, and show its progress on the way.

        Raises:
            JobCancelledError: it was cancelled.
            AutoqError: it failed; the exception that the same failure raises in process.
        """
        if self._job.status not in ENDED:
            with _Shown(progress or SilentProgress()) as shown:
                for event in self.events():
                    shown.show(event)
        return self._ended()

    def result(self, progress: Progress | None = None) -> dict[str, Any]:
        """What the job gave, once it is done; raises as `wait` does."""
        return self.wait(progress).result or {}

    def _ended(self) -> Job:
        if self._job.status is JobStatus.CANCELLED:
            raise JobCancelledError(
                f"job {self.id} was cancelled; what it finished is kept, and `autoq resume "
                f"{self.id}` goes on"
            )
        if self._job.status is JobStatus.FAILED:
            if self._job.problem is None:
                raise AutoqError(f"job {self.id} failed; its log says why")
            raise error_of(self._job.problem)
        return self._job


class _Shown:
    """Progress events as tasks of a `Progress`: one at a time, as they follow each other."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._running = ExitStack()
        self._task: tuple[str, int] | None = None
        self._done = 0
        self._advance: Advance = lambda steps=1: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def show(self, event: Event) -> None:
        if event.kind is EventKind.PROGRESS:
            data = event.data
            self._show_task(str(data["task"]), int(data["total"]), int(data["done"]))
        elif event.kind is EventKind.NOTE:
            self._progress.note(str(event.data["text"]))

    def _show_task(self, description: str, total: int, done: int) -> None:
        # A task that begins again, as after a dead worker, counts from the start.
        if self._task != (description, total) or done < self._done:
            self._running.close()
            self._task, self._done = (description, total), 0
            self._advance = self._running.enter_context(self._progress.task(description, total))
        if done > self._done:
            self._advance(done - self._done)
            self._done = done
