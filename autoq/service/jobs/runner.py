"""A runner: takes jobs from the store one after another, and has a process do each.

It holds no model and loads no torch. What it does lies in the store, so that nothing is lost when it
is killed: another runner finds its lease without a living process, and the job goes on from what
its study has.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

from autoq.errors import StoreError, StudyLockedError
from autoq.service.jobs._process import JOB_COMMAND, JobProcess
from autoq.service.jobs._watch import JobWatch
from autoq.studies import JobClaim, StudyStore

logger = logging.getLogger(__name__)

IDLE_SECONDS = 0.25
"""Between two looks for a job."""

_NOTE_SECONDS = 15.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 30.0
_END_ATTEMPTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """What a runner is told; plain data, so that it goes from process to process."""

    store: str  # URL, with its password
    roots: Mapping[str, Any]  # of `Roots.to_json`
    max_job_memory: int | None = None  # bytes, of a job's process and those that it starts
    ray: str | None = None
    once: bool = False  # end when no job waits
    parent: int | None = None  # process whose end ends the runner; None: it lives on its own

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "roots": dict(self.roots)}


class Runner:
    """Runs jobs until it is asked to stop, or its parent is gone."""

    def __init__(self, settings: RunnerSettings, job_command: Sequence[str] = JOB_COMMAND) -> None:
        """
        Args:
            job_command: that does jobs; see `JobProcess`.
        """
        self._settings, self._job_command = settings, job_command
        self._owner = uuid.uuid4().hex
        self._stopping = False
        self._noted = -_NOTE_SECONDS
        self._pause = _FIRST_PAUSE_SECONDS  # after a process that cannot be started

    def run(self) -> None:
        """Until `stop`. A store that does not answer is asked again, less and less often.

        Raises:
            StoreError: the store cannot be opened at the beginning.
        """
        with StudyStore.open(self._settings.store) as store:
            pause = _FIRST_PAUSE_SECONDS
            while not self.must_stop():
                try:
                    claim = self._next_job(store)
                except StoreError as error:
                    logger.warning("the store is asked again in %g s: %s", pause, error)
                    self._sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                    continue
                pause = _FIRST_PAUSE_SECONDS
                if claim is not None:
                    self._do(store, claim)
                elif self._settings.once:
                    break
                else:
                    self._sleep(IDLE_SECONDS)
            self._leave(store)

    def stop(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Give back the job at hand, and end."""
        self._stopping = True

    def must_stop(self) -> bool:
        """Whether somebody asked, or the server that started this runner is gone."""
        parent = self._settings.parent
        return self._stopping or (parent is not None and os.getppid() != parent)

    def _next_job(self, store: StudyStore) -> JobClaim | None:
        if time.monotonic() - self._noted >= _NOTE_SECONDS:
            store.note_runner(self._owner)
            self._noted = time.monotonic()
        return store.claim_job()

    def _do(self, store: StudyStore, claim: JobClaim) -> None:
        """Have the job done, and say how it ended."""
        job = claim.job
        order = {
            "store": self._settings.store,
            "job": asdict(job),
            "roots": dict(self._settings.roots),
            "ray": self._settings.ray,
        }
        logger.info("job %s (%s) begins", job.id, job.kind)
        try:
            process = JobProcess(order, self._job_command)
        except OSError as error:
            logger.error("job %s cannot be started: %s", job.id, error)
            _said_at_last(lambda: store.give_back_job(claim))
            self._sleep(self._pause)  # each attempt is told, so there are fewer and fewer
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
            return
        self._pause = _FIRST_PAUSE_SECONDS
        try:
            watch = JobWatch(store, claim, process, limit_bytes=self._settings.max_job_memory)
            verdict = watch.until_it_ends(self._is_told_to_stop(store))
        finally:
            process.close()
        logger.info("job %s: %s", job.id, verdict.name)
        _said_at_last(lambda: watch.conclude(verdict))

    def _is_told_to_stop(self, store: StudyStore) -> Callable[[], bool]:
        """What a watch asks now and then; the runner's own signs of life go on meanwhile."""

        def ask() -> bool:
            if time.monotonic() - self._noted >= _NOTE_SECONDS:
                self._noted = time.monotonic()
                try:
                    store.note_runner(self._owner)
                except StoreError as error:
                    logger.warning("no sign of life was given: %s", error)
            return self.must_stop()

        return ask

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.must_stop() and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, IDLE_SECONDS))

    def _leave(self, store: StudyStore) -> None:
        try:
            store.forget_runner(self._owner)
        except StoreError as error:
            logger.warning("the runner could not say that it ends: %s", error)


def _said_at_last(say: Callable[[], object]) -> None:
    """Say how a job ended, and again where the store does not answer.

    In the end it is given up: the lease runs out, and the job is found without a process.
    """
    pause = _FIRST_PAUSE_SECONDS
    for attempt in range(_END_ATTEMPTS):
        try:
            say()
        except StudyLockedError as error:
            logger.warning("%s", error)
            return
        except StoreError as error:
            logger.warning("how a job ended is said again in %g s: %s", pause, error)
            if attempt + 1 < _END_ATTEMPTS:
                time.sleep(pause)
                pause *= 2
        else:
            return


def run(settings: RunnerSettings) -> None:
    """Run jobs in this process until SIGTERM or SIGINT, which give the job at hand back.

    Raises:
        StoreError: the store cannot be opened.
    """
    runner = Runner(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, runner.stop)
    runner.run()


def main() -> None:
    """A runner that a server started: its settings come through standard input."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s runner %(process)d: %(message)s")
    for name in ("alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    run(RunnerSettings(**json.loads(sys.stdin.buffer.read())))


if __name__ == "__main__":
    main()
