"""Batches dealt to workers and collected in order: who scored what changes no bit of a study."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Protocol

from autoq.api.distribution.messages import Message
from autoq.api.scoring import ScoredBatch
from autoq.errors import AutoqError

LOOK_SECONDS = 1.0
"""Between looks at what has come in; each renews the lease, if it is time to."""

PATIENCE_SECONDS = 30.0
"""Least time after which another scores a batch, too, that a silent worker has."""

_PATIENCE = 4  # or so many times what a batch has taken


class WorkerLostError(AutoqError):
    """A worker is gone, or never came."""


class WorkerRefusedError(AutoqError):
    """A worker is not to be used, now or later."""


class WorkersLostError(AutoqError):
    """No worker is left, and this process is not to score."""


class BatchFailedError(AutoqError):
    """A worker could not score a batch."""


class BatchWorker(Protocol):
    """Somebody who scores batches. One thread calls it, but `close`, which any may call."""

    name: str
    restarts: int  # how often `begin` may be called again after the worker was lost

    def begin(self, order: Message) -> dict[str, Any]:
        """Get ready to score; where the worker is, as plain data.

        Raises:
            WorkerRefusedError: it would not score as the owner does; says why.
            WorkerLostError: it is gone, or did not come.
        """
        ...

    def score(self, index: int, estimator: str) -> ScoredBatch:
        """Score a batch, which takes as long as it takes.

        Raises:
            WorkerLostError: it is gone.
            BatchFailedError: it cannot.
        """
        ...

    def close(self) -> None:
        """End it, in the middle of a batch, too."""
        ...


class Dealer:
    """Gives each free worker the first batch that nobody has, and keeps what comes back.

    A batch whose worker is lost goes to another, and so does one whose worker is silent for long.
    One that a worker cannot score is scored here, where it fails as it would without workers, or
    does not.
    """

    def __init__(
        self,
        workers: Sequence[BatchWorker],
        order: Message,
        estimator: str,
        batches: Iterable[int],
        here: Callable[[int], ScoredBatch],
        *,
        scores_here: bool,
    ) -> None:
        """
        Args:
            order: for `BatchWorker.begin`.
            estimator: name of the one that scores.
            batches: numbers of those to score.
            here: scores a batch in this process.
            scores_here: whether this process takes batches, too, while it waits.
        """
        self._order, self._estimator = order, estimator
        self._here, self._scores_here = here, scores_here
        self._free = list(batches)
        heapify(self._free)
        self._missing = set(self._free)
        self._done: dict[int, ScoredBatch] = {}
        self._failed: set[int] = set()
        self._notes: list[str] = []
        self._about: dict[str, dict[str, Any]] = {}
        self._scored: Counter[str] = Counter()
        self._longest_seconds = 0.0  # of a batch, wherever it was scored
        self._is_closed = False
        self._news = threading.Condition()
        self._workers = list(workers)
        self._working = len(self._workers)
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), daemon=True, name=worker.name)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    def take(
        self, index: int, *, idle: Callable[[], None], note: Callable[[str], None]
    ) -> ScoredBatch:
        """What batch `index` gave, sooner or later; each can be taken once.

        Args:
            idle: called now and then while there is nothing to do but wait.
            note: told of workers that were lost.
        Raises:
            WorkersLostError: nobody is left to score.
        """
        since = time.monotonic()
        while True:
            with self._news:
                found = self._done.pop(index, None)
                waited = time.monotonic() - since
                own = None if found else self._own_batch(index, waited)
                if found is None and own is None:
                    if self._is_overdue(waited) and self._dealt_again(index):
                        since = time.monotonic()
                    self._refuse_if_alone()
                    self._news.wait(LOOK_SECONDS)
                notes, self._notes = self._notes, []
            for text in notes:
                note(text)
            if found is not None:
                return found
            if own is None:
                idle()
            else:
                self._score_here(own)
                since = time.monotonic()

    def close(self) -> None:
        """End all workers."""
        with self._news:
            self._is_closed = True
            self._news.notify_all()
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            thread.join(LOOK_SECONDS)

    def report(self) -> list[dict[str, Any]]:
        """Who scored how many batches, this process first, as plain data."""
        with self._news:
            return [
                {"name": name, **self._about.get(name, {}), "batches": self._scored[name]}
                for name in ["owner", *self._about]
                if self._scored[name]
            ]

    # In this process, with the lock

    def _own_batch(self, wanted: int, waited_seconds: float) -> int | None:
        """What to score here now."""
        if wanted in self._failed:
            self._failed.discard(wanted)
            return wanted
        if not self._scores_here:
            return None
        if self._free:
            return heappop(self._free)
        return wanted if self._is_overdue(waited_seconds) else None

    def _is_overdue(self, waited_seconds: float) -> bool:
        """Whether whoever has the batch that is waited for may be silent for good."""
        return waited_seconds > max(PATIENCE_SECONDS, _PATIENCE * self._longest_seconds)

    def _dealt_again(self, wanted: int) -> bool:
        """Free a batch that somebody has, for whoever is next; whether there was a reason to."""
        # How long a batch takes is not known before the first.
        if not self._longest_seconds or self._working < 2 or wanted in self._free:
            return False
        heappush(self._free, wanted)
        self._notes.append(f"batch {wanted} is late, and goes to another worker, too")
        self._news.notify_all()
        return True

    def _refuse_if_alone(self) -> None:
        if not self._working and not self._scores_here:
            raise WorkersLostError(
                f"scoring needs a worker, and none is left ({'; '.join(self._notes) or 'all ended'}); "
                "what was scored is stored: run the same command again when there are machines"
            )

    def _score_here(self, index: int) -> None:
        started = time.monotonic()
        scored = self._here(index)
        self._came("owner", index, scored, time.monotonic() - started)

    # In the thread of a worker

    def _serve(self, worker: BatchWorker) -> None:
        try:
            for _ in range(1 + worker.restarts):
                if self._has_served(worker):
                    return
        finally:
            with self._news:
                self._working -= 1
                self._news.notify_all()

    def _has_served(self, worker: BatchWorker) -> bool:
        """Give a worker batches; whether that is over, and no new one is to begin."""
        index = None
        try:
            about = worker.begin(self._order)
            with self._news:
                self._about[worker.name] = about
            while (index := self._next()) is not None:
                started = time.monotonic()
                scored = worker.score(index, self._estimator)
                self._came(worker.name, index, scored, time.monotonic() - started)
        except WorkerRefusedError as error:
            return self._fails(index, f"{worker.name} is not used: {error}")
        except WorkerLostError as error:
            return self._gives_back(index, f"{worker.name} is lost: {error}")
        except Exception as error:  # noqa: BLE001  (of a library: the owner scores on)
            return self._fails(index, f"{worker.name} failed: {type(error).__name__}: {error}")
        return True

    def _next(self) -> int | None:
        with self._news:
            while not self._free and self._missing and not self._is_closed:
                self._news.wait()
            return None if self._is_closed or not self._missing else heappop(self._free)

    def _came(self, name: str, index: int, scored: ScoredBatch, seconds: float) -> None:
        with self._news:
            self._longest_seconds = max(self._longest_seconds, seconds)
            if index in self._missing:  # not scored by two
                self._missing.discard(index)
                if index in self._free:  # it was dealt again, and nobody has it yet
                    self._free.remove(index)
                    heapify(self._free)
                self._done[index] = scored
                self._scored[name] += 1
            self._news.notify_all()

    def _gives_back(self, index: int | None, text: str) -> bool:
        with self._news:
            if self._is_closed:
                return True
            if index in self._missing:
                heappush(self._free, index)
                text += "; its batch goes to another"
            self._notes.append(text)
            self._news.notify_all()
        return False

    def _fails(self, index: int | None, text: str) -> bool:
        with self._news:
            if self._is_closed:
                return True
            if index in self._missing:
                self._failed.add(index)
                text += "; its batch is scored here"
            self._notes.append(text)
            self._news.notify_all()
        return True
