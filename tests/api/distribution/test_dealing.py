"""Batches reach whoever is free, and come back in order, whatever becomes of the workers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from autoq.api.distribution import dealing
from autoq.api.distribution.dealing import (
    BatchFailedError,
    Dealer,
    WorkerLostError,
    WorkerRefusedError,
    WorkersLostError,
)
from autoq.api.distribution.messages import Message
from autoq.api.scoring import ScoredBatch


def scored(index: int) -> ScoredBatch:
    return ScoredBatch(np.full((1, 1, 1), float(index)), {})


class Fake:
    """A worker in a thread of this process; `does` gets the batch and may raise."""

    def __init__(
        self, name: str, does: Callable[[int], object] = lambda index: None, *, restarts: int = 0
    ) -> None:
        self.name, self.restarts, self._does = name, restarts, does
        self.begun = 0
        self.scored: list[int] = []
        self.closed = False

    def begin(self, order: Message) -> dict[str, Any]:
        self.begun += 1
        return {"host": "somewhere"}

    def score(self, index: int, estimator: str) -> ScoredBatch:
        assert estimator == "chosen"
        self._does(index)
        self.scored.append(index)
        return scored(index)

    def close(self) -> None:
        self.closed = True


class Pass:
    """Takes batches as a scoring pass does."""

    def __init__(self, dealer: Dealer, here: list[int]) -> None:
        self._dealer, self.here = dealer, here
        self.notes: list[str] = []
        self.idled = 0

    def _idle(self) -> None:
        self.idled += 1

    def take(self, index: int) -> float:
        found = self._dealer.take(index, idle=self._idle, note=self.notes.append)
        return float(found.scores[0, 0, 0])

    def report(self) -> dict[str, int]:
        return {entry["name"]: entry["batches"] for entry in self._dealer.report()}


@contextmanager
def dealt(
    workers: list[Any],
    batches: range,
    *,
    scores_here: bool = False,
    here: Callable[[int], object] = lambda index: None,
) -> Iterator[Pass]:
    scored_here: list[int] = []

    def score(index: int) -> ScoredBatch:
        here(index)
        scored_here.append(index)
        return scored(index)

    dealer = Dealer(workers, Message({}), "chosen", batches, score, scores_here=scores_here)
    try:
        yield Pass(dealer, scored_here)
    finally:
        dealer.close()


def lose(*batches: int) -> Callable[[int], None]:
    left = list(batches)

    def does(index: int) -> None:
        if index in left:
            left.remove(index)
            raise WorkerLostError("killed by signal 9")

    return does


def test_results_come_in_the_order_in_which_they_are_asked_for() -> None:
    last_first = threading.Event()
    first = Fake("a", lambda index: last_first.wait(20) if index == 0 else None)
    second = Fake("b", lambda index: last_first.set() if index == 7 else None)
    with dealt([first, second], range(8)) as taken:
        assert [taken.take(index) for index in range(8)] == list(range(8))
        assert taken.report() == {"a": 1, "b": 7}
    assert first.closed and second.closed
    assert second.scored == list(range(1, 8))


def test_a_resumed_pass_deals_what_is_left() -> None:
    worker = Fake("a")
    with dealt([worker], range(3, 6)) as taken:
        assert [taken.take(index) for index in range(3, 6)] == [3, 4, 5]
    assert worker.scored == [3, 4, 5]


def test_the_batch_of_a_lost_worker_goes_to_another() -> None:
    is_lost = threading.Event()

    def die(index: int) -> None:
        is_lost.set()
        raise WorkerLostError("killed by signal 9")

    dying, other = Fake("a", die), Fake("b", lambda index: is_lost.wait(20))
    with dealt([dying, other], range(5)) as taken:
        assert [taken.take(index) for index in range(5)] == list(range(5))
        assert taken.notes == ["a is lost: killed by signal 9; its batch goes to another"]
    assert sorted(other.scored) == list(range(5))


def test_without_workers_this_process_goes_on_where_it_may() -> None:
    with dealt([Fake("a", lose(0))], range(4), scores_here=True) as taken:
        assert [taken.take(index) for index in range(4)] == list(range(4))
        assert taken.report() == {"owner": 4}
        assert sorted(taken.here) == list(range(4))


def test_without_workers_a_pass_ends_where_this_process_may_not_score() -> None:
    with dealt([Fake("a", lose(2))], range(4)) as taken:
        assert [taken.take(0), taken.take(1)] == [0, 1]
        with pytest.raises(WorkersLostError, match=r"none is left .*run the same command again"):
            taken.take(2)
        assert taken.here == []


def test_a_worker_that_can_be_started_again_is() -> None:
    worker = Fake("a", lose(1, 2), restarts=2)
    with dealt([worker], range(4)) as taken:
        assert [taken.take(index) for index in range(4)] == list(range(4))
    assert worker.begun == 3


def test_what_a_worker_cannot_score_is_scored_here_and_fails_here() -> None:
    def fail(index: int) -> None:
        if index == 1:
            raise BatchFailedError("ModelError: NaN")

    def fail_here(index: int) -> None:
        raise ArithmeticError(f"batch {index}")

    with dealt([Fake("a", fail)], range(3), here=fail_here) as taken:
        assert taken.take(0) == 0
        with pytest.raises(ArithmeticError, match="batch 1"):
            taken.take(1)
        assert taken.notes == [
            "a failed: BatchFailedError: ModelError: NaN; its batch is scored here"
        ]


def test_a_worker_that_refuses_is_said_and_not_asked_again() -> None:
    class Refusing(Fake):
        def begin(self, order: Message) -> dict[str, Any]:
            super().begin(order)
            raise WorkerRefusedError("torch 2.0 instead of 2.13")

    refusing = Refusing("a", restarts=3)
    with dealt([refusing, Fake("b")], range(3)) as taken:
        assert [taken.take(index) for index in range(3)] == [0, 1, 2]
        with pytest.raises(WorkersLostError) as ended:  # when both have ended
            taken.take(3)
        said = [*taken.notes, str(ended.value)]
        assert any("a is not used: torch 2.0 instead of 2.13" in text for text in said)
    assert refusing.begun == 1


def test_a_batch_of_a_worker_that_is_silent_is_scored_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(dealing, "LOOK_SECONDS", 0.02)
    has_begun, end = threading.Event(), threading.Event()

    def hang(index: int) -> None:
        has_begun.set()
        end.wait(20)

    with dealt([Fake("a", hang)], range(1), scores_here=True) as taken:
        # Without a batch in its hands the worker would find none left.
        assert has_begun.wait(20) or taken.here
        assert taken.take(0) == 0
        assert taken.here == [0]
        end.set()


def test_a_batch_of_a_worker_that_is_silent_goes_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dealing, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(dealing, "LOOK_SECONDS", 0.02)
    has_begun, end = threading.Event(), threading.Event()

    def hang(index: int) -> None:
        has_begun.set()
        end.wait(20)

    def after_the_other_has_one(index: int) -> None:
        assert has_begun.wait(20)

    silent, other = Fake("silent", hang), Fake("other", after_the_other_has_one)
    with dealt([silent, other], range(3)) as taken:
        assert [taken.take(index) for index in range(3)] == [0, 1, 2]
        assert sorted(other.scored) == [0, 1, 2]
        assert any("late, and goes to another" in note for note in taken.notes)
        end.set()
    assert taken.here == []


def test_waiting_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "LOOK_SECONDS", 0.01)
    go_on = threading.Event()
    with dealt([Fake("a", lambda index: go_on.wait(20))], range(1)) as taken:
        taken._idle = go_on.set  # type: ignore[method-assign]
        assert taken.take(0) == 0
