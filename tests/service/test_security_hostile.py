"""Hostile requests: bodies, headers, other sites' pages, floods; and what every reply carries."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from uvicorn.server import ServerState

from autoq.service.guard import limits
from autoq.service.guard.hosts import HostRule, client_key
from autoq.service.guard.limits import BODY_BYTES, HEADER_BYTES, Slots, TokenBuckets, Turns
from autoq.service.guard.security import DATA_POLICY, PAGE_POLICY
from autoq.service.problems import Refusal
from autoq.service.settings import ServiceSettings
from autoq.service.web import server
from autoq.service.web.app import create_app
from autoq.testing.synthetic_study import add_synthetic_study

HERE = "http://127.0.0.1:8731"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    folder: Path = tmp_path_factory.mktemp("hostile")
    made = create_app(ServiceSettings(store=f"sqlite:///{folder / 'store.db'}", rate_limit=None))
    add_synthetic_study(made.state.context.store, groups=4, formats=3, name="there")

    @made.get("/v1/broken")
    async def broken() -> None:
        raise RuntimeError("the password is hunter2")

    @made.get("/v1/broken-midway")
    async def broken_midway() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            raise RuntimeError("the password is hunter2")

        return StreamingResponse(parts())

    @made.post("/v1/body")
    async def body(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    return made


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, base_url=HERE, raise_server_exceptions=False) as made:
        yield made


def refused(response: Any, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    problem = response.json()
    assert problem["type"] == f"urn:autoq:problem:{kind}"
    return str(problem["detail"])


class TestBodies:
    @pytest.mark.parametrize(
        "kind",
        [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/jsonp",
            "text/json",
            "application/json, text/plain",
            "application/json; charset=utf-16",
            "application/json; charset=utf-8; x=y",
            "",
        ],
    )
    def test_bodies_are_json(self, client: TestClient, kind: str) -> None:
        response = client.post("/v1/studies", content=b"{}", headers={"Content-Type": kind})
        refused(response, 415, "media-type")

    def test_a_body_without_a_type_is_refused(self, client: TestClient) -> None:
        refused(client.post("/v1/studies", content=b"{}"), 415, "media-type")

    def test_a_form_without_fields_is_refused_where_no_body_is_wanted(
        self, client: TestClient
    ) -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        response = client.post("/v1/studies/there/cancel", headers=headers)
        refused(response, 415, "media-type")

    @pytest.mark.parametrize(
        "kind", ["application/json", "Application/JSON", 'application/json; charset="UTF-8"']
    )
    def test_json_is_known_however_it_is_written(self, client: TestClient, kind: str) -> None:
        response = client.post("/v1/body", content=b"{}", headers={"Content-Type": kind})
        assert response.json() == {"bytes": 2}

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            (b"{", "JSON in UTF-8"),
            (b"\xff\xfe{}", "JSON in UTF-8"),
            ("{}".encode("utf-16"), "JSON in UTF-8"),
            (b"\xef\xbb\xbf{}", "JSON in UTF-8"),
            (b'{"model": "\\ud800"}', "schema"),
            (b'{"model": "\xed\xa0\x80"}', "JSON in UTF-8"),
            (b'{"model": "bundled", "model": "x"}', "every name once"),
            (b'{"model": "bundled", "extra": {"a": 1, "a": 2}}', "every name once"),
            (b'{"model": "bundled", "effective_bits": NaN}', "finite"),
            (b'{"model": "bundled", "effective_bits": -Infinity}', "finite"),
            (b'{"model": "bundled", "effective_bits": 1e999}', "schema"),
            (b'{"model": "bundled", "seed": ' + b"9" * 5_000 + b"}", "JSON in UTF-8"),
            (b'{"model": "bundled", "seed": 99999999999999999999}', "schema"),
            (b"[" * 9_000, "JSON in UTF-8|32 levels"),
            (b"[" * 40 + b"]" * 40, "32 levels"),
            (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "32 levels"),
            (b'{"model": {"$ref": "#"}}', "schema"),
            (b"null", "schema"),
            (b"[]", "schema"),
            (b'"text"', "schema"),
            (b"{}x", "JSON in UTF-8"),
            (b'{"model": "bundled", "__proto__": {}}', "schema"),
            (b'{"model": "bundled", "trust_remote_code": true}', "schema"),
            (b'{"model": "bundled", "store": "sqlite:////etc/x"}', "schema"),
        ],
    )
    def test_hostile_bodies_are_refused(self, client: TestClient, body: bytes, reason: str) -> None:
        detail = refused(client.post("/v1/studies", content=body, headers=JSON), 422, "input")
        assert re.search(reason, detail), detail
        assert len(detail) < 1_500

    @pytest.mark.parametrize(
        "body",
        [
            b"[" * 100_000,
            b"[" + b"[[[]]]," * 4_000 + b"1]",
            b'{"rules": [' + b'"",' * 10_000 + b'""]}',
            b"[" + b"{}," * 6_000 + b"{}]",
        ],
        ids=["open", "lists", "texts", "objects"],
    )
    def test_more_values_than_any_request_has_are_refused_unread(
        self, client: TestClient, body: bytes
    ) -> None:
        response = client.post("/v1/studies", content=body, headers=JSON)
        assert "at most 10000 times" in refused(response, 413, "too-large")

    def test_of_many_faults_the_first_are_listed(self, client: TestClient) -> None:
        response = client.post("/v1/studies", json={"model": "bundled", "rules": [1] * 5_000})
        assert "and 4997 more" in refused(response, 422, "input")
        assert len(response.json()["errors"]) == 20
        assert len(response.content) < 5_000

    def test_a_body_that_no_route_reads_is_not_kept(self, app: FastAPI) -> None:
        taken = 0

        async def parts() -> AsyncIterator[bytes]:
            nonlocal taken
            taken += 1
            yield b" "

        async def ask(path: str) -> int:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url=HERE) as asking:
                return (await asking.request("GET", path, content=parts())).status_code

        assert [asyncio.run(ask(path)) for path in ("/", "/v1/health", "/v1/me")] == [200] * 3
        assert taken == 0

    def test_the_largest_body_passes_and_one_byte_more_does_not(self, client: TestClient) -> None:
        fits = b'"' + b"a" * (BODY_BYTES - 2) + b'"'
        assert client.post("/v1/body", content=fits, headers=JSON).json() == {"bytes": BODY_BYTES}
        response = client.post("/v1/body", content=fits + b" ", headers=JSON)
        refused(response, 413, "too-large")

    def test_ten_megabytes_are_refused(self, client: TestClient) -> None:
        response = client.post("/v1/studies", content=b" " * 10_000_000, headers=JSON)
        refused(response, 413, "too-large")

    def test_a_body_without_a_length_is_counted(self, app: FastAPI) -> None:
        taken = 0

        async def parts() -> AsyncIterator[bytes]:
            nonlocal taken
            for _ in range(10_000):
                taken += 1
                yield b" " * 65_536

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url=HERE) as asking:
                return await asking.post("/v1/studies", content=parts(), headers=JSON)

        refused(asyncio.run(ask()), 413, "too-large")
        assert taken <= BODY_BYTES // 65_536 + 2, "the rest is not read"

    @pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "1" * 30, "٣", ""])
    def test_a_length_is_a_number(self, app: FastAPI, length: str) -> None:
        replies = asyncio.run(_raw(app, [(b"content-length", length.encode())]))
        assert replies[0]["status"] == 422

    @pytest.mark.parametrize("many", [1, 1000], ids=["one", "thousand"])
    def test_headers_are_bounded(self, client: TestClient, many: int) -> None:
        headers = {f"X-{number}": "a" * (HEADER_BYTES // many) for number in range(many)}
        refused(client.get("/v1/health", headers=headers), 413, "too-large")
        refused(client.get("/" + "a" * HEADER_BYTES), 413, "too-large")

    @pytest.mark.parametrize(
        "more", [[], [(b"origin", b"http://evil.example")]], ids=["let in", "refused anyway"]
    )
    def test_a_length_told_in_two_ways_is_refused(
        self, app: FastAPI, more: list[tuple[bytes, bytes]]
    ) -> None:
        headers = [(b"content-length", b"2"), (b"transfer-encoding", b"chunked"), *more]
        sent = asyncio.run(_raw(app, headers, [b"{}"]))
        assert sent[0]["status"] == 422
        assert b"got both" in sent[1]["body"]
        assert (b"connection", b"close") in sent[0]["headers"]

    def test_a_body_that_does_not_come_is_given_up(
        self, app: FastAPI, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "BODY_SECONDS", 0.05)
        replies = asyncio.run(_raw(app, [(b"content-length", b"10")], body=None))
        assert replies[0]["status"] == 413

    def test_a_client_that_goes_away_midway_is_no_failure(self, app: FastAPI) -> None:
        gone = [{"type": "http.request", "body": b"{", "more_body": True}, None]
        replies = asyncio.run(_raw(app, [(b"content-length", b"10")], body=gone))
        assert replies[0]["status"] == 422


async def _raw(
    app: FastAPI,
    headers: list[tuple[bytes, bytes]],
    body: Sequence[Any] | None = (),
) -> list[dict[str, Any]]:
    """The messages that a request gets whose headers no client library would send.

    Args:
        body: messages, of which None is that the client went; or None: nothing ever comes.
    """
    sent: list[dict[str, Any]] = []
    waiting = list(body or ())

    async def receive() -> dict[str, Any]:
        if body is None:
            await asyncio.Event().wait()
        return (waiting.pop(0) if waiting else None) or {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json"), *headers]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/studies",
        "raw_path": b"/v1/studies",
        "query_string": b"",
        "root_path": "",
        "headers": given,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8731),
    }
    await app(scope, receive, send)
    return sent


class TestHostsAndOrigins:
    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8731",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "evil.example#127.0.0.1",
            "evil.example/127.0.0.1",
            "user@127.0.0.1",
            "127.0.0.1 evil.example",
            "127.0.0.1,evil.example",
            "[::1",
            "127.0.0.1:x",
            "192.168.0.1",
            "0.0.0.0",
            "",
            "ⓛocalhost",
        ],
    )
    @pytest.mark.parametrize("path", ["/", "/v1/health", "/v1/me", "/v1/studies"])
    def test_other_hosts_are_refused(self, client: TestClient, host: str, path: str) -> None:
        headers = [("Host", host.encode())]
        refused(client.get(path, headers=headers), 403, "forbidden")

    @pytest.mark.parametrize(
        "host",
        ["127.0.0.1", "127.0.0.1:8731", "localhost", "LOCALHOST:80", "localhost.", "[::1]:8731"],
    )
    def test_names_of_this_machine_are_let_in(self, client: TestClient, host: str) -> None:
        assert client.get("/v1/me", headers={"Host": host}).status_code == 200

    def test_a_name_that_was_allowed_is_let_in_and_addresses_off_loopback(self) -> None:
        rule = HostRule("0.0.0.0", ["Autoq.Example"])
        assert rule.allows("autoq.example:443")
        assert rule.allows("192.168.0.7:8731")
        assert rule.allows("[fe80::1]")
        assert not rule.allows("evil.example")
        assert not HostRule("127.0.0.1").allows("192.168.0.7")

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": ""},
            {"Origin": "http://127.0.0.1:9999"},
            {"Origin": "http://localhost:8731"},  # another name is another origin
            {"Origin": "http://127.0.0.1:8731.evil.example"},
            {"Origin": "file://"},
            {"Origin": "chrome-extension://abc"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"},
            {"Sec-Fetch-Site": "nonsense"},
            [("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")],
        ],
    )
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", "/v1/studies"),
            ("DELETE", "/v1/studies/there"),
            ("POST", "/v1/studies/there/cancel"),
            ("OPTIONS", "/v1/studies"),
            ("GET", "/v1/studies"),
            ("POST", "/"),
        ],
    )
    def test_pages_of_other_sites_are_refused(
        self, client: TestClient, headers: dict[str, str], method: str, path: str
    ) -> None:
        response = client.request(method, path, headers=headers)
        refused(response, 403, "forbidden")
        assert not [name for name in response.headers if name.startswith("access-control")]

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"Origin": HERE},
            {"Origin": HERE, "Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "none"},
        ],
    )
    def test_the_own_page_and_programs_are_let_in(
        self, client: TestClient, headers: dict[str, str]
    ) -> None:
        assert client.post("/v1/body", json={}, headers=headers).status_code == 200

    def test_a_link_of_another_site_opens_the_page(self, client: TestClient) -> None:
        headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert client.get("/studies/there", headers=headers).status_code == 200

    def test_origins_behind_a_proxy(self) -> None:
        rule = HostRule("127.0.0.1", ["autoq.example"])
        assert rule.is_same_origin("https://autoq.example", "autoq.example")
        assert rule.is_same_origin("https://autoq.example", "127.0.0.1:8731")
        assert not rule.is_same_origin("https://evil.example", "autoq.example")


EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class TestReplies:
    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/", 200),
            ("GET", "/studies/x", 200),
            ("GET", "/assets/base.css", 200),
            ("GET", "/assets/none", 404),
            ("GET", "/assets/%2e%2e/index.html", 404),
            ("GET", "/v1/health", 200),
            ("GET", "/v1/me", 200),
            ("GET", "/v1/studies", 200),
            ("GET", "/v1/studies/there/report", 200),
            ("GET", "/v1/jobs/0", 404),
            ("GET", "/v1/none", 404),
            ("PUT", "/v1/studies", 405),
            ("POST", "/v1/studies", 422),
            ("GET", "/metrics", 200),
            ("GET", "/openapi.json", 200),
            ("GET", "/v1/broken", 500),
            ("GET", "/docs", 404),
        ],
    )
    def test_every_reply_has_the_headers(
        self, client: TestClient, method: str, path: str, status: int
    ) -> None:
        response = client.request(method, path)
        assert response.status_code == status, response.text
        assert {name: response.headers.get(name) for name in EVERYWHERE} == EVERYWHERE
        is_page = path == "/" or path.startswith(("/studies", "/assets"))
        policy = PAGE_POLICY if is_page else DATA_POLICY
        assert response.headers["content-security-policy"] == policy
        assert not {"server", "set-cookie", "x-powered-by"} & set(response.headers)
        assert not [name for name in response.headers if name.startswith("access-control")]
        if not is_page:
            caching = response.headers["cache-control"]
            assert "no-store" in caching or caching == "private, no-cache"

    def test_the_policies_allow_nothing_inline_but_a_report_s_styles(self) -> None:
        assert "unsafe" not in PAGE_POLICY
        assert "script-src" not in DATA_POLICY
        assert "default-src 'none'" in DATA_POLICY
        assert "sandbox" in DATA_POLICY

    def test_what_nobody_foresaw_says_nothing_of_the_inside(
        self, client: TestClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        response = client.get("/v1/broken")
        detail = refused(response, 500, "internal")
        assert "hunter2" not in response.text
        assert "the server's log" in detail
        assert "RuntimeError" in caplog.text, "whoever runs the server can look it up"

    def test_a_reply_that_breaks_midway_is_cut_off(self, client: TestClient) -> None:
        response = client.get("/v1/broken-midway")
        assert response.content in (b"first", b"")
        assert "hunter2" not in response.text

    def test_a_report_is_saved_not_opened(self, client: TestClient) -> None:
        response = client.get("/v1/studies/there/report")
        assert response.headers["content-disposition"].startswith("attachment")

    def test_other_protocols_are_closed(self, client: TestClient) -> None:
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/jobs"):
            pass


async def _slow_requests(folder: Path, path: str, *, begins: bool, at_once: int) -> None:
    """Twenty requests of one client that do not end, and one of another that has to be answered.

    Args:
        begins: whether the slow ones begin their reply at once.
        at_once: how many of them get as far as the route.
    """
    app = create_app(ServiceSettings(store=f"sqlite:///{folder / 's.db'}", rate_limit=None))
    entered, may_end = 0, asyncio.Event()

    @app.get(path)
    async def slow() -> StreamingResponse:
        nonlocal entered
        entered += 1

        async def parts() -> AsyncIterator[bytes]:
            yield b"the "
            await may_end.wait()
            yield b"end"

        if not begins:
            await may_end.wait()
        return StreamingResponse(parts())

    def client(address: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=app, client=(address, 1))
        return httpx.AsyncClient(transport=transport, base_url=HERE)

    async with client("10.0.0.1") as greedy, client("10.0.0.2") as other:
        waiting = [asyncio.create_task(greedy.get(path)) for _ in range(20)]
        while entered < at_once:
            await asyncio.sleep(0.01)
        assert (await other.get("/v1/me")).status_code == 200
        async with asyncio.timeout(60):  # only there to end a broken test
            assert (await greedy.get("/v1/health")).status_code == 200, "waits for nobody"
        assert entered == at_once
        may_end.set()
        assert [(await reply).text for reply in waiting] == ["the end"] * 20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestLimits:
    def test_a_burst_and_then_a_steady_rate(self) -> None:
        clock = Clock()
        buckets = TokenBuckets(rate=2.0, burst=3.0, clock=clock)
        assert [buckets.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
        assert buckets.take("b") == 0.0, "each has a bucket of its own"
        clock.now = 0.5
        assert [buckets.take("a"), buckets.take("a")] == [0.0, 0.5]
        clock.now = 100.0
        assert buckets.take("a", cost=3.0) == 0.0, "no more than a burst is saved up"
        assert buckets.take("a", cost=3.0) == 1.5

    def test_clients_without_number_take_no_memory_without_bound(self) -> None:
        buckets = TokenBuckets(rate=1.0, burst=1.0, clock=Clock())
        for number in range(20_000):
            buckets.take(str(number))
        assert len(buckets._levels) == 10_000

    def test_places_to_listen(self) -> None:
        slots = Slots(each=2, together=3)
        first, second, other = slots.take("a"), slots.take("a"), slots.take("b")
        for key in ("a", "b"):
            with pytest.raises(Refusal) as caught:
                slots.take(key)
            assert caught.value.headers["retry-after"] == "5"
        first()
        first()
        slots.take("a")
        second()
        other()
        slots.take("c")

    @pytest.mark.parametrize(
        ("path", "begins", "at_once"),
        [("/v1/slow", False, 8), ("/v1/slow", True, 20), ("/v1/slow/events", False, 8)],
        ids=["slow", "begun", "not listening yet"],
    )
    def test_one_client_s_slow_requests_leave_room_for_others(
        self, tmp_path: Path, path: str, begins: bool, at_once: int
    ) -> None:
        asyncio.run(_slow_requests(tmp_path, path, begins=begins, at_once=at_once))

    def test_one_client_s_slow_bodies_are_not_all_kept(self, app: FastAPI) -> None:
        begun = 0

        async def ask() -> list[httpx.Response]:
            may_end = asyncio.Event()

            async def body() -> AsyncIterator[bytes]:
                nonlocal begun
                begun += 1
                yield b"{"
                await may_end.wait()
                yield b"}"

            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url=HERE) as asking:
                sending = [
                    asyncio.create_task(asking.post("/v1/body", content=body(), headers=JSON))
                    for _ in range(20)
                ]
                while begun < 8:
                    await asyncio.sleep(0.01)
                assert (await asking.get("/v1/health")).status_code == 200
                assert begun == 8
                may_end.set()
                return [await reply for reply in sending]

        assert [reply.json() for reply in asyncio.run(ask())] == [{"bytes": 2}] * 20
        assert begun == 20

    def test_no_more_wait_for_a_turn_than_memory_is_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "_WAITING", 2)

        async def ask(turns: Turns) -> None:
            async with turns.turn("a"):
                waiting = [asyncio.create_task(turns.turn("a").__aenter__()) for _ in range(2)]
                await asyncio.sleep(0)
                with pytest.raises(Refusal, match="wait already"):
                    await turns.turn("a").__aenter__()
                async with turns.turn("b"):
                    pass
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)
            async with turns.turn("a"):
                pass

        turns = Turns(each=1)
        asyncio.run(ask(turns))
        assert not turns._of_client

    def test_turns_that_nobody_waits_for_are_forgotten(self) -> None:
        async def ask(turns: Turns) -> None:
            first = turns.turn("a")
            end = await first.__aenter__()
            waiting = asyncio.create_task(turns.turn("a").__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            end()
            end()  # once more is no second turn
            async with turns.turn("a"):
                third = asyncio.create_task(turns.turn("a").__aenter__())
                await asyncio.sleep(0.01)
                assert not third.done()
                third.cancel()
                await asyncio.gather(third, return_exceptions=True)
            await first.__aexit__(None, None, None)

        turns = Turns(each=1)
        asyncio.run(ask(turns))
        assert not turns._of_client

    def test_a_slider_is_never_slowed_and_a_flood_is(self, tmp_path: Path) -> None:
        app = create_app(ServiceSettings(store=f"sqlite:///{tmp_path / 's.db'}", rate_limit=100.0))
        add_synthetic_study(app.state.context.store, groups=4, formats=3, name="there")
        app.state.context.guard._requests._clock = clock = Clock()
        with TestClient(app, base_url=HERE) as client:
            for step in range(180):  # three seconds of dragging
                clock.now = step / 60
                body = {"effective_bits": 6.0 + step / 100}
                assert client.post("/v1/studies/there/plans", json=body).status_code != 429
            statuses = [client.get("/v1/me").status_code for _ in range(250)]
            assert statuses[0] == 200
            slowed = client.get("/v1/me")
            refused(slowed, 429, "too-many-requests")
            assert slowed.headers["retry-after"] == "1"
            clock.now += 60.0
            changes = [client.post("/v1/jobs/0/cancel").status_code for _ in range(30)]
            assert changes == [404] * 20 + [429] * 10, "what changes something costs ten reads"

    def test_the_address_is_the_connection_s_whatever_headers_say(self, tmp_path: Path) -> None:
        app = create_app(ServiceSettings(store=f"sqlite:///{tmp_path / 's.db'}", rate_limit=1.0))
        app.state.context.guard._requests._clock = Clock()
        with TestClient(app, base_url=HERE) as client:
            statuses = [
                client.get("/v1/me", headers={"X-Forwarded-For": f"10.0.0.{n}"}).status_code
                for n in range(30)
            ]
        assert statuses == [200] * 20 + [429] * 10

    def test_methods_without_number_make_no_figures_without_number(
        self, client: TestClient
    ) -> None:
        for number in range(50):
            assert client.request(f"BREW{number}", "/v1/me").status_code == 405
        figures = client.get("/metrics").text
        assert "BREW" not in figures
        assert 'method="other"' in figures

    def test_a_client_has_a_whole_network_of_ipv6(self) -> None:
        assert client_key("2001:db8::1") == client_key("2001:db8::ffff") == "2001:db8::/64"
        assert client_key("2001:db8:0:1::1") != client_key("2001:db8::1")
        assert client_key("::ffff:10.0.0.1") == client_key("10.0.0.1") == "10.0.0.1"
        assert client_key("testclient") == "testclient"


class TestConnections:
    @pytest.mark.parametrize(
        "sent",
        [
            b"\r\n",
            b"GET / HTTP/1.1\r\nHost: ",
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{",
        ],
        ids=["nothing", "half a request", "one request", "half a body"],
    )
    def test_connections_on_which_nothing_is_asked_end(
        self, monkeypatch: pytest.MonkeyPatch, sent: bytes
    ) -> None:
        monkeypatch.setattr(server, "_IDLE_SECONDS", 0.05)
        reply = asyncio.run(_until_closed(sent, seconds=0.0))
        assert (b"done" in reply) == (b"\r\n\r\n" in sent)

    def test_a_slow_reply_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server, "_IDLE_SECONDS", 0.05)
        request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        assert b"done" in asyncio.run(_until_closed(request, seconds=0.5))

    @pytest.mark.parametrize(
        ("unread", "is_cut"),
        [
            (itertools.repeat(9_000), True),
            (itertools.chain(range(900, 0, -100), itertools.repeat(0)), False),
        ],
        ids=["nobody reads", "read slowly"],
    )
    def test_replies_that_nobody_reads_end_and_slow_readers_get_them_whole(
        self, monkeypatch: pytest.MonkeyPatch, unread: Iterator[int], is_cut: bool
    ) -> None:
        monkeypatch.setattr(server, "_IDLE_SECONDS", 0.01)

        async def answered() -> Wire:
            wire = Wire()
            wire.unread = unread
            await _close_of(wire, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", seconds=0.0)
            return wire

        wire = asyncio.run(answered())
        assert wire.aborted == is_cut
        assert next(unread) == (9_000 if is_cut else 0)  # only then it was closed

    def test_what_tls_has_not_sent_is_unread_too(self) -> None:
        above, below = Wire(), Wire()
        above.unread, below.unread = itertools.repeat(3), itertools.repeat(40)
        above._ssl_protocol = SimpleNamespace(_transport=below)  # type: ignore[attr-defined]
        assert server._unread_bytes(above) == 43


class Wire(asyncio.Transport):
    """What a connection writes to; no socket, so that nothing comes late."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = asyncio.Event()
        self.aborted = False
        self.unread: Iterator[int] = itertools.repeat(0)

    def get_write_buffer_size(self) -> int:
        return next(self.unread)

    def abort(self) -> None:
        self.aborted = True
        self.closed.set()

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def close(self) -> None:
        self.closed.set()

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def _until_closed(sent: bytes, seconds: float) -> bytes:
    """What a connection gives until the server closes it.

    Args:
        seconds: that a reply takes.
    """
    wire = Wire()
    await _close_of(wire, sent, seconds)
    return wire.written


async def _close_of(wire: Wire, sent: bytes, seconds: float) -> None:
    async def reply(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(seconds)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    config = uvicorn.Config(
        reply, lifespan="off", ws="none", log_config=None, timeout_keep_alive=3_600
    )
    connection = server.Connection(config, ServerState(), {})
    connection.connection_made(wire)
    connection.data_received(sent)
    async with asyncio.timeout(60):  # only there to end a broken test
        await wire.closed.wait()
    connection.connection_lost(None)


def test_the_schema_is_closed_to_what_it_does_not_know(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    requests = {name: schema for name, schema in schemas.items() if name.endswith("Request")}
    assert len(requests) >= 6
    for name, schema in requests.items():
        assert schema["additionalProperties"] is False, name
        assert "trust" not in json.dumps(schema).lower(), name
