"""What the client asks, how often, and what it never shows."""

from __future__ import annotations

import subprocess
import sys

import pytest

import autoq
from autoq.client import UnreachableError
from autoq.errors import AutoqError, InputError, StoreError
from autoq.testing.scripted_server import Answer, job

SECRET = "autoq_0123456789abcdef"
BUSY = {"type": "urn:autoq:problem:store", "title": "t", "status": 503, "detail": "no store"}
MANY = {
    "type": "urn:autoq:problem:too-many-requests",
    "title": "t",
    "status": 429,
    "detail": "slow",
}
ME = {"name": "ada", "scope": "run", "authentication": True, "version": "1"}


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses between attempts, which are recorded and not made."""
    made = []
    monkeypatch.setattr("autoq.client._transport.time.sleep", made.append)
    return made


def test_what_is_safe_is_asked_again_while_the_server_is_busy(server, pauses):
    server.answers = [Answer(503, BUSY), Answer(hangs_up=True), Answer(200, ME)]
    with autoq.Client(server.url) as client:
        assert client.me().name == "ada"
    assert [asked.path for asked in server.asked] == ["/v1/me"] * 3
    assert pauses == [0.25, 0.5]


def test_the_server_says_how_long_to_wait(server, pauses):
    server.answers = [Answer(429, MANY, {"Retry-After": "7"}), Answer(200, ME)]
    with autoq.Client(server.url) as client:
        client.me()
    assert pauses == [7.0]


def test_a_wait_of_minutes_is_for_the_caller_to_decide(server, pauses):
    server.answers = [Answer(429, MANY, {"Retry-After": "600"})]
    with autoq.Client(server.url) as client, pytest.raises(AutoqError, match=r"^slow$"):
        client.me()
    assert pauses == []


def test_retries_are_as_many_as_asked_for(server):
    server.route = lambda asked: Answer(503, BUSY)
    with autoq.Client(server.url, retries=2) as client, pytest.raises(StoreError, match="no store"):
        client.me()
    assert len(server.asked) == 3


def test_other_refusals_are_not_asked_again(server):
    body = {"type": "urn:autoq:problem:forbidden", "title": "t", "status": 403, "detail": "no"}
    server.answers = [Answer(403, body)]
    with autoq.Client(server.url) as client, pytest.raises(InputError):
        client.me()
    assert len(server.asked) == 1


def test_all_attempts_of_a_search_have_one_key_and_other_searches_others(server):
    server.answers = [Answer(hangs_up=True), Answer(202, job()), Answer(202, job())]
    with autoq.Client(server.url) as client:
        assert client.search("bundled", effective_bits=5.0).id == "j1"
        client.search("bundled", effective_bits=5.0)
    first, second, other = (asked.headers["Idempotency-Key"] for asked in server.asked)
    assert first == second != other
    assert server.asked[0].body == {"model": "bundled", "effective_bits": 5.0}


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.cancel("j1"),
        lambda client: client.resume("j1"),
        lambda client: client.delete("s"),
        lambda client: client.plan("s", effective_bits=5, keep=True),
    ],
)
def test_what_does_something_is_asked_once(server, ask):
    server.route = lambda asked: Answer(hangs_up=True)
    with autoq.Client(server.url) as client, pytest.raises(UnreachableError):
        ask(client)
    assert len(server.asked) == 1


def test_pages_are_followed_to_their_end_or_to_the_limit(server):
    def page(asked):
        start = int(asked.path.split("cursor=")[1].split("&")[0]) if "cursor=" in asked.path else 0
        limit = int(asked.path.split("limit=")[1].split("&")[0])
        items = [job(id=f"j{number}") for number in range(start, min(start + limit, 450))]
        end = start + limit
        return Answer(200, {"items": items, "next_cursor": str(end) if end < 450 else None})

    server.route = page
    with autoq.Client(server.url) as client:
        everything = [handle.id for handle in client.jobs(status="done")]
        assert everything == [f"j{number}" for number in range(450)]
        assert [handle.id for handle in client.jobs(limit=3)] == ["j0", "j1", "j2"]
    assert [asked.path for asked in server.asked][:3] == [
        "/v1/jobs?status=done&limit=200",
        "/v1/jobs?status=done&limit=200&cursor=200",
        "/v1/jobs?status=done&limit=200&cursor=400",
    ]
    assert [asked.path for asked in server.asked][3:] == ["/v1/jobs?limit=3"]


def test_names_of_studies_are_quoted(server):
    server.answers = [Answer(200, {})]
    with autoq.Client(server.url) as client:
        client.summary("a/b c?d", plan=5)
    assert server.asked[0].path == "/v1/studies/a%2Fb%20c%3Fd/summary?plan=5"


def test_replies_of_something_else_are_said_to_be_none(server):
    server.answers = [Answer(200, {"hello": "world"}), Answer(503, {"hello": "world"})]
    with autoq.Client(server.url) as client:
        for ask in (client.me, client.ready):
            with pytest.raises(UnreachableError, match="none that this client reads"):
                ask()


def test_a_folder_before_the_service_is_kept(server):
    server.answers = [Answer(200, ME)]
    with autoq.Client(f"{server.url}/tools/autoq/") as client:
        client.me()
    assert server.asked[0].path == "/tools/autoq/v1/me"


def test_the_token_is_sent_and_never_shown(server, monkeypatch):
    monkeypatch.setenv("AUTOQ_TOKEN", f"{SECRET}\n")  # as a file has it
    server.answers = [Answer(200, ME), Answer(502, "x"), Answer(hangs_up=True)]
    with autoq.Client(server.url, retries=0) as client:
        client.me()
        assert server.asked[0].headers["Authorization"] == f"Bearer {SECRET}"
        said = [repr(client), repr(client.transport), str(vars(client))]
        for _ in range(2):
            with pytest.raises(UnreachableError) as caught:
                client.me()
            said.append(repr(caught.value))
    assert not any(SECRET in text for text in said)


def test_a_token_that_cannot_be_one_is_refused_without_showing_it(server):
    with pytest.raises(InputError) as caught:
        autoq.Client(server.url, token="two words")
    assert "two words" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"])
def test_loopback_needs_no_encryption(url, recwarn):
    autoq.Client(url, token=SECRET).close()
    assert not recwarn.list


def test_a_token_over_a_network_in_the_clear_warns_where_the_client_is_made():
    with pytest.warns(UserWarning, match=r"goes to autoq\.example unencrypted") as caught:
        autoq.Client("http://autoq.example:8731", token=SECRET).close()
    assert caught[0].filename == __file__
    assert SECRET not in str(caught[0].message)


def test_https_or_no_token_does_not_warn(recwarn):
    autoq.Client("https://autoq.example", token=SECRET).close()
    autoq.Client("http://autoq.example").close()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("127.0.0.1:8731", "begins with http"),
        ("ftp://host", "begins with http"),
        ("http://", "begins with http"),
        ("http://user:secret@host", "neither user nor password"),
        ("http://host/?token=x", "ends with its host"),
    ],
)
def test_what_is_no_server_is_refused(url, said):
    with pytest.raises(InputError, match=said) as caught:
        autoq.Client(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(InputError):
        autoq.Client("http://127.0.0.1:1", **arguments)


def test_the_client_loads_neither_torch_nor_the_service():
    script = (
        "import sys, autoq; autoq.Client('http://127.0.0.1:1'); "
        "heavy = {'torch', 'transformers', 'optuna', 'fastapi', 'sqlalchemy', 'numpy'}; "
        "sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
