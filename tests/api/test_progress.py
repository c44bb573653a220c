"""Tasks that are shown one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from autoq.progress import Advance, in_turn


class Recording:
    """Writes down what would be shown."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        self.events.append(f"{description} of {total}")
        done = 0

        def advance(steps: int = 1) -> None:
            nonlocal done
            done += steps

        yield advance
        self.events.append(f"{description}: {done}")

    def note(self, text: str) -> None:
        self.events.append(text)


def test_a_task_begins_when_the_one_before_has_done_its_steps() -> None:
    progress = Recording()
    with in_turn(progress, ("reading", 3), ("thinking", 2)) as (read, think):
        read(2)
        read()
        progress.note("the first thought takes long")
        think(2)
        read()  # another pass over the same
    assert progress.events == [
        "reading of 3",
        "reading: 3",
        "thinking of 2",
        "the first thought takes long",
        "thinking: 2",
    ]


def test_a_task_that_advances_early_ends_those_before() -> None:
    progress = Recording()
    with in_turn(progress, ("reading", 3), ("thinking", 1)) as (read, think):
        read()
        think()
    assert progress.events == ["reading of 3", "reading: 1", "thinking of 1", "thinking: 1"]


def test_a_failure_ends_the_task_that_ran() -> None:
    progress = Recording()
    with (
        pytest.raises(ZeroDivisionError),
        in_turn(progress, ("reading", 1), ("thinking", 1)) as (read, _),
    ):
        read()
        raise ZeroDivisionError
    assert progress.events == ["reading of 1", "reading: 1", "thinking of 1"]
