"""HEAD: what GET would answer, without its content. Load balancers and link checkers ask so."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """Asks for what a HEAD request names by GET, and passes on how the reply begins."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        answered = asyncio.Event()

        async def nothing_more() -> Message:
            await answered.wait()  # then streams end, as when their client goes
            return {"type": "http.disconnect"}

        async def beginning(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope["method"] = "HEAD"
                await send(message)
                await send({"type": "http.response.body", "body": b""})
                answered.set()

        scope["method"] = "GET"  # in place: what the router finds is counted outside of here
        try:
            await self._app(scope, nothing_more, beginning)
        finally:
            scope["method"] = "HEAD"
