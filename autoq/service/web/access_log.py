"""A line for every request: who, what, how it went. Queries and headers are left out: they may hold
what is secret."""

from __future__ import annotations

import logging
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger("autoq.access")
_LONGEST = 200


class AccessLogMiddleware:
    """Logs replies as they begin, so that streams are seen, too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and say what came of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = perf_counter()
        path = _printable(scope["path"])

        async def logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                milliseconds = (perf_counter() - began) * 1e3
                _log.info(
                    "%s %s %s %d %.1f ms",
                    (scope.get("client") or ("-",))[0],
                    _printable(scope["method"]),
                    path,
                    message["status"],
                    milliseconds,
                )
            await send(message)

        await self._app(scope, receive, logged)


def _printable(text: str) -> str:
    """The text in one line, and not without end."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}..."
