"""Events that survive lost connections, progress that is shown, and how jobs end."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

import autoq
from autoq.client import JobCancelledError, UnreachableError
from autoq.client._events import events_in, follow
from autoq.client._transport import pause_seconds
from autoq.errors import BudgetInfeasibleError
from autoq.service.problems import problem_of
from autoq.testing.scripted_server import Answer, job, stream
from autoq.wire import EventKind, JobStatus

MANY = {"type": "urn:autoq:problem:too-many-requests", "title": "", "status": 429, "detail": "d"}
STATUS, PROGRESS, NOTE = EventKind.STATUS, EventKind.PROGRESS, EventKind.NOTE


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    made = []
    monkeypatch.setattr("autoq.client._events.time.sleep", made.append)
    return made


def serve_job(server, streams, end):
    """A job whose streams are those, one after another, and which then is `end`."""

    def route(asked):
        if asked.path == "/v1/jobs/j1/events":
            return streams.pop(0)
        return Answer(200, end if not streams else job(JobStatus.RUNNING))

    server.route = route


def test_events_go_on_after_the_last_one_seen(server, pauses):
    notes = [(number, NOTE, {"text": str(number)}) for number in range(1, 6)]
    streams = [
        Answer(200, stream(*notes[:2]), hangs_up=True),
        Answer(hangs_up=True),
        Answer(503, {"type": "urn:autoq:problem:store", "title": "", "status": 503, "detail": "d"}),
        Answer(429, MANY, {"Retry-After": "5"}),
        # One of them again; and the server ends the stream while the job runs.
        Answer(200, stream(*notes[1:4])),
        Answer(200, stream(notes[4])),
    ]
    serve_job(server, streams, job(JobStatus.DONE))
    with autoq.Client(server.url) as client:
        seen = [event.id for event in client.job("j1").events()]
    assert seen == [1, 2, 3, 4, 5]
    resumed = [a.headers.get("Last-Event-ID") for a in server.asked if a.path.endswith("/events")]
    assert resumed == [None, "2", "2", "2", "2", "4"]
    assert 5.0 in pauses


def test_an_event_that_was_cut_is_read_when_it_comes_whole(server):
    whole = stream((1, NOTE, {"text": "a"}), (2, NOTE, {"text": "b"}))
    streams = [
        Answer(200, whole[:-10], hangs_up=True),
        Answer(200, stream((2, NOTE, {"text": "b"}))),
    ]
    serve_job(server, streams, job(JobStatus.DONE))
    with autoq.Client(server.url) as client:
        assert [event.data["text"] for event in client.job("j1").events()] == ["a", "b"]


def test_a_server_that_stays_away_is_said_to_be_away(server):
    server.route = lambda asked: Answer(hangs_up=True)
    with (
        autoq.Client(server.url) as client,
        pytest.raises(UnreachableError, match="does not answer"),
    ):
        list(follow(client.transport, "v1/jobs/j1/events", give_up_seconds=0.0))


def test_a_stream_that_was_silent_for_long_is_taken_up_again(server, monkeypatch):
    clock = [0.0]

    def read_for_long(lines):
        clock[0] += 3600
        yield from events_in(lines)

    monkeypatch.setattr("autoq.client._events.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("autoq.client._events.events_in", read_for_long)
    server.answers = [
        Answer(200, b": open\n\n: nothing new\n\n", hangs_up=True),
        Answer(200, stream((1, NOTE, {"text": "a"}))),
    ]
    with autoq.Client(server.url) as client:
        assert [event.id for event in follow(client.transport, "v1/jobs/j1/events")] == [1]


def test_a_server_that_is_started_anew_ends_no_waiting(server):
    """It lets its streams end, and then is away for longer than a request is tried again."""
    away = [Answer(hangs_up=True)] * 3
    streams = [Answer(200, stream((1, NOTE, {"text": "a"}))), *away]
    streams.append(Answer(200, stream((2, STATUS, {"status": "done"}))))
    asked_for = [Answer(200, job(JobStatus.RUNNING)), *away, Answer(200, job(JobStatus.DONE))]
    server.route = lambda asked: (streams if "events" in asked.path else asked_for).pop(0)
    with autoq.Client(server.url, retries=2) as client:
        assert client.job("j1").wait().status is JobStatus.DONE


def test_pauses_grow_to_a_bound_however_often_something_was_tried():
    assert [pause_seconds(attempt) for attempt in (0, 1, 2, 100, 5000)] == [0.25, 0.5, 1, 8, 8]


def test_lines_of_the_format_that_are_not_ours_are_passed_over():
    lines = [": hello", "retry: 10", "", "id: 1", "event: note"]
    newer = 'data: {"id": 0, "job": "j1", "time": "t", "kind": "of tomorrow", "data": {}}'
    data = '{"id": 1, "job": "j1",\ndata:"time": "t", "kind": "note", "data": {"text": "x"}}'
    found = list(events_in([newer, "", *lines, *f"data: {data}".split("\n"), "", "data: cut"]))
    assert [(event.id, event.data) for event in found] == [(1, {"text": "x"})]


class Recorded:
    """A progress that writes down what it is told."""

    def __init__(self):
        self.said = []

    @contextmanager
    def task(self, description, total):
        self.said.append(("begin", description, total))
        yield lambda steps=1: self.said.append(("advance", description, steps))
        self.said.append(("end", description))

    def note(self, text):
        self.said.append(("note", text))


def test_waiting_shows_what_the_job_does(server):
    def progress(task, done, total):
        return {"task": task, "done": done, "total": total, "seconds_left": None}

    events = [
        (1, STATUS, {"status": "running"}),
        (2, PROGRESS, progress("scoring", 0, 3)),
        (3, PROGRESS, progress("scoring", 2, 3)),
        (4, NOTE, {"text": "few tokens"}),
        (5, PROGRESS, progress("scoring", 3, 3)),
        (6, PROGRESS, progress("measuring", 1, 2)),
        (7, PROGRESS, progress("measuring", 1, 2)),
        (8, PROGRESS, progress("measuring", 0, 2)),  # taken over by another worker
        (9, STATUS, {"status": "done"}),
    ]
    serve_job(server, [Answer(200, stream(*events))], job(JobStatus.DONE, result={"study": "s"}))
    shown = Recorded()
    with autoq.Client(server.url) as client:
        assert client.job("j1").result(shown) == {"study": "s"}
    assert shown.said == [
        ("begin", "scoring", 3),
        ("advance", "scoring", 2),
        ("note", "few tokens"),
        ("advance", "scoring", 1),
        ("end", "scoring"),
        ("begin", "measuring", 2),
        ("advance", "measuring", 1),
        ("end", "measuring"),
        ("begin", "measuring", 2),
        ("end", "measuring"),
    ]


def test_a_job_that_failed_raises_what_its_search_raises_in_process(server):
    error = BudgetInfeasibleError(2.0, 4.5, 16.0)
    failed = job(JobStatus.FAILED, problem=problem_of(error).model_dump(mode="json"))
    serve_job(server, [Answer(200, stream((1, STATUS, {"status": "failed"})))], failed)
    with autoq.Client(server.url) as client, pytest.raises(BudgetInfeasibleError) as caught:
        client.job("j1").wait()
    assert str(caught.value) == str(error)


def test_a_cancelled_job_says_how_to_go_on(server):
    server.answers = [Answer(200, job(JobStatus.CANCELLED))]
    with autoq.Client(server.url) as client, pytest.raises(JobCancelledError, match="resume j1"):
        client.job("j1").wait()


def test_a_handle_asks_for_its_own_job(server):
    server.answers = [
        Answer(200, job(JobStatus.RUNNING, study="first")),
        Answer(202, job(JobStatus.CANCELLING)),
        Answer(202, job(JobStatus.QUEUED)),
    ]
    with autoq.Client(server.url) as client:
        handle = client.job("j1")
        assert handle.study == "first"
        assert handle.cancel().status is JobStatus.CANCELLING
        assert handle.resume().status is JobStatus.QUEUED
        assert repr(handle) == "JobHandle('j1', search, queued)"
    assert [(asked.method, asked.path) for asked in server.asked] == [
        ("GET", "/v1/jobs/j1"),
        ("POST", "/v1/jobs/j1/cancel"),
        ("POST", "/v1/jobs/j1/resume"),
    ]
