"""The web process: listens, answers, and ends without cutting anybody off."""

from __future__ import annotations

import asyncio
import logging.config
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from autoq.errors import InputError
from autoq.service.guard.limits import HEADER_BYTES
from autoq.service.guard.redaction import log_configuration

if TYPE_CHECKING:
    from fastapi import FastAPI

    from autoq.service.settings import ServiceSettings

_WAITING = 512  # connections that nobody has accepted yet
_ENDING_SECONDS = 5  # that requests at hand may take once the service is to end
_IDLE_SECONDS = 150
"""How long a connection may wait for its next request: longer than proxies (60 s; Caddy 120 s) and
clients keep theirs, so that it is not ended just when the next request comes. Whoever reads nothing of a reply for so long has left."""


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port that is taken is known before anything starts.

    Args:
        port: 0 is any that is free.
    Raises:
        InputError: the address is not this machine's, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_WAITING)
    except (OSError, OverflowError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number is not None and number > 0 else str(error)
        raise InputError(
            f"the service cannot listen on {location(host, port)} ({reason}); name another with "
            "--host or --port, or stop what uses it"
        ) from None
    # Connections inherit it; asyncio sets it only where it made the socket. Without it the body of a
    # reply waits for the client's acknowledgement of the headers: 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def location(host: str, port: int) -> str:
    """Host and port as URLs have them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_tls(settings: ServiceSettings) -> None:
    """
    Raises:
        InputError: certificate and key are not both given, or cannot be used.
    """
    certificate, key = settings.tls_certificate, settings.tls_key
    if (certificate is None) != (key is None):
        raise InputError("--tls-cert and --tls-key belong together; give both")
    if certificate is None or key is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{certificate} and {key} must be a certificate and its unencrypted key in PEM, and are "
            f"not ({error})"
        ) from None


def serve(app: FastAPI, settings: ServiceSettings, listening: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM: streams end, requests at hand are answered, then it returns."""
    logging.config.dictConfig(log_configuration(settings.store))
    with _signals_returned():
        _Server(app, _configuration(app, settings)).run(sockets=[listening])


def _configuration(app: FastAPI, settings: ServiceSettings) -> uvicorn.Config:
    tls = settings.tls_certificate
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # its lines have query strings; see `autoq.service.web.access_log`
        lifespan="on",
        ws="none",
        loop="asyncio",
        http=Connection,
        h11_max_incomplete_event_size=HEADER_BYTES,  # while they come in; later the guard counts
        server_header=False,
        proxy_headers=False,  # whoever connects would say whose address to count
        timeout_graceful_shutdown=_ENDING_SECONDS,
        timeout_keep_alive=_IDLE_SECONDS,
        ssl_certfile=None if tls is None else str(tls),
        ssl_keyfile=None if settings.tls_key is None else str(settings.tls_key),
    )


class Connection(H11Protocol):
    """Ends when no request comes, or nobody reads the reply.

    uvicorn waits without end for the first request, for the rest of one that has begun, and for
    readers; and where it closes, TLS cuts off what is not read yet. Replies that are still being
    made are not looked at: event streams see to themselves.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._unread = 0
        self._next_look = self.loop.call_later(_IDLE_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._next_look.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Called by the reply."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        """Called some time after a reply; whoever still reads it is left in peace."""
        if not _unread_bytes(self.transport):
            super().timeout_keep_alive_handler()

    def _look(self) -> None:
        unread, before = _unread_bytes(self.transport), self._unread
        self._unread = unread
        self._next_look = self.loop.call_later(_IDLE_SECONDS, self._look)
        if self.cycle is not None and not self.cycle.response_complete:
            return
        if unread and unread == before:
            self.transport.abort()
        elif self.loop.time() - self._idle_since >= _IDLE_SECONDS:
            self.timeout_keep_alive_handler()


def _unread_bytes(transport: asyncio.Transport) -> int:
    """Of what was written, the bytes that the client's side has not taken yet."""
    # Of TLS, asyncio counts only what is not encrypted yet; the rest is in the transport below.
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return transport.get_write_buffer_size() + (below.get_write_buffer_size() if below else 0)


class _Server(uvicorn.Server):
    """Ends streams when it is to end: uvicorn waits for replies before the app hears of it."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop that answers."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_streams)
        super().handle_exit(sig, frame)

    def _end_streams(self) -> None:
        self._ending = asyncio.ensure_future(self._app.state.context.events.close())


@contextmanager
def _signals_returned() -> Iterator[None]:
    """Let the signal that ended the server, which uvicorn raises again, end nothing else."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, _nothing) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """The server has ended already."""
