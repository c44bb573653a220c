"""A search that is killed at random instants, again and again, ends with the bits of one that is not."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults import block_kills
from tests.faults.commands import (
    Commands,
    Ended,
    content_of,
    differences,
    small_search,
    store_in,
    tally,
)

STREAMED = ("--max-memory", "700MB")
PROCESSES = ("--devices", "2")

_CASES = [
    pytest.param(4, (), 1, id="in_memory"),
    pytest.param(2, STREAMED, 2, id="streamed"),
    pytest.param(80, (), 3, id="in_memory_many", marks=pytest.mark.slow),
    pytest.param(15, STREAMED, 4, id="streamed_many", marks=pytest.mark.slow),
    pytest.param(5, PROCESSES, 5, id="processes", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kills", "more", "seed"), _CASES)
def test_a_killed_search_ends_with_the_same_bits(
    kills: int,
    more: tuple[str, ...],
    seed: int,
    model: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
    tmp_path: Path,
) -> None:
    instants = random.Random(seed)
    struck: Counter[str] = Counter()
    studies = 0
    while struck.total() < kills:
        place = tmp_path / f"study{studies}"
        place.mkdir()
        struck += _kill_until_it_ends(
            kills - struck.total(), place, model, commands, undisturbed[0], more, instants
        )
        assert differences(content_of(place), undisturbed[1]) == []
        _assert_nothing_is_left_over(place, commands)
        studies += 1
    tally(f"kills{more}", {"kills": struck.total(), "studies": studies, "struck": dict(struck)})


def test_a_search_that_is_killed_between_blocks_goes_on_there(
    model: Path, commands: Commands, undisturbed: tuple[Ended, dict[str, Any]], tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = small_search(model, tmp_path, *STREAMED)
    for _ in range(2):  # the model's blocks
        fault = block_kills.after(1)
        fault["environment"]["TMPDIR"] = str(temporary)
        assert commands.run(*command, **fault).was_killed
        assert _stage_at_work(tmp_path) == "calibration"

    ended = commands.run(*command, environment={"TMPDIR": str(temporary)})

    assert ended.code == 0, ended.err
    assert "calibration taken up behind block 2 of 2, the last" in ended.out + ended.err
    assert differences(content_of(tmp_path), undisturbed[1]) == []
    _assert_nothing_is_left_over(tmp_path, commands)


def _kill_until_it_ends(
    most: int,
    place: Path,
    model: Path,
    commands: Commands,
    undisturbed: Ended,
    more: tuple[str, ...],
    instants: random.Random,
) -> Counter[str]:
    """Kill the search, so often at most, until it ends before that; returns the stages that were struck."""
    struck: Counter[str] = Counter()
    temporary = place / "temporary"
    temporary.mkdir()
    command = small_search(model, place, *more)
    while True:
        spared = struck.total() == most
        instant = None if spared else instants.uniform(0, undisturbed.seconds)
        ended = commands.run(*command, kill_after=instant, environment={"TMPDIR": str(temporary)})
        if not ended.was_killed:
            assert ended.code == 0, ended.err
            return struck
        struck[_stage_at_work(place)] += 1


def _stage_at_work(place: Path) -> str:
    """The stage that a killed search was in, looked up in a copy: reading would mend the store."""
    copy = place / "copy"
    copy.mkdir()
    for path in place.glob("autoq.db*"):
        shutil.copy(path, copy)
    try:
        with sqlite3.connect(copy / "autoq.db") as connection:
            rows = connection.execute("SELECT name, status FROM stage ORDER BY id").fetchall()
    except sqlite3.OperationalError:
        return "opening"
    finally:
        shutil.rmtree(copy)
    running = [name for name, status in rows if status == "running"]
    return running[0] if running else f"after {rows[-1][0]}" if rows else "opening"


def _assert_nothing_is_left_over(place: Path, commands: Commands) -> None:
    """The store is sound, and beside it there is the checkpoint, and no folder that is temporary."""
    assert list((place / "temporary").iterdir()) == []
    (place / "temporary").rmdir()
    assert sorted(path.name for path in place.iterdir()) == ["autoq.db", "checkpoint"]
    checked = commands.run("store", "check", "--store", store_in(place))
    assert (checked.code, checked.err) == (0, ""), checked.out
