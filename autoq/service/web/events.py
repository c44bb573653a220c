"""What happens to jobs, told as it happens: one look into the store for all who listen.

A listener holds nothing but the number of the last event that it was given. What is new is shared
among the listeners of a topic in a short buffer; whoever falls behind it reads from the store
again, so a slow client costs neither memory nor the others' time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from anyio import to_thread

from autoq.errors import AutoqError
from autoq.wire import Event

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
_PAGE = 200
_BUFFERED = 1_000
_FAILURES_BORNE = 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Topic:
    """What is listened to: one job, or all jobs of a study."""

    job: str | None = None
    study: str | None = None


class EventSource(Protocol):
    """Where events are read; its methods block, and are called in threads."""

    def events_after(self, topic: Topic, after: int, limit: int) -> Sequence[Event]:
        """The topic's events with larger ids, rising."""
        ...

    def newest_event(self) -> int:
        """The highest id of all events, 0 if there is none."""
        ...

    def has_ended(self, topic: Topic) -> bool:
        """Whether no event will come any more, unless the job is resumed."""
        ...


class EventHub:
    """All who listen, by topic. Belongs to one event loop."""

    def __init__(self, source: EventSource, poll_seconds: float = POLL_SECONDS) -> None:
        self._source = source
        self._poll_seconds = poll_seconds
        self._watches: dict[Topic, _Watch] = {}
        self._closed = False
        self.streamed = 0  # events that were handed out

    @property
    def topics(self) -> int:
        """How many topics somebody listens to: each is asked for in the store."""
        return len(self._watches)

    async def listen(
        self, topic: Topic, after: int, idle_seconds: float
    ) -> AsyncGenerator[Sequence[Event]]:
        """The topic's events behind `after`, in order and each once, until it has ended.

        Yields an empty sequence whenever nothing happened for `idle_seconds`.
        """
        watch = await self._joined(topic)
        try:
            while not self._closed:
                news = watch.news_after(after)
                if news is None:
                    seen = watch.newest
                    news = await _in_thread(self._source.events_after, topic, after, _PAGE)
                    if not news:
                        after = seen  # nothing of the topic lies between
                        continue
                if news:
                    after = news[-1].id
                    self.streamed += len(news)
                    yield news
                elif watch.is_over:
                    return
                elif not await watch.has_changed(after, idle_seconds):
                    yield ()
        finally:
            self._left(topic, watch)

    async def close(self) -> None:
        """End all that listen; who comes later is given nothing."""
        self._closed = True
        for watch in list(self._watches.values()):
            await watch.stop()

    async def _joined(self, topic: Topic) -> _Watch:
        watch = self._watches.get(topic)
        if watch is None or watch.is_over:  # an ended job may have been resumed since
            watch = self._watches[topic] = _Watch(self._source, topic, self._poll_seconds)
        watch.listeners += 1
        try:
            await watch.begun()
        except BaseException:
            self._left(topic, watch)
            raise
        return watch

    def _left(self, topic: Topic, watch: _Watch) -> None:
        watch.listeners -= 1
        if watch.listeners == 0:
            watch.cancel()
            if self._watches.get(topic) is watch:
                del self._watches[topic]


class _Watch:
    """The one that asks the store about a topic."""

    def __init__(self, source: EventSource, topic: Topic, poll_seconds: float) -> None:
        self._source = source
        self._topic = topic
        self._poll_seconds = poll_seconds
        self._recent: deque[Event] = deque(maxlen=_BUFFERED)
        self._before_recent = 0  # every event behind this one that was seen is in the buffer
        self.newest = 0  # every event up to this one is in the buffer, or was there before it
        self._changed = asyncio.Condition()
        self.listeners = 0
        self.is_over = False
        self._start: asyncio.Task[int] | None = None
        self._task: asyncio.Task[None] | None = None

    async def begun(self) -> None:
        """Wait until the topic is watched.

        Raises:
            StoreError: the store does not answer.
        """
        if self._start is None:
            self._start = asyncio.ensure_future(_in_thread(self._source.newest_event))
        newest = await asyncio.shield(self._start)
        if self._task is None:
            self.newest = self._before_recent = newest
            self._task = asyncio.ensure_future(self._watched())

    def news_after(self, after: int) -> Sequence[Event] | None:
        """What the buffer has behind an event; None if it may have forgotten some of it."""
        if after < self._before_recent:
            return None
        if after >= self.newest:
            return ()
        return [event for event in self._recent if event.id > after][:_PAGE]

    async def has_changed(self, after: int, seconds: float) -> bool:
        """Whether there is something behind an event, or an end, before so much time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: self.is_over or self.newest > after)
                return True
        return False

    async def stop(self) -> None:
        """Say that it is over."""
        self.cancel()
        await self._tell(())

    def cancel(self) -> None:
        """Ask the store no more."""
        self.is_over = True
        if self._task is not None:
            self._task.cancel()

    async def _watched(self) -> None:
        try:
            await self._watch_until_over()
        except Exception:
            # Nobody may wait for one that asks no more; clients come back.
            logger.exception("events are not told any more")
        self.is_over = True
        await self._tell(())

    async def _watch_until_over(self) -> None:
        failures = 0
        while failures < _FAILURES_BORNE:
            try:
                # In this order: what was written before the end is read after it.
                ended = await _in_thread(self._source.has_ended, self._topic)
                news = await self._read()
            except AutoqError:
                failures += 1
                await asyncio.sleep(self._poll_seconds * 2**failures)
                continue
            failures = 0
            if ended and not news:
                break
            await self._tell(news)
            await asyncio.sleep(0 if len(news) == _PAGE else self._poll_seconds)

    async def _read(self) -> Sequence[Event]:
        return await _in_thread(self._source.events_after, self._topic, self.newest, _PAGE)

    async def _tell(self, news: Sequence[Event]) -> None:
        async with self._changed:
            for event in news:
                if len(self._recent) == self._recent.maxlen:
                    self._before_recent = self._recent[0].id
                self._recent.append(event)
                self.newest = event.id
            if news or self.is_over:
                self._changed.notify_all()


async def _in_thread(function: Callable[..., T], *arguments: object) -> T:
    return await to_thread.run_sync(function, *arguments)
