"""Workers at the other end of a stream: what both ends say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, BinaryIO

from autoq.api.distribution.dealing import (
    BatchFailedError,
    WorkerLostError,
    WorkerRefusedError,
)
from autoq.api.distribution.messages import Message, receive, send
from autoq.api.distribution.scorer import BatchScorer, from_arrays, to_arrays
from autoq.api.scoring import ScoredBatch
from autoq.errors import AutoqError, DataError

BEGIN, SCORE = "begin", "score"
_ASKED, _REFUSED, _FAILED = "asked", "refused", "failed"
_OWN_SETTINGS = "here"  # of a worker: what is not the same for all


class StreamWorker(ABC):
    """The owner's end. Subclasses say who is at the other."""

    restarts = 0

    def __init__(self, name: str, *, device: str | None, threads: int | None) -> None:
        """
        Args:
            device: where it scores; None leaves that to the worker.
            threads: of its CPU; None leaves them to the worker, too.
        """
        self.name = name
        self._settings = {"device": device, "threads": threads}

    @abstractmethod
    def _streams(self) -> tuple[BinaryIO, BinaryIO]:
        """To read from and to write to; waits for the worker to come.

        Raises:
            WorkerLostError: it does not.
        """

    @abstractmethod
    def _last_words(self) -> str:
        """Why nothing comes any more."""

    @abstractmethod
    def close(self) -> None:
        """See `BatchWorker`."""

    def begin(self, order: Message) -> dict[str, Any]:
        """See `BatchWorker`."""
        header = {_ASKED: BEGIN, _OWN_SETTINGS: self._settings, **order.header}
        answer = self._answer(Message(header, order.arrays)).header
        if _REFUSED in answer:
            raise WorkerRefusedError(answer[_REFUSED])
        return dict(answer)

    def score(self, index: int, estimator: str) -> ScoredBatch:
        """See `BatchWorker`."""
        answer = self._answer(Message({_ASKED: SCORE, "index": index, "estimator": estimator}))
        if _FAILED in answer.header:
            raise BatchFailedError(answer.header[_FAILED])
        return from_arrays(answer.arrays)

    def _answer(self, question: Message) -> Message:
        reader, writer = self._streams()
        try:
            send(writer, question)
            return receive(reader)
        except (OSError, EOFError, ValueError, DataError) as error:  # ValueError: it was closed
            told = f"{error}; " if isinstance(error, DataError) else ""
            raise WorkerLostError(f"{told}{self._last_words()}") from None


def serve(reader: BinaryIO, writer: BinaryIO, *, device: str, threads: int) -> None:
    """The worker's end: answer until the owner has had enough, or is gone.

    Args:
        device: where to score, if the owner leaves it to the worker.
        threads: of the CPU, likewise.
    """
    scorer: BatchScorer | None = None
    while True:
        try:
            question = receive(reader)
            if question.header[_ASKED] == BEGIN:
                here = question.header[_OWN_SETTINGS]
                scorer, answer = _begun(
                    question, here["device"] or device, here["threads"] or threads
                )
            else:
                assert scorer is not None  # the owner begins
                answer = _scored(scorer, question)
            send(writer, answer)
        except (EOFError, OSError):
            return


def _begun(order: Message, device: str, threads: int) -> tuple[BatchScorer | None, Message]:
    try:
        scorer = BatchScorer(order, device=device, threads=threads)
    except AutoqError as error:
        return None, Message({_REFUSED: str(error)})
    return scorer, Message(scorer.about())


def _scored(scorer: BatchScorer, question: Message) -> Message:
    try:
        scored = scorer.score(question.header["index"], question.header["estimator"])
    except Exception as error:  # noqa: BLE001  (the owner scores it, and sees for itself)
        return Message({_FAILED: f"{type(error).__name__}: {error}"})
    return Message({}, to_arrays(scored))
