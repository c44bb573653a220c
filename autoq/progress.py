"""How long work reports that it advances; programs decide how that looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Protocol


class Advance(Protocol):
    """Called when `steps` more steps are done."""

    def __call__(self, steps: int = 1) -> None: ...


class Progress(Protocol):
    """Shows work as it advances."""

    def task(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Work of `total` steps; the context ends with the work."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should read, such as a warning."""
        ...


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """See `Progress.task`."""
        yield lambda steps=1: None

    def note(self, text: str) -> None:
        """See `Progress.note`."""


@contextmanager
def in_turn(progress: Progress, *tasks: tuple[str, int]) -> Iterator[Sequence[Advance]]:
    """Tasks of which each begins when the one before has done its steps, or the next advances.

    So no time counts to two of them. What advances after its turn is not shown.

    Args:
        tasks: description and number of steps of each.
    """
    with ExitStack() as running:
        turns = _Turns(progress, tasks, running)
        turns.next()
        yield [partial(turns.advance, number) for number in range(len(tasks))]


class _Turns:
    """The task that is shown now, out of several."""

    def __init__(
        self, progress: Progress, tasks: Sequence[tuple[str, int]], running: ExitStack
    ) -> None:
        self._progress = progress
        self._tasks = tasks
        self._running = running
        self._number = -1
        self._left = 0
        self._advance: Advance = lambda steps=1: None

    def next(self) -> None:
        self._running.close()
        self._number += 1
        description, self._left = self._tasks[self._number]
        task = self._progress.task(description, self._left)
        self._advance = self._running.enter_context(task)

    def advance(self, number: int, steps: int = 1) -> None:
        if number < self._number:
            return
        while self._number < number:
            self.next()
        self._advance(steps)
        self._left -= steps
        if self._left <= 0 and self._number + 1 < len(self._tasks):
            self.next()
