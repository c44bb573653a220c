"""A server whose every reply a test decides, on a real socket: for tests of clients."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from autoq.wire import Event, EventKind, Job, JobKind, JobStatus


@dataclass
class Asked:
    """One request that reached the server."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Answer:
    """What the server does with one request: a reply, or a connection that ends."""

    status: int = 200
    body: Any = None  # JSON, or bytes as they are
    headers: dict[str, str] = field(default_factory=dict)
    hangs_up: bool = False  # after the body, before its end; before any reply if there is no body


class ScriptedServer(ThreadingHTTPServer):
    """Answers the n-th request with the n-th answer, or as a function of it says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[Asked] = []
        self.answers: list[Answer] = []
        self.route: Callable[[Asked], Answer] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that a test ends are no news."""


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        asked = Asked(self.command, self.path, dict(self.headers), body)
        self.server.asked.append(asked)
        route = self.server.route
        answer = self.server.answers.pop(0) if route is None else route(asked)
        if answer.hangs_up and answer.body is None:
            self.close_connection = True
            self.connection.close()
            return
        content = (
            answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        )
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        # A body that claims to be longer than it is: the reader sees the connection break.
        self.send_header("Content-Length", str(len(content) + (1 if answer.hangs_up else 0)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        if answer.hangs_up:
            self.close_connection = True

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """A server that runs as long as the context."""
    scripted = ScriptedServer()
    thread = threading.Thread(target=scripted.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield scripted
    finally:
        scripted.shutdown()
        thread.join()
        scripted.server_close()


def job(status: JobStatus = JobStatus.QUEUED, **fields: Any) -> dict[str, Any]:
    """A job as the server tells it."""
    known: dict[str, Any] = {
        "id": "j1",
        "kind": JobKind.SEARCH,
        "study": "s",
        "request": {},
        "created": "2026-01-01T00:00:00+00:00",
        "started": None,
        "finished": None,
        "attempts": 1,
        "worker": None,
        "progress": None,
        "problem": None,
        "result": None,
    }
    return Job.model_validate({**known, "status": status, **fields}).model_dump(mode="json")


def stream(*events: tuple[int, EventKind, dict[str, Any]]) -> bytes:
    """Events as the server sends them, with a keep-alive among them."""
    lines = [": keep-alive\n\n"]
    for identifier, kind, data in events:
        event = Event(
            id=identifier, job="j1", time="2026-01-01T00:00:00+00:00", kind=kind, data=data
        )
        lines.append(f"id: {identifier}\nevent: {kind}\ndata: {event.model_dump_json()}\n\n")
    return "".join(lines).encode()
