"""How long work reports that it advances; programs decide how that looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
