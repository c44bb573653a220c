"""The dashboard's server: who is answered, which ports, and an end without a traceback."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from autoq.api.dashboards.server import DashboardServer, is_loopback, listening_server
from autoq.errors import InputError


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """Answers with the encoding that it was asked for."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["HTTP_ACCEPT_ENCODING"].encode()]


@pytest.fixture
def url() -> Iterator[str]:
    """Of a server on a free port of this machine."""
    with DashboardServer("127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve, args=(application,))
        thread.start()
        yield server.url.removesuffix("/dashboard")
        server.shutdown()
        thread.join(timeout=10)
        assert not thread.is_alive()


def answer(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, method=method)
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_loopback_is_this_machine_only(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_pages_of_this_machine_are_answered(url: str) -> None:
    assert answer(url)[0] == 200
    port = url.rpartition(":")[2]
    for host in (f"localhost:{port}", "localhost:9000", "[::1]:9000"):  # a forwarded port, too
        assert answer(url, Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "192.168.1.5:8080", "[", ""])
def test_a_name_that_somebody_points_at_this_machine_is_refused(url: str, host: str) -> None:
    assert answer(url, Host=host) == (403, b"the dashboard answers pages of this machine only\n")


def test_another_site_cannot_change_anything(url: str) -> None:
    own = url.removeprefix("http://")
    for method in ("POST", "PUT", "DELETE"):
        assert answer(url, method, Host=own, Origin="https://evil.example")[0] == 403
        assert answer(url, method, Host=own, Origin="null")[0] == 403
        assert answer(url, method, Host=own, Origin=url)[0] == 200
        assert answer(url, method, Host=own)[0] == 200  # programs send no origin


def test_requests_that_name_no_encoding_get_one(url: str) -> None:
    location = url.removeprefix("http://")
    host, port = location.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"GET / HTTP/1.0\r\nHost: {location}\r\n\r\n".encode())
        connection.settimeout(30)
        received = b"".join(iter(lambda: connection.recv(4096), b""))
    assert received.endswith(b"\r\n\r\nidentity")


def test_a_port_that_is_taken_is_named(url: str) -> None:
    port = int(url.rpartition(":")[2])
    with pytest.raises(InputError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*--port"):
        listening_server("127.0.0.1", port)


def test_without_a_port_another_one_is_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = int(url.rpartition(":")[2])
    monkeypatch.setattr("autoq.api.dashboards.server.DEFAULT_PORT", taken)
    with listening_server("127.0.0.1", None) as server:
        assert server.server_port not in (taken, 0)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="cannot listen on"):
        listening_server(host, 0)
