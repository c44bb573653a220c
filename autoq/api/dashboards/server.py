"""The HTTP server of the dashboard, which by default only this machine reaches."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from http.server import HTTPServer
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from autoq.errors import InputError

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

DEFAULT_PORT = 8080
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address: 127.0.0.0/8, ::1 or localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class DashboardServer(ThreadingMixIn, WSGIServer):
    """A server that listens from the start, and answers once `serve` is called.

    Whoever is told its address gets an answer, and a port that is taken is known at once.
    """

    daemon_threads = True  # a browser that keeps a connection open must not delay the end

    def __init__(self, host: str, port: int) -> None:
        """
        Args:
            port: 0 is any that is free.
        Raises:
            InputError: the address does not exist here, or the port is taken.
        """
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _SilentHandler)
        except OSError as error:
            raise InputError(
                f"the dashboard cannot listen on {_location(host, port)} ({error.strerror or error}); "
                "name another with --port or --host, or stop what uses it"
            ) from None
        self._host = host

    def server_bind(self) -> None:
        """Bind without looking the host's name up, which may take seconds and is not needed."""
        super(HTTPServer, self).server_bind()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    @property
    def url(self) -> str:
        """Where a browser finds the dashboard."""
        return f"http://{_location(self._host, self.server_port)}/dashboard"

    def serve(self, application: WSGIApplication) -> None:
        """Answer requests until the process is interrupted, which ends it without a traceback."""
        guarded = _Guard(application) if is_loopback(self._host) else application
        self.set_app(_with_encoding(guarded))
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self.server_close()


def listening_server(host: str, port: int | None) -> DashboardServer:
    """A server on the port, or without one on the usual port or on any other that is free.

    Raises:
        InputError: it cannot listen there.
    """
    if port is not None:
        return DashboardServer(host, port)
    try:
        return DashboardServer(host, DEFAULT_PORT)
    except InputError:
        return DashboardServer(host, 0)


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a browser with the page open asks every few seconds."""


class _Guard:
    """Refuses what a page of another site makes the user's browser ask of this machine.

    The dashboard asks for no password, and can delete. Another site may point its own name at
    127.0.0.1, or send requests across; its name then stands in `Host` or in `Origin`.
    """

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        host = str(environ.get("HTTP_HOST", ""))
        origin = environ.get("HTTP_ORIGIN")
        foreign = origin is not None and urlsplit(str(origin)).netloc != host
        changes = environ.get("REQUEST_METHOD") not in _SAFE_METHODS
        if not is_loopback(_name(host)) or (foreign and changes):
            start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"the dashboard answers pages of this machine only\n"]
        return self._application(environ, start_response)


def _with_encoding(application: WSGIApplication) -> WSGIApplication:
    """The dashboard fails on requests for static files that name no encoding."""

    def complete(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        return application(environ, start_response)

    return complete


def _name(host: str) -> str:
    """The name or address in a `Host` header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _location(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
