"""A typed registry: refuses duplicates, and answers a wrong name with near misses."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from autoq.errors import UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Names of one kind of thing, for example formats."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add `entry` under `name`.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"a {self._kind} named {name!r} is registered already")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            UnknownNameError: nothing has that name; the message lists near misses.
        """
        if name in self._entries:
            return self._entries[name]
        by_folded = {entry.casefold(): entry for entry in self._entries}
        matches = difflib.get_close_matches(name.casefold(), by_folded, cutoff=0.5)
        close = ", ".join(by_folded[match] for match in matches)
        hint = f" (did you mean {close}?)" if close else ""
        known = ", ".join(sorted(self._entries))
        raise UnknownNameError(f"no {self._kind} named {name!r}{hint}; known: {known}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
