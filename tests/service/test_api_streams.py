"""Streams of a study, on a real connection: they do not end by themselves, so clients leave them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest

from autoq import wire
from autoq.service.settings import ServiceSettings
from autoq.studies import StudyStore
from autoq.testing.served import served
from autoq.testing.synthetic_study import add_synthetic_study

STUDY = "watched"


@pytest.fixture(scope="module")
def url_and_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, StudyStore]]:
    place = f"sqlite:///{tmp_path_factory.mktemp('streams') / 'store.db'}"
    with StudyStore.open(place) as store:
        add_synthetic_study(store, groups=4, formats=2, name=STUDY)
        settings = ServiceSettings(store=place, rate_limit=None, streams_each=3)
        with served(settings) as url:
            yield url, store


def read(stream: httpx.Response, count: int) -> list[wire.Event]:
    """The next events of a stream."""
    events: list[wire.Event] = []
    for line in stream.iter_lines():
        if line.startswith("data: "):
            events.append(wire.Event.model_validate_json(line.removeprefix("data: ")))
        if len(events) == count:
            break
    return events


def test_head_of_a_stream_ends_at_once(url_and_store: tuple[str, StudyStore]) -> None:
    url, _ = url_and_store
    with httpx.Client(timeout=120) as client:
        for _ in range(2):  # over one connection
            head = client.head(f"{url}/v1/studies/{STUDY}/events")
            assert head.status_code == 200
            assert head.headers["content-type"].startswith("text/event-stream")
        assert client.get(f"{url}/v1/health").status_code == 200


def test_a_studys_stream_tells_of_all_its_jobs_and_goes_on_after_one_ended(
    url_and_store: tuple[str, StudyStore],
) -> None:
    url, store = url_and_store
    first, _ = store.add_job(kind="measure", request={"plan": 1}, created_by="x", study=STUDY)
    store.add_job(kind="verify", request={}, created_by="x", study="another")
    store.request_cancel(first.id)
    at = f"{url}/v1/studies/{STUDY}/events"
    with httpx.stream("GET", at, timeout=120) as stream:
        seen = read(stream, 2)
        assert [(event.job, event.data["status"]) for event in seen] == [
            (first.id, "queued"),
            (first.id, "cancelled"),
        ]
    second, _ = store.add_job(kind="measure", request={"plan": 1}, created_by="x", study=STUDY)
    headers = {"last-event-id": str(seen[-1].id)}
    with httpx.stream("GET", at, headers=headers, timeout=120) as stream:
        assert [event.job for event in read(stream, 1)] == [second.id]


def test_what_happens_later_comes_over_the_open_connection(
    url_and_store: tuple[str, StudyStore],
) -> None:
    url, store = url_and_store
    job, _ = store.add_job(kind="verify", request={}, created_by="x")
    with httpx.stream("GET", f"{url}/v1/jobs/{job.id}/events", timeout=120) as stream:
        lines = stream.iter_lines()
        while not next(lines).startswith("data: "):
            pass
        store.request_cancel(job.id)
        rest = list(lines)  # ends, because the job has
    assert sum("cancelled" in line for line in rest) == 1


def test_a_client_may_not_listen_on_any_number_of_connections(
    url_and_store: tuple[str, StudyStore],
) -> None:
    url, store = url_and_store
    job, _ = store.add_job(kind="verify", request={}, created_by="x")
    at = f"{url}/v1/jobs/{job.id}/events"
    with httpx.Client(timeout=120) as client:
        with (
            client.stream("GET", at) as one,
            client.stream("GET", at) as two,
            client.stream("GET", at) as three,
        ):
            assert {stream.status_code for stream in (one, two, three)} == {200}
            refusal = client.get(at)
            assert refusal.status_code == 429
            assert int(refusal.headers["retry-after"]) > 0
        store.request_cancel(job.id)
        for _ in range(100):  # the places are given back once the server sees them go
            answer = client.get(at)
            if answer.status_code == 200:
                break
            time.sleep(0.05)
        assert "cancelled" in answer.text
