"""What stands between the network and the routes, for every request.

In this order: address and headers are short and tell a body's length in one way; the `Host` must name
this server; a page of another origin may ask for nothing but pages; who asks is found out; that one
must not ask too fast, and waits for a turn; a body must be JSON, small, and unambiguous. Every reply, of whatever part, gets the security headers, and no exception gets further
than here. There are no cookies and no CORS headers: what another site's page sends carries no token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoq.service._version import VERSION
from autoq.service.guard.hosts import HostRule, client_key
from autoq.service.guard.limits import (
    HEADER_BYTES,
    Slots,
    TokenBuckets,
    Turns,
    bounded_body,
    check_json,
    replayed,
    too_fast,
)
from autoq.service.guard.tokens import TokenFile
from autoq.service.problems import Refusal
from autoq.service.replies import address_of, problem_reply
from autoq.service.settings import ServiceSettings
from autoq.wire import Identity
from autoq.wire import Scope as TokenScope

_log = logging.getLogger(__name__)

PUBLIC_PATHS = frozenset({"/", "/studies", "/compare", "/jobs", "/v1/health", "/v1/ready"})
PUBLIC_PREFIXES = ("/studies/", "/jobs/", "/assets/")
"""What needs no token: the page, which holds no data, and whether the server is well. Everything
else does, routes that somebody adds later too."""

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; font-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
"""Of pages. Plotly would write a style element of its own, which this refuses; it uses the sheet
with the id plotly.js-style-global instead, which the page links. Its images for saving are data: and
blob: addresses. What it sets by style attributes (how heat maps are scaled) the sheet has, too."""

DATA_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""Of everything else. A report that is opened, not saved, is a page with styles and images of its
own inside; it runs nothing, and it is of no origin."""

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}

_SAFE = frozenset({"GET", "HEAD"})
_CHANGE_COST = 10.0  # of a request that may begin work, in requests that read
_BURST_SECONDS = 2.0
_FAILURES_PER_SECOND, _FAILURES_AT_ONCE = 1.0, 20.0
_LONGEST_TOKEN = 200
_HEALTH = "/v1/health"
_TURNS = 8  # requests of one client that are answered at once: half of the threads that read

_CALLER = "autoq.caller"

LOCAL = Identity(name="local", scope=TokenScope.ADMIN, authentication=False, version=VERSION)
"""Everybody on this machine, where the service was started without tokens."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: None of somebody without a token; and what limits count by."""

    identity: Identity | None
    key: str


class Guard:
    """What a service lets in: its rules, and what clients have used of their limits."""

    def __init__(self, settings: ServiceSettings) -> None:
        """
        Raises:
            InputError: the token file is not as `read_tokens` says.
        """
        self._hosts = HostRule(settings.host, settings.allowed_hosts)
        self._tokens = None if settings.token_file is None else TokenFile(settings.token_file)
        rate = settings.rate_limit
        self._requests = None if rate is None else TokenBuckets(rate, _burst(rate))
        self._failures = TokenBuckets(_FAILURES_PER_SECOND, _FAILURES_AT_ONCE)
        self._streams = Slots(settings.streams_each, settings.streams_together)
        self._turns = Turns(_TURNS)

    def stream_slot(self, scope: Mapping[str, Any]) -> Callable[[], None]:
        """A place among the connections that listen; call what comes back to leave it.

        Raises:
            Refusal: the client has too many.
        """
        return self._streams.take(_caller(scope).key)

    def turn(self, scope: Mapping[str, Any]) -> AbstractAsyncContextManager[Callable[[], None]]:
        """See `Turns.turn`; streams end theirs as they begin, and health waits for nobody."""
        if scope["path"] == _HEALTH and scope["method"] in _SAFE:
            return nullcontext(_nothing)
        return self._turns.turn(_caller(scope).key)

    def admit(self, scope: Scope, headers: Headers) -> Caller:
        """Who asks, if the request may come in.

        Raises:
            Refusal: it may not.
        """
        open_to_all = is_public(scope["path"]) and scope["method"] in _SAFE
        _check_size(scope)
        _check_lengths(headers)
        self._check_host(headers)
        if not open_to_all:
            self._check_origin(scope["method"], headers)
        caller = self._caller(_client(scope), headers, open_to_all=open_to_all)
        self._check_rate(scope, caller)
        if caller.identity is None and not open_to_all:
            raise _unauthorized("this address needs a token: Authorization: Bearer TOKEN")
        return caller

    def _check_host(self, headers: Headers) -> None:
        named = headers.getlist("host")
        if len(named) != 1 or not self._hosts.allows(named[0]):
            raise Refusal(
                "forbidden",
                f"the Host header must name this server, got {', '.join(named)[:100]!r}; use its "
                "address, or start it with --allowed-host",
            )

    def _check_origin(self, method: str, headers: Headers) -> None:
        sites = headers.getlist("sec-fetch-site")
        origins = headers.getlist("origin")
        is_ours = all(self._hosts.is_same_origin(found, headers["host"]) for found in origins)
        # Behind a proxy that renames the host a browser still knows what is the same origin.
        if not (is_ours and {"same-origin", "none"}.issuperset(sites)):
            raise Refusal(
                "forbidden",
                f"pages of other sites may not send {method} here; open the service's own page",
            )

    def _caller(self, address: str, headers: Headers, *, open_to_all: bool) -> Caller:
        by_address = f"address {client_key(address)}"
        if self._tokens is None:
            return Caller(LOCAL, by_address)
        given = headers.getlist("authorization")
        if not given:
            return Caller(None, by_address)
        token = _bearer(given[0]) if len(given) == 1 else None
        entry = None if token is None else self._tokens.find(token)
        if entry is not None:
            identity = Identity(
                name=entry.name, scope=entry.scope, authentication=True, version=VERSION
            )
            return Caller(identity, f"token {entry.name}")
        if not open_to_all:
            self._refuse_token(by_address)
        return Caller(None, by_address)

    def _refuse_token(self, key: str) -> None:
        # Only wrong tokens are slowed down: right ones may come from the same address.
        wait = self._failures.take(key)
        if wait:
            raise too_fast(wait)
        raise _unauthorized(
            "the token is not known here; it may have been revoked", ', error="invalid_token"'
        )

    def _check_rate(self, scope: Scope, caller: Caller) -> None:
        if self._requests is None:
            return
        wait = self._requests.take(caller.key, _cost(scope))
        if wait:
            raise too_fast(wait)


class SecurityMiddleware:
    """Asks the guard, passes on what it lets in, and sees to the headers of every reply."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the app's life; connections of other kinds are closed."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, _Sender(send, scope["path"]))
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _answer(self, scope: Scope, receive: Receive, send: _Sender) -> None:
        try:
            headers = Headers(scope=scope)
            scope[_CALLER] = self._guard.admit(scope, headers)
            async with self._guard.turn(scope) as send.on_start:
                body = await _checked_body(scope, headers, receive)
                await self._app(scope, body, send)
        except Exception as error:
            if not isinstance(error, Refusal):
                _log.exception("%s %s failed", scope["method"], scope["path"])
            if send.has_started:
                raise
            await problem_reply(error, address_of(scope))(scope, receive, send)


class _Sender:
    """Sends, with the security headers that the reply has not set itself."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        is_page = is_public(path) and not path.startswith("/v1/")
        self._policy = PAGE_POLICY if is_page else DATA_POLICY
        self.has_started = False
        self.on_start: Callable[[], None] = _nothing  # a client may take its reply slowly

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            self.on_start()
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers["content-security-policy"] = self._policy
            headers.setdefault("cache-control", "no-store")
        await self._send(message)


def _check_size(scope: Scope) -> None:
    lines = [scope["path"].encode("utf-8", "replace"), scope["query_string"]]
    lines += [part for header in scope["headers"] for part in header]
    if sum(map(len, lines)) > HEADER_BYTES:
        raise Refusal(
            "too-large",
            f"an address and its headers have at most {HEADER_BYTES} bytes; send fewer",
            headers={"connection": "close"},
        )


def _check_lengths(headers: Headers) -> None:
    """Before anything else is refused: what a proxy took for the body would be the next request."""
    if "content-length" in headers and "transfer-encoding" in headers:
        raise Refusal(
            "input",
            "a body's length is told by Content-Length or by Transfer-Encoding, got both; leave "
            "one out",
            headers={"connection": "close"},
        )


def _nothing() -> None:
    """There is no turn to end."""


def _burst(rate: float) -> float:
    """What comes at once: two seconds' worth, and two requests that change something."""
    return max(rate * _BURST_SECONDS, 2 * _CHANGE_COST)


def is_public(path: str) -> bool:
    """Whether a path needs no token to be read."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES)


def identity_of(scope: Mapping[str, Any]) -> Identity:
    """Who sent a request.

    Raises:
        Refusal: nobody with a token.
    """
    identity = _caller(scope).identity
    if identity is None:
        raise _unauthorized("this address needs a token: Authorization: Bearer TOKEN")
    return identity


def _caller(scope: Mapping[str, Any]) -> Caller:
    found: Caller = scope.get(_CALLER, Caller(None, "unknown"))
    return found


def _unauthorized(detail: str, more: str = "") -> Refusal:
    return Refusal(
        "unauthorized",
        f"{detail}; `autoq token create` makes one",
        headers={"www-authenticate": f'Bearer realm="autoq"{more}'},
    )


def _bearer(header: str) -> str | None:
    scheme, _, token = header.partition(" ")
    token = token.strip()
    is_one = scheme.lower() == "bearer" and 0 < len(token) <= _LONGEST_TOKEN
    return token if is_one else None


def _client(scope: Scope) -> str:
    """The address that the connection comes from, whatever headers say; a proxy's is the proxy's."""
    client = scope.get("client")
    return client[0] if client else "unknown"


def _cost(scope: Scope) -> float:
    """Plans are computed from what is stored: asking for one is reading."""
    reads = scope["method"] in _SAFE or scope["path"].endswith("/plans")
    return 1.0 if reads else _CHANGE_COST


async def _checked_body(scope: Scope, headers: Headers, receive: Receive) -> Receive:
    announced = _announced(headers)
    has_body = announced != 0 or "transfer-encoding" in headers
    if scope["method"] not in _SAFE and (has_body or "content-type" in headers):
        _check_type(headers.getlist("content-type"))
    if not has_body:
        return receive
    if scope["method"] in _SAFE:  # no route reads it, so it is not kept
        return receive
    body = await bounded_body(receive, announced)
    if body:
        check_json(body)
    return replayed(body, receive)


def _announced(headers: Headers) -> int | None:
    """Content-Length; 0 of a request without a body, None of one whose length is not told."""
    length = headers.get("content-length")
    if length is None:
        return None if "transfer-encoding" in headers else 0
    if not (length.isascii() and length.isdecimal() and len(length) < 20):
        raise Refusal("input", f"Content-Length is a number of bytes, got {length[:40]!r}")
    return int(length)


def _check_type(types: list[str]) -> None:
    kind, _, parameters = ", ".join(types).lower().partition(";")
    charset = parameters.replace(" ", "").replace('"', "")
    if kind.strip() != "application/json" or charset not in ("", "charset=utf-8"):
        raise Refusal(
            "media-type",
            f"bodies are application/json in UTF-8, got {', '.join(types)[:100]!r}; send JSON with "
            "that Content-Type",
        )
