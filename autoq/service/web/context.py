"""What routes work with: one value for every app, made when it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ParamSpec, TypeVar

from anyio import to_thread
from fastapi import Depends, Request

from autoq.service.guard.roots import Roots
from autoq.service.guard.security import Guard
from autoq.service.reading._cached_tables import Bounded
from autoq.service.reading.reader import StudyReader
from autoq.service.settings import ServiceSettings
from autoq.service.web.events import EventHub
from autoq.service.web.metrics import Metrics
from autoq.studies import StudyStore

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The store and what is built on it."""

    settings: ServiceSettings
    store: StudyStore
    reader: StudyReader
    tables: Bounded[bytes]  # replies that are large and change rarely
    roots: Roots
    events: EventHub
    metrics: Metrics
    guard: Guard

    async def in_thread(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a blocking function returns, without blocking the event loop."""
        return await to_thread.run_sync(lambda: function(*args, **kwargs))

    def stream_slot(self, request: Request) -> Callable[[], None]:
        """A place among the connections that may listen at once; call what comes back to leave it."""
        return self.guard.stream_slot(request.scope)


async def _context(request: Request) -> Context:  # one that is not async takes a thread
    found: Context = request.app.state.context
    return found


InContext = Annotated[Context, Depends(_context)]
