"""Every example of docs/service.md runs, in the order of the document, in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from autoq.cli import app

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "service.md"
PORTS = ("8731", "8732")
SECONDS = 900.0

_BLOCK = re.compile(r"^```(sh background|sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

_START = """
{command} 2>>server.log & servers+=($!)
for attempt in $(seq 300); do curl -sf http://127.0.0.1:{port}/v1/health && break; sleep 0.2; done
curl -sf http://127.0.0.1:{port}/v1/health
"""


def script(text: str) -> str:
    """All examples as one program, which ends with the first one that fails."""
    parts = ["set -euo pipefail; servers=(); trap 'kill \"${servers[@]}\"; wait' EXIT"]
    for match in _BLOCK.finditer(text):
        kind, content = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        parts.append(f"echo; echo '=== line {line}'")
        if kind == "sh":
            parts.append(content)
        elif kind == "python":
            parts.append(f"python - <<'END'\n{content}END")
        else:
            port = re.search(r"--port (\d+)", content)
            assert port is not None, "a server in the background names its port"
            parts.append(_START.format(command=content.strip(), port=port[1]))
    return "\n".join(parts)


def free_ports(count: int) -> list[int]:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    return ports


def test_commands_and_options_of_the_document_exist():
    import typer

    text = DOCUMENT.read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name in set(re.findall(r"(?:^|[`(]|    )autoq ([a-z]+)\b", text, re.MULTILINE)):
        assert name in commands, name
    options = {option for command in commands.values() for p in command.params for option in p.opts}
    table = text[text.index("| Option | |") : text.index("A path in a request")]
    for option in re.findall(r"(--[a-z][a-z-]*)", table):
        assert option in options, option


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_example_runs(tmp_path):
    program = script(DOCUMENT.read_text(encoding="utf-8"))
    for port, free in zip(PORTS, free_ports(len(PORTS)), strict=True):
        program = program.replace(port, str(free))
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("AUTOQ_")
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    environment["NO_PROXY"] = environment["no_proxy"] = "127.0.0.1"
    running = subprocess.Popen(
        ["bash", "-c", program],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = running.communicate(timeout=SECONDS)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, said[-3000:]
    for expected in (
        "study: first in http://127.0.0.1:",
        "(modelopt, ",
        '"urn:autoq:problem:budget-infeasible"',
        '"urn:autoq:problem:unauthorized"',
        '"name":"ada"',
        'autoq_jobs{status="done"}',
        "event: status",
        "report: first.html",
        "revoked grafana",
    ):
        assert expected in said, expected
    assert (tmp_path / "exports" / "third" / "config.json").is_file()
