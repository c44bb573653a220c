"""Server-sent events, as a reply."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from autoq.errors import AutoqError
from autoq.wire import Event

KEEP_ALIVE_SECONDS = 15.0
STALLED_SECONDS = 60.0
"""How long a client may take nothing before its connection is given up."""

EVENT_MEDIA_TYPE = "text/event-stream"


class EventStream(Response):
    """Sends events until they end, the client goes, or it takes nothing for a minute."""

    media_type = EVENT_MEDIA_TYPE

    def __init__(
        self, events: AsyncGenerator[Sequence[Event]], at_end: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            events: batches; an empty one becomes a comment, which keeps the connection open.
            at_end: called once, however the reply ends.
        """
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or end when the client does."""
        try:
            sending = asyncio.ensure_future(self._send(send))
            leaving = asyncio.ensure_future(_until_gone(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _ended(leaving)
                await _ended(sending)
        finally:
            self._at_end()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await _sent(send, start)
        # At once, so that proxies and browsers know that the stream is open.
        await self._part(send, b": open\n\n")
        async with aclosing(self._events) as batches:
            async for batch in batches:
                await self._part(send, _encoded(batch))
        await self._part(send, b"", more=False)

    async def _part(self, send: Send, body: bytes, more: bool = True) -> None:
        await _sent(send, {"type": "http.response.body", "body": body, "more_body": more})


async def _sent(send: Send, message: Message) -> None:
    """
    Raises:
        TimeoutError: the client takes nothing.
    """
    async with asyncio.timeout(STALLED_SECONDS):
        await send(message)


def _encoded(batch: Sequence[Event]) -> bytes:
    if not batch:
        return b": nothing new\n\n"
    return "".join(
        f"id: {event.id}\nevent: {event.kind.value}\ndata: {event.model_dump_json()}\n\n"
        for event in batch
    ).encode()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _ended(task: asyncio.Task[None]) -> None:
    """End a task. Clients go away and stall, and come back when the store did not answer."""
    task.cancel()
    with suppress(asyncio.CancelledError, TimeoutError, OSError, AutoqError):
        await task
