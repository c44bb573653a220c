"""What a request for events asks for, and its reply."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Header, Query, Request

from autoq.service.problems import Refusal
from autoq.service.replies import problem_responses
from autoq.service.web.context import Context
from autoq.service.web.event_stream import EVENT_MEDIA_TYPE, KEEP_ALIVE_SECONDS, EventStream
from autoq.service.web.events import Topic

_LARGEST = 2**63 - 1

After = Annotated[int, Query(ge=0, le=_LARGEST, description="Only events of higher ids.")]
LastEventId = Annotated[
    str | None,
    Header(max_length=20, description="As `after`; browsers send it when they connect again."),
]

EVENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {EVENT_MEDIA_TYPE: {"schema": {"type": "string"}}},
        "description": "Server-sent events: id, the kind, and an Event as JSON",
    },
    **problem_responses(404),
}


def stream(
    request: Request, context: Context, topic: Topic, last_event_id: str | None, after: int
) -> EventStream:
    """The events behind the last one that the client has seen.

    Raises:
        Refusal: the header names no event.
    """
    first = after if not last_event_id else _number(last_event_id)
    release = context.stream_slot(request)
    return EventStream(context.events.listen(topic, first, KEEP_ALIVE_SECONDS), release)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= _LARGEST):
        raise Refusal("input", f"Last-Event-ID must be the id of an event, got {text!r}")
    return int(text)
