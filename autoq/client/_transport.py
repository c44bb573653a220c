"""One request after another: who asks, what is tried again, what a refusal raises."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import httpx

from autoq.client._address import checked_address, checked_token, is_loopback
from autoq.client._failures import UnreachableError, error_of_response
from autoq.errors import AutoqError, InputError

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
_LONGEST_ASKED_SECONDS = 60.0
"""What a server may ask to wait; a longer time is for the caller to decide."""

_TRIED_AGAIN = (429, 503)


class BusyError(Exception):
    """The server wants to be asked again; `error` is what its problem stands for."""

    def __init__(self, error: AutoqError, pause_seconds: float) -> None:
        super().__init__(str(error))
        self.error = error
        self.pause_seconds = min(pause_seconds, _LONGEST_ASKED_SECONDS)


class Transport:
    """A connection to one server; never shows its token."""

    def __init__(
        self, address: str, token: str | None, timeout_seconds: float, retries: int
    ) -> None:
        """
        Raises:
            InputError: the address is no server's, or a number is out of range.
        """
        if not timeout_seconds > 0:
            raise InputError(f"timeout must be above 0 seconds, got {timeout_seconds!r}")
        if retries < 0:
            raise InputError(f"retries must be at least 0, got {retries!r}")
        self.url = checked_address(address)
        found = checked_token(token, self.url)
        self._retries = retries
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {found}"} if found else {},
            timeout=timeout_seconds,
            # A proxy of the environment is not asked for what runs on this machine.
            trust_env=not is_loopback(self.url.host),
        )

    def close(self) -> None:
        """End the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        repeatable: bool = False,
        accepted: Container[int] = (),
    ) -> httpx.Response:
        """A reply of success.

        Args:
            path: after the server's URL, without a slash before it.
            query: None values are left out.
            repeatable: asking twice does no more than asking once, so that it is tried again where
                the connection fails or the server is busy.
            accepted: statuses of errors that are an answer here.

        Raises:
            UnreachableError: the server does not answer.
            AutoqError: what its problem stands for.
        """
        given = {name: value for name, value in (query or {}).items() if value is not None}
        for attempt in range(self._retries + 1 if repeatable else 1):
            is_last = not repeatable or attempt == self._retries
            try:
                response = self._http.request(
                    method, path, json=body, params=given, headers=dict(headers or {})
                )
            except httpx.TransportError as error:
                if is_last:
                    raise self.unreachable(error) from None
                time.sleep(pause_seconds(attempt))
                continue
            if response.is_success or response.status_code in accepted:
                return response
            asked = asked_pause(response)
            if (
                is_last
                or response.status_code not in _TRIED_AGAIN
                or asked > _LONGEST_ASKED_SECONDS
            ):
                raise error_of_response(response)
            time.sleep(max(asked, pause_seconds(attempt)))
        raise AssertionError("the last attempt returns or raises")

    @contextmanager
    def stream(
        self, path: str, headers: Mapping[str, str], silence_seconds: float
    ) -> Iterator[httpx.Response]:
        """A reply that is read as it comes.

        Args:
            silence_seconds: how long nothing may come before the connection counts as lost.

        Raises:
            httpx.TransportError: the connection fails, now or while it is read.
            BusyError: the server cannot answer now.
            AutoqError: what the server's problem stands for.
        """
        # read is between two pieces of the reply, which the server's keep-alives part.
        timeout = httpx.Timeout(self._http.timeout.connect, read=silence_seconds)
        with self._http.stream("GET", path, headers=dict(headers), timeout=timeout) as response:
            if not response.is_success:
                response.read()
                error = error_of_response(response)
                if response.status_code in _TRIED_AGAIN:
                    raise BusyError(error, asked_pause(response))
                raise error
            yield response

    def unreachable(self, error: Exception) -> UnreachableError:
        """What to say of a connection that failed."""
        reason = str(error) or type(error).__name__
        return UnreachableError(
            f"{self.url} does not answer ({reason}); see that `autoq serve` runs there, and that "
            "the URL is right"
        )


def pause_seconds(attempt: int) -> float:
    """How long to wait after the attempt of this number, counted from 0."""
    return min(_FIRST_PAUSE_SECONDS * 2.0 ** min(attempt, 16), _LONGEST_PAUSE_SECONDS)


def asked_pause(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, 0 where it asks for none (or for a date)."""
    try:
        return max(float(response.headers.get("Retry-After", "0")), 0.0)
    except ValueError:
        return 0.0
