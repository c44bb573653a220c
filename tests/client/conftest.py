"""What the tests of the client share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from autoq.testing.scripted_server import ScriptedServer, scripted_server


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests do not depend on what the environment says of servers."""
    for name in ("AUTOQ_SERVER", "AUTOQ_TOKEN", "AUTOQ_STORE"):
        monkeypatch.delenv(name, raising=False)
