"""What a job's process says and prints, from bytes to events of bounded length."""

from __future__ import annotations

import json
from codecs import getincrementaldecoder
from dataclasses import dataclass
from typing import Any

from autoq.errors import without_password
from autoq.studies import JobEvent
from autoq.wire import EventKind

LONGEST_LINE = 4_000
"""Characters of a printed line; what is longer is cut, and says so."""

LONGEST_EVENT_BYTES = 8 << 20
"""Of a line that the process says: the largest are results."""

_CUT = " [cut]"


@dataclass(frozen=True, slots=True)
class Message:
    """Something that the process said: an event, or what its runner has to know."""

    event: JobEvent | None = None
    study: str | None = None
    result: dict[str, Any] | None = None
    problem: dict[str, Any] | None = None


class EventLines:
    """JSON lines from the process's own pipe."""

    def __init__(self) -> None:
        self._partial = b""
        self._is_too_long = False  # the line at hand, whose beginning was dropped

    def add(self, chunk: bytes) -> list[Message]:
        """The messages that are whole now; one that is too long is left out."""
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        if lines and self._is_too_long:
            del lines[0]
            self._is_too_long = False
        if len(self._partial) > LONGEST_EVENT_BYTES:
            self._partial = b""
            self._is_too_long = True
        return [_message(line) for line in lines if line]

    def rest(self) -> list[Message]:
        """What was said last; half a line says nothing."""
        return []


class LogLines:
    """Lines of a standard stream."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._decoder = getincrementaldecoder("utf-8")(
            "replace"
        )  # reads may end inside a character
        self._partial = ""

    def add(self, chunk: bytes) -> list[Message]:
        """The lines that are whole now."""
        text = self._partial + self._decoder.decode(chunk).replace("\r\n", "\n")
        *lines, self._partial = text.replace("\r", "\n").split("\n")
        # A line without an end is not kept longer than what is shown of it.
        self._partial = self._partial[: LONGEST_LINE + 1]
        return [self._line(line) for line in lines if line.strip()]

    def rest(self) -> list[Message]:
        """A last line without an end."""
        last, self._partial = self._partial + self._decoder.decode(b"", final=True), ""
        return [self._line(last)] if last.strip() else []

    def _line(self, line: str) -> Message:
        plain = without_password("".join(c if c.isprintable() or c == "\t" else "�" for c in line))
        if len(plain) > LONGEST_LINE:
            plain = plain[:LONGEST_LINE] + _CUT
        return Message(JobEvent(kind=EventKind.LOG, data={"text": plain, "stream": self._stream}))


def _message(line: bytes) -> Message:
    said = json.loads(line)
    if "kind" in said:
        return Message(JobEvent(kind=said["kind"], data=said["data"]))
    return Message(study=said.get("study"), result=said.get("result"), problem=said.get("problem"))
