"""PostgreSQL is restarted while a search runs: the search says so, and goes on when it is run again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from autoq.testing.postgresql import NoServerError, Server, postgresql_server
from tests.faults.commands import (
    Commands,
    Ended,
    content_of,
    differences,
    small_search,
    store_in,
    tally,
)

pytestmark = pytest.mark.slow

_STAGES = ("calibration", "sensitivity", "measure", "export")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg")
    try:
        with postgresql_server() as started:
            if started.restart is None:
                pytest.skip("the server that is named is not ours to restart")
            yield started
    except NoServerError as error:
        pytest.skip(str(error))


def test_a_search_goes_on_after_restarts(
    server: Server,
    model: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
    tmp_path: Path,
) -> None:
    command = [*small_search(model, tmp_path), "--store", server.url]
    interrupted = 0
    for stage in _STAGES:
        running = commands.start(*command)
        _wait_until_begun(server.url, stage)
        assert server.restart is not None
        server.restart()
        ended = commands.wait(running)
        if ended.code == 0:
            continue  # it had nothing left to write, or not asked since
        interrupted += 1
        assert ended.code == 2, ended.err
        assert ended.err.strip().splitlines()[-1].startswith("error: study store postgresql")
    again = commands.run(*command)
    assert again.code == 0, again.err
    assert interrupted > 0
    _bring_to_a_file(commands, server.url, tmp_path)
    found = content_of(tmp_path)
    assert differences(_portable(found), _portable(undisturbed[1])) == []
    tally("restarts of PostgreSQL", {"restarts": len(_STAGES), "interrupted": interrupted})


def _wait_until_begun(url: str, stage: str) -> None:
    """Until the study has the stage, or is done."""
    engine = sqlalchemy.create_engine(url)
    query = sqlalchemy.text("SELECT count(*) FROM stage WHERE name = :stage")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            with engine.begin() as connection:
                if connection.execute(query, {"stage": stage}).scalar():
                    break
        except sqlalchemy.exc.ProgrammingError:
            pass  # the tables are not there yet
        time.sleep(0.01)
    engine.dispose()


def _bring_to_a_file(commands: Commands, url: str, place: Path) -> None:
    """The study of the server in a SQLite store, by `autoq store export` and `import`."""
    file = str(place / "study.autoq")
    for arguments in (
        ("store", "export", "--store", url, "--output", file),
        ("store", "import", file, "--store", store_in(place)),
    ):
        ended = commands.run(*arguments)
        assert ended.code == 0, ended.err


def _portable(content: dict[str, Any]) -> dict[str, Any]:
    """Without the spelling of JSON columns, which databases choose."""
    kept = ("score_batch", "sensitivity", "measurement", "stored_array", "files", "blob")
    plain = {name: content[name] for name in kept}
    return {**plain, "stages": [(row["name"], row["status"]) for row in content["stage"]]}
