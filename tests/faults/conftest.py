"""A tiny model, commands that can be killed, and what a search gives that nothing disturbs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoq.testing.tiny_models import write_tiny_model
from tests.faults.commands import Commands, Ended, content_of, small_search


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def commands(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "warm").mkdir()
    started = Commands.begin(folder, *small_search(model, folder / "warm"))
    yield started
    started.end()


@pytest.fixture(scope="session")
def undisturbed(
    model: Path, commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Ended, dict[str, Any]]:
    """How the search ends when nothing happens to it, and all that it leaves."""
    place = tmp_path_factory.mktemp("undisturbed")
    ended = commands.run(*small_search(model, place))
    assert ended.code == 0, ended.err
    return ended, content_of(place)
