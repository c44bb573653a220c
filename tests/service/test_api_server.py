"""`autoq serve` as a process: what it takes, what it says, how it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from autoq.service.web.server import listening_socket
from autoq.studies import StudyStore
from autoq.testing.synthetic_study import add_synthetic_study

PATIENCE_SECONDS = 120.0
"""Only there to end a broken test: machines that run tests may be busy."""

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, timeout=PATIENCE_SECONDS, **options)


def post(url: str, **options: Any) -> httpx.Response:
    return httpx.post(url, timeout=PATIENCE_SECONDS, **options)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address and the process of a server on a store in the folder; killed at the end."""
    command = [sys.executable, "-m", "autoq", "serve", "--port", "0", *options]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "AUTOQ_STORE": f"sqlite:///{folder / 'store.db'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"https?://\S+", line)
        assert found, (line, process.stderr and process.stderr.read())
        yield found[0], process
    finally:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[int, str]:
    """Exit code and what was said on standard error, of a server that is told to end."""
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, said


def refusal(folder: Path, *options: str) -> str:
    """The line that a server ends with which cannot start."""
    done = subprocess.run(
        [sys.executable, "-m", "autoq", "serve", "--port", "0", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@ON_LINUX
def test_a_fresh_server_is_small_and_holds_no_torch(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "0") as (url, process):
        assert get(f"{url}/v1/health").status_code == 200
        with StudyStore.open(f"sqlite:///{tmp_path / 'store.db'}") as store:
            add_synthetic_study(store, groups=40, formats=4, name="one")
        for path in ("/v1/studies", "/v1/studies/one", "/v1/studies/one/report", "/v1/models"):
            assert get(f"{url}{path}").status_code == 200
        plan = post(f"{url}/v1/studies/one/plans", json={"effective_bits": 6.0})
        assert plan.status_code == 200
        body = {"model": "bundled", "calibration": "awq", "name": "two"}
        assert post(f"{url}/v1/studies", json=body).status_code == 202
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        status = Path(f"/proc/{process.pid}/status").read_text()
    libraries = {line.split()[-1] for line in maps.splitlines() if ".so" in line}
    assert any("_ssl" in name or "libssl" in name or "numpy" in name for name in libraries)
    for unwanted in ("torch", "transformers", "optuna", "matplotlib", "tokenizers", "pyarrow"):
        assert not [name for name in libraries if f"/{unwanted}/" in name], unwanted
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident
    assert int(resident[1]) < 200_000


def test_it_says_where_it_is_and_ends_when_told(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "0") as (url, process):
        get(f"{url}/v1/jobs", params={"study": "topsecret"})
        code, said = ended(process)
    assert code == 0
    assert "Ctrl-C ends it" in said
    assert "without a token" in said
    assert "GET /v1/jobs 200" in said
    assert "topsecret" not in said  # queries are not logged
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("the service has ended")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_bodies_do_not_wait_for_acknowledgements_of_headers(host: str) -> None:
    with (
        listening_socket(host, 0) as listening,
        socket.create_connection(listening.getsockname()[:2]),
        listening.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_streams_end_with_the_server_and_go_on_with_the_next(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "0") as (url, process):
        job = post(f"{url}/v1/verifications", json={"checkpoint": "bundled"}).json()["id"]
        heard: list[str] = []
        opened = threading.Event()

        def listen() -> None:
            with httpx.stream(
                "GET", f"{url}/v1/jobs/{job}/events", timeout=PATIENCE_SECONDS
            ) as stream:
                for line in stream.iter_lines():
                    heard.append(line)
                    if line.startswith("id: "):
                        opened.set()

        listener = threading.Thread(target=listen)
        listener.start()
        assert opened.wait(PATIENCE_SECONDS)
        code, said = ended(process, signal.SIGTERM)
        listener.join(PATIENCE_SECONDS)
        assert not listener.is_alive()
    assert (code, "Traceback" in said) == (0, False)
    last = max(int(line.removeprefix("id: ")) for line in heard if line.startswith("id: "))
    with serving(tmp_path, "--workers", "0") as (url, _):
        cancelled = post(f"{url}/v1/jobs/{job}/cancel", json={})
        assert cancelled.status_code == 202
        headers = {"last-event-id": str(last)}
        text = httpx.get(
            f"{url}/v1/jobs/{job}/events", headers=headers, timeout=PATIENCE_SECONDS
        ).text
    assert text.count("event: status") == 1
    assert '"cancelled"' in text


def test_a_job_runs_in_a_worker_of_its_own(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, process):
        job = post(f"{url}/v1/verifications", json={"checkpoint": "bundled"}).json()["id"]
        with httpx.stream("GET", f"{url}/v1/jobs/{job}/events", timeout=PATIENCE_SECONDS) as stream:
            lines = list(stream.iter_lines())
        found = get(f"{url}/v1/jobs/{job}").json()
        # The bundled model is no checkpoint of autoq's; the command line says the same.
        assert found["status"] == "failed", found
        assert found["problem"]["type"] == "urn:autoq:problem:export"
        assert "there is nothing to verify" in found["problem"]["detail"]
        assert any('"running"' in line for line in lines)
        code, said = ended(process)
    assert (code, "Traceback" in said) == (0, False)


def test_what_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refusal(tmp_path, "--port", str(port))
    (tmp_path / "text.db").write_text("no database at all, and longer than a header of one" * 9)
    assert "text.db" in refusal(tmp_path, "--store", f"sqlite:///{tmp_path / 'text.db'}")
    assert "--models takes folders" in refusal(tmp_path, "--models", "nowhere")
    assert "needs tokens" in refusal(tmp_path, "--host", "0.0.0.0")
    assert "in memory" in refusal(tmp_path, "--store", "sqlite:///:memory:")
    assert "give both" in refusal(tmp_path, "--tls-cert", "a.pem")
    addresses = ("javascript:alert(1)", "https://ada:secret@optuna.example", "http://[::1")
    for address in addresses:
        said = refusal(tmp_path, "--dashboard-url", address)
        assert "http or https address" in said
        assert "secret" not in said


def test_the_page_learns_where_the_dashboard_is(tmp_path: Path) -> None:
    address = "http://127.0.0.1:8080"
    shouted = address.replace("http", "HTTP")
    with serving(tmp_path, "--workers", "0", "--dashboard-url", shouted) as (url, _):
        assert get(f"{url}/v1/me").json()["dashboard"] == address


def test_a_store_of_a_newer_version_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "newer.db"
    StudyStore.open(f"sqlite:///{file}").close()
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE autoq_alembic_version SET version_num = '9999'")
    connection.close()
    assert "newer" in refusal(tmp_path, "--store", f"sqlite:///{file}")


def test_https_answers_with_the_given_certificate(tmp_path: Path) -> None:
    made = (
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", "key.pem", "-out", "cert.pem"),
            ],
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        if shutil.which("openssl")
        else None
    )
    if made is None or made.returncode:
        pytest.skip("openssl makes no certificate here")
    options = ("--tls-cert", "cert.pem", "--tls-key", "key.pem", "--workers", "0")
    with serving(tmp_path, *options) as (url, _):
        assert url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        assert get(f"{url}/v1/health", verify=trusting).status_code == 200
