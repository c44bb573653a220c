"""Server-sent events (WHATWG HTML, section 9.2): read, and resumed after the last one seen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

import httpx
from pydantic import ValidationError

from autoq.client._failures import UnreachableError
from autoq.client._transport import BusyError, Transport, pause_seconds
from autoq.errors import AutoqError
from autoq.wire import Event

SILENCE_SECONDS = 45.0
"""The server says something every 15 s; three times that is a lost connection."""

GIVE_UP_SECONDS = 300.0
"""How long a server may be away, as it is when it is started anew."""


def events_in(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a stream's lines.

    Comments, unknown fields, a cut last event and events of kinds that only newer versions know
    are passed over.
    """
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                with suppress(ValidationError):
                    yield Event.model_validate_json("\n".join(data))
            data = []
            continue
        field, _, value = line.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))


def follow(
    transport: Transport,
    path: str,
    after: int | None = None,
    give_up_seconds: float = GIVE_UP_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
) -> Iterator[Event]:
    """Events by rising id, each once, until the server ends the stream.

    A connection that is lost is made again and asks for what comes after the last event seen.

    Args:
        after: id of the last event that is known already.
        give_up_seconds: how long to try without an answer.

    Raises:
        UnreachableError: the server was away for longer.
        AutoqError: what its problem stands for.
    """
    last, failures = after, 0
    lost: float | None = None  # since when nothing answers; a stream may be silent for much longer
    while True:
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        try:
            with transport.stream(path, headers, silence_seconds) as response:
                lost = None
                for event in events_in(response.iter_lines()):
                    failures = 0
                    if last is None or event.id > last:
                        last = event.id
                        yield event
                return
        except (httpx.TransportError, BusyError, UnreachableError) as error:
            lost = time.monotonic() if lost is None else lost
            if time.monotonic() - lost >= give_up_seconds:
                raise _given_up(transport, error) from None
            asked = error.pause_seconds if isinstance(error, BusyError) else 0.0
        time.sleep(max(asked, pause_seconds(failures)))
        failures += 1


def _given_up(transport: Transport, error: Exception) -> AutoqError:
    if isinstance(error, BusyError):
        return error.error
    return error if isinstance(error, AutoqError) else transport.unreachable(error)
