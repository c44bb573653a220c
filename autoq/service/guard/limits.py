"""How much one client may ask for: requests a second, bytes of a body, connections that listen."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Message, Receive

from autoq.service.problems import Refusal

HEADER_BYTES = 16 << 10  # of the address, too
BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0
"""How long a body may take to come in; whoever sends slower holds a connection and memory."""

_BODY_DEPTH = 32  # of lists and objects in each other; requests need 3
_BODY_SEPARATORS = 10_000
"""Of all `,`, `[` and `{`, those in texts too: more values than any request has. Each costs dozens of
times its bytes in memory, in processor time, and in the reply that says what is wrong with it."""

_WAITING = 1_000  # requests of one client, for its turns
_KEYS = 10_000


class TokenBuckets:
    """Token buckets, one for each client: a burst at once, then a steady rate.

    Of more than 10,000 clients those that were seen last are remembered; the others start anew.
    """

    def __init__(
        self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            rate: per second.
            burst: at once, of a client that asked for nothing lately.
            clock: seconds.
        """
        self._rate, self._burst, self._clock = rate, burst, clock
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key -> (level, time)

    def take(self, key: str, cost: float = 1.0) -> float:
        """Take what a request costs.

        Returns:
            Seconds until there would be enough; 0.0 where it was taken.
        """
        now = self._clock()
        level, then = self._levels.pop(key, (self._burst, now))
        level = min(self._burst, level + (now - then) * self._rate)
        wait = max(0.0, (cost - level) / self._rate)
        self._levels[key] = (level if wait else level - cost, now)
        if len(self._levels) > _KEYS:
            self._levels.popitem(last=False)
        return wait


class Slots:
    """Places for connections that stay open: some for each client, some for all."""

    def __init__(self, each: int, together: int) -> None:
        self._each, self._together = each, together
        self._taken: Counter[str] = Counter()

    def take(self, key: str) -> Callable[[], None]:
        """A place; call what comes back to leave it, any number of times.

        Raises:
            Refusal: too many are open.
        """
        if self._taken[key] >= self._each or self._taken.total() >= self._together:
            self._taken += Counter()  # forgets those that have none
            raise Refusal(
                "too-many-requests",
                f"a client may listen on {self._each} connections at once, and all together on "
                f"{self._together}; close one",
                headers={"retry-after": "5"},
            )
        self._taken[key] += 1
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self._taken[key] -= 1

        return leave


class Turns:
    """Requests of one client that are answered at once: some, and the others wait, so that a client
    with many slow ones leaves threads to everybody else."""

    def __init__(self, each: int) -> None:
        self._each = each
        self._of_client: dict[str, asyncio.Semaphore] = {}
        self._interested: Counter[str] = Counter()  # requests that have a turn or wait for one

    @asynccontextmanager
    async def turn(self, key: str) -> AsyncIterator[Callable[[], None]]:
        """Wait for a turn; call what comes to end it before the block does, any number of times.

        Raises:
            Refusal: too many wait already.
        """
        if self._interested[key] >= self._each + _WAITING:
            raise Refusal(
                "too-many-requests",
                f"{_WAITING} requests of one client wait already; send the next when some are "
                "answered",
                headers={"retry-after": "5"},
            )
        turns = self._of_client.setdefault(key, asyncio.Semaphore(self._each))
        self._interested[key] += 1
        has_turn = False

        def end() -> None:
            nonlocal has_turn
            if has_turn:
                has_turn = False
                turns.release()

        try:
            has_turn = await turns.acquire()
            yield end
        finally:
            end()
            self._interested[key] -= 1
            if not self._interested[key]:
                del self._interested[key], self._of_client[key]


def too_fast(wait: float) -> Refusal:
    """That a client has to wait so many seconds."""
    return Refusal(
        "too-many-requests",
        f"requests come faster than the server takes them from one client; wait {wait:.2g} s",
        headers={"retry-after": str(math.ceil(wait))},
    )


async def bounded_body(receive: Receive, announced: int | None) -> bytes:
    """The whole body, of at most 1 MiB in at most 30 seconds, whatever its headers say.

    Args:
        announced: Content-Length, if there is one.
    Raises:
        Refusal: it is larger or slower; or the client went away.
    """
    if announced is not None and announced > BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _collected(receive)
    except TimeoutError:
        raise Refusal(
            "too-large", f"a body comes within {BODY_SECONDS:g} seconds; send it faster"
        ) from None


async def _collected(receive: Receive) -> bytes:
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal("input", "the body ended before it was complete; send it again")
        parts += message.get("body", b"")
        if len(parts) > BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return bytes(parts)


def _too_large() -> Refusal:
    return Refusal(
        "too-large",
        f"a body has at most {BODY_BYTES} bytes; models and data stay on the server, and are named",
        headers={"connection": "close"},
    )


def replayed(body: bytes, receive: Receive) -> Receive:
    """What `receive` gave, again; then whatever it gives."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


def check_json(body: bytes) -> None:
    """Refuse a body that readers could take for different things.

    Raises:
        Refusal: no JSON in UTF-8, a name twice in an object, NaN or an infinity, more than 32
            levels of nesting, or more values than any request has.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > _BODY_SEPARATORS:
        raise Refusal(
            "too-large",
            f"a body has , [ and {{ at most {_BODY_SEPARATORS} times; send fewer values",
        )
    try:
        # Decoded here: json.loads would guess other encodings.
        content = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_constant)
        if _depth(content) > 0:
            return
    except Refusal:
        raise
    except RecursionError:
        pass
    except ValueError:  # also of an integer with thousands of digits
        raise Refusal("input", "a body is JSON in UTF-8, and this is not; mend it") from None
    raise _too_deep()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise Refusal("input", "an object of a body has every name once, and one has it twice")
    return content


def _constant(name: str) -> float:
    raise Refusal("input", f"numbers of a body are finite, got {name}; leave the field out")


def _depth(content: Any) -> int:
    """Levels of nesting, 1 of a plain value; 0 of more than allowed."""
    level = [content]
    for depth in range(1, _BODY_DEPTH + 1):
        inner = [value for value in level if isinstance(value, dict | list)]
        if not inner:
            return depth
        level = [
            value
            for outer in inner
            for value in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return 0


def _too_deep() -> Refusal:
    return Refusal(
        "input", f"a body has at most {_BODY_DEPTH} levels of nesting; send less deep ones"
    )
