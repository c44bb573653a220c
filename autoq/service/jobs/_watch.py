"""From a job's process to its row in the store, while it runs: events out, cancellation in."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

from autoq.errors import StoreError, StudyLockedError
from autoq.service.jobs._lines import Message
from autoq.service.jobs._process import JobProcess
from autoq.service.problems import Refusal, problem_of
from autoq.studies import JobClaim, JobEvent, JobStatus, StudyStore
from autoq.wire import EventKind

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
"""Between two looks at the store, for cancellation; events are written as often."""

_HEARTBEAT_SECONDS = 5.0
_MEMORY_SECONDS = 0.5
_MOST_EVENTS_AT_ONCE = 500
_MOST_WAITING_EVENTS = 1_000
"""More than these, and lines that the process prints are only counted."""


_KILLED_BY = {6: "it aborted", 9: "it was killed", 11: "it crashed", 7: "it crashed"}


class Verdict(Enum):
    """How the process ended."""

    ENDED = auto()  # by itself
    CANCELLED = auto()
    STOPPED = auto()  # with its runner
    TOO_LARGE = auto()
    LOST = auto()  # another runner has the job


class JobWatch:
    """Keeps a job's process and its row in step."""

    def __init__(
        self,
        store: StudyStore,
        claim: JobClaim,
        process: JobProcess,
        *,
        limit_bytes: int | None,
    ) -> None:
        self._store, self._claim, self._process = store, claim, process
        self._limit_bytes = limit_bytes
        self._waiting: deque[JobEvent] = deque()
        self._left_out = 0  # printed lines, of a process that prints too much
        self._study: str | None = None
        self._progress: dict[str, Any] | None = None
        self._result: dict[str, Any] | None = None
        self._problem: dict[str, Any] | None = None
        self._last_error = ""  # line of standard error
        self._looked = self._told = self._weighed = time.monotonic()

    def until_it_ends(self, must_stop: Callable[[], bool]) -> Verdict:
        """Pass on what the process says until it has ended, by itself or for a reason."""
        while True:
            self._process.wait(_LOOK_SECONDS)
            has_ended = self._process.ended() is not None
            self._hear(self._process.messages())
            if has_ended:
                return Verdict.ENDED
            verdict = self._reason_to_end(must_stop)
            if verdict is not None:
                self._hear(self._process.stop())
                return verdict

    def conclude(self, verdict: Verdict) -> None:
        """Write how the job ended.

        Raises:
            StudyLockedError: another runner has the job.
            StoreError: the store does not answer; call again.
        """
        if verdict is Verdict.LOST:
            return
        while self._waiting or self._left_out or self._study is not None:
            self._tell()
        if self._result is not None:  # it was done before it was ended
            self._store.finish_job(self._claim, self._result)
        elif verdict is Verdict.STOPPED:
            self._store.give_back_job(self._claim)
        elif verdict is Verdict.CANCELLED:
            self._store.end_cancelled_job(self._claim)
        elif verdict is Verdict.TOO_LARGE:
            self._store.fail_job(self._claim, self._too_large())
        elif self._problem is not None:
            self._store.fail_job(self._claim, self._problem)
        else:
            self._conclude_wordless()

    def _conclude_wordless(self) -> None:
        """The process ended without a word of its own."""
        status = self._process.ended() or 0
        if status < 0:
            how = _KILLED_BY.get(-status, "it was ended")
            memory = ", perhaps because the machine ran out of memory" if status == -9 else ""
            self._store.record_death(self._claim, f"{how} by signal {-status}{memory}")
            return
        said = f": {self._last_error}" if self._last_error else ""
        text = f"the job's process ended with exit code {status} and without a result{said}"
        self._store.fail_job(self._claim, problem_of(Refusal("internal", text)).model_dump())

    def _hear(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._take(message)

    def _take(self, message: Message) -> None:
        if message.study is not None:
            self._study = message.study
        if message.result is not None:
            self._result = message.result
        if message.problem is not None:
            self._problem = message.problem
        if message.event is not None:
            self._take_event(message.event)

    def _take_event(self, event: JobEvent) -> None:
        if event.kind == EventKind.PROGRESS:
            self._progress = event.data
        if event.kind == EventKind.LOG:
            if event.data.get("stream") == "stderr":
                self._last_error = event.data["text"]
            if len(self._waiting) >= _MOST_WAITING_EVENTS:
                self._left_out += 1
                return
        self._waiting.append(event)

    def _reason_to_end(self, must_stop: Callable[[], bool]) -> Verdict | None:
        if must_stop():
            return Verdict.STOPPED
        now = time.monotonic()
        if self._limit_bytes is not None and now - self._weighed >= _MEMORY_SECONDS:
            self._weighed = now
            if self._process.memory_bytes() > self._limit_bytes:
                return Verdict.TOO_LARGE
        if now - self._looked < _LOOK_SECONDS:
            return None
        self._looked = now
        return self._look()

    def _look(self) -> Verdict | None:
        """Write what waits, and see whether the job is to go on."""
        try:
            is_silent = time.monotonic() - self._told >= _HEARTBEAT_SECONDS
            if self._waiting or self._study is not None or is_silent:
                status = self._tell()
            else:
                status = self._store.job_status(self._claim)
        except StudyLockedError as error:
            logger.warning("%s", error)
            return Verdict.LOST
        except StoreError as error:  # what was said is kept, and said when the store answers
            logger.warning("events of job %s wait: %s", self._claim.job.id, error)
            return None
        return Verdict.CANCELLED if status is JobStatus.CANCELLING else None

    def _tell(self) -> JobStatus:
        events = [self._waiting[n] for n in range(min(len(self._waiting), _MOST_EVENTS_AT_ONCE))]
        left_out = self._left_out
        more = [_lines_left_out(left_out)] if left_out else []
        status = self._store.append_events(
            self._claim, [*events, *more], progress=self._progress, study=self._study
        )
        for _ in events:
            self._waiting.popleft()
        self._left_out -= left_out
        self._study = self._progress = None
        self._told = time.monotonic()
        return status

    def _too_large(self) -> dict[str, Any]:
        assert self._limit_bytes is not None
        refusal = Refusal(
            "too-large",
            f"a job may take {self._limit_bytes / 1e9:.2f} GB of memory here (--max-job-memory), and "
            "this one took more; give the search a bound (max_memory), fewer or shorter sequences, "
            "or start the server with a larger limit",
        )
        return problem_of(refusal).model_dump()


def _lines_left_out(count: int) -> JobEvent:
    text = f"{count} lines were left out: the job prints faster than they can be kept"
    return JobEvent(kind=EventKind.LOG, data={"text": text, "stream": "stderr"})
