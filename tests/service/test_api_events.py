"""Events for many listeners: in order, each once, from one question to the store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from autoq.errors import StoreError
from autoq.service.web.event_stream import EventStream
from autoq.service.web.events import EventHub, Topic
from autoq.wire import Event, EventKind

JOB = Topic(job="a")


class Source:
    """Events in a list; counts how often each method is asked."""

    def __init__(self, *ids: int) -> None:
        self.events = [event(number) for number in ids]
        self.ended = False
        self.asked = 0
        self.failing: bool | Exception = False

    def events_after(self, topic: Topic, after: int, limit: int) -> Sequence[Event]:
        self.asked += 1
        if self.failing:
            raise self.failing if isinstance(self.failing, Exception) else StoreError("away")
        found = [one for one in self.events if one.id > after and one.job == topic.job]
        return found[:limit]

    def newest_event(self) -> int:
        return max((one.id for one in self.events), default=0)

    def has_ended(self, topic: Topic) -> bool:
        return self.ended


def event(number: int, job: str = "a") -> Event:
    return Event(id=number, job=job, time="", kind=EventKind.NOTE, data={})


async def heard(hub: EventHub, after: int = 0, topic: Topic = JOB) -> list[int]:
    return [one.id async for batch in hub.listen(topic, after, 60.0) for one in batch]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


@pytest.mark.parametrize("after", [0, 1, 3, 450, 451, 10_000])
def test_what_an_ended_job_told_is_heard_whole_from_any_event_on(after: int) -> None:
    async def scenario() -> None:
        source = Source(*range(1, 452))
        source.events[10:10] = [event(10_000, job="another")]
        source.ended = True
        assert await heard(EventHub(source, 0.001), after) == list(range(after + 1, 452))

    run(scenario)


def test_what_comes_while_listening_is_heard_in_order_by_all() -> None:
    async def scenario() -> None:
        source = Source(1, 2)
        hub = EventHub(source, 0.001)
        early = asyncio.create_task(heard(hub))
        await until(lambda: hub.streamed == 2)
        source.events.append(event(5))
        late = asyncio.create_task(heard(hub, after=1))
        await until(lambda: hub.streamed == 5)
        source.events += [event(6), event(9)]
        source.ended = True
        assert await early == [1, 2, 5, 6, 9]
        assert await late == [2, 5, 6, 9]

    run(scenario)


def test_a_hundred_listeners_cost_as_many_questions_as_one() -> None:
    async def asked_by(listeners: int) -> int:
        source = Source(1)
        hub = EventHub(source, 0.001)
        tasks = [asyncio.create_task(heard(hub, after=1)) for _ in range(listeners)]
        await until(lambda: hub.topics == 1)
        await until(lambda: source.asked >= 3)
        for number in range(2, 22):
            source.events.append(event(number))
            await until(lambda number=number: hub.streamed == (number - 1) * listeners)
        before = source.asked
        source.ended = True
        for task in tasks:
            assert await task == list(range(2, 22))
        return source.asked - before

    async def scenario() -> None:
        # The one look that finds that it is over.
        assert await asked_by(100) <= 2

    run(scenario)


def test_nobody_listening_means_nobody_asking() -> None:
    async def scenario() -> None:
        source = Source(1)
        hub = EventHub(source, 0.001)
        listener = asyncio.create_task(heard(hub))
        await until(lambda: hub.streamed == 1)
        asking = asyncio.all_tasks() - {listener, asyncio.current_task()}
        assert asking
        listener.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listener
        assert hub.topics == 0
        await until(lambda: all(task.done() for task in asking))  # a question may be on its way
        before = source.asked
        await asyncio.sleep(0.05)
        assert source.asked == before

    run(scenario)


def test_who_falls_behind_the_buffer_misses_nothing() -> None:
    async def scenario() -> None:
        source = Source()
        hub = EventHub(source, 0.001)
        slow = hub.listen(JOB, 0, 60.0)
        fast = asyncio.create_task(heard(hub))
        source.events.append(event(1))
        got = [one.id for one in await anext(slow)]
        source.events += [event(number) for number in range(2, 3_502)]
        source.ended = True
        assert await fast == list(range(1, 3_502))
        async for batch in slow:
            got += [one.id for one in batch]
        assert got == list(range(1, 3_502))

    run(scenario)


def test_silence_is_told_and_a_resumed_job_is_heard_again() -> None:
    async def scenario() -> None:
        source = Source(1)
        hub = EventHub(source, 0.001)
        listening = hub.listen(JOB, 1, 0.01)
        assert await anext(listening) == ()
        source.ended = True
        with pytest.raises(StopAsyncIteration):
            while True:
                assert await anext(listening) == ()
        source.ended = False
        again = asyncio.create_task(heard(hub, after=1))
        await until(lambda: hub.topics == 1)
        source.events.append(event(2))
        await until(lambda: hub.streamed == 1)
        source.ended = True
        assert await again == [2]

    run(scenario)


def test_a_store_that_is_away_for_a_moment_loses_nothing() -> None:
    async def scenario() -> None:
        source = Source(1)
        hub = EventHub(source, 0.001)
        listener = asyncio.create_task(heard(hub, after=1))
        await until(lambda: source.asked > 1)
        source.failing = True
        source.events.append(event(2))
        before = source.asked
        await until(lambda: source.asked >= before + 3)
        source.failing = False
        source.ended = True
        assert await listener == [2]

    run(scenario)


def test_a_store_that_stays_away_ends_the_streams() -> None:
    async def scenario() -> None:
        source = Source(1)
        hub = EventHub(source, 0.00001)
        listener = asyncio.create_task(heard(hub, after=1))
        await until(lambda: source.asked > 1)
        source.failing = True
        assert await listener == []

    run(scenario)


def test_an_event_that_nobody_understands_ends_the_streams(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A newer version may have written it; a stream that is silent for ever would say nothing."""

    async def scenario() -> None:
        source = Source(1)
        hub = EventHub(source, 0.001)
        listener = asyncio.create_task(heard(hub, after=1))
        await until(lambda: source.asked > 1)
        source.failing = ValueError("'news' is not a valid EventKind")
        async with asyncio.timeout(60):
            assert await listener == []
        assert "not a valid EventKind" in caplog.text

    run(scenario)


def test_closing_ends_everybody() -> None:
    async def scenario() -> None:
        hub = EventHub(Source(1), 0.001)
        listeners = [asyncio.create_task(heard(hub, after=1)) for _ in range(3)]
        await until(lambda: hub.topics == 1)
        await asyncio.sleep(0.01)
        await hub.close()
        assert await asyncio.gather(*listeners) == [[], [], []]
        assert await heard(hub) == []

    run(scenario)


def test_a_client_that_goes_or_takes_nothing_leaves_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoq.service.web.event_stream.STALLED_SECONDS", 0.02)

    async def scenario() -> None:
        hub = EventHub(Source(1), 0.001)
        left: list[str] = []
        gone = asyncio.Event()

        async def receive() -> dict[str, str]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def take(_: object) -> None:
            pass

        async def take_nothing(_: object) -> None:
            await asyncio.Event().wait()

        stalled = EventStream(hub.listen(JOB, 0, 60.0), lambda: left.append("stalled"))
        await stalled({"type": "http"}, receive, take_nothing)
        leaving = EventStream(hub.listen(JOB, 0, 60.0), lambda: left.append("gone"))
        task = asyncio.create_task(leaving({"type": "http"}, receive, take))
        await until(lambda: hub.streamed >= 1)
        gone.set()
        await task
        assert left == ["stalled", "gone"]
        assert hub.topics == 0

    run(scenario)
