"""Two processes that are given the same search at once: one works, the other waits or says so."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.faults.commands import (
    Commands,
    Ended,
    content_of,
    differences,
    small_search,
    store_in,
    tally,
)


def test_the_second_waits_or_says_that_the_first_works(
    model: Path, commands: Commands, undisturbed: tuple[Ended, dict[str, Any]], tmp_path: Path
) -> None:
    command = small_search(model, tmp_path)
    working = [commands.start(*command, "--wait", "300") for _ in range(2)]
    hasty = commands.run(*command)
    ended = [commands.wait(pid) for pid in working]
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    if hasty.code != 0:  # else it came first, or last
        assert hasty.code == 2
        assert "one process at a time works on a study" in hasty.err
    assert differences(content_of(tmp_path), undisturbed[1]) == []


@pytest.mark.parametrize(
    ("races", "seed"),
    [pytest.param(1, 1, id="one"), pytest.param(10, 2, id="ten", marks=pytest.mark.slow)],
)
def test_the_second_takes_over_when_the_first_is_killed(
    races: int,
    seed: int,
    model: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
    tmp_path: Path,
) -> None:
    instants = random.Random(seed)
    killed = 0
    for number in range(races):
        place = tmp_path / f"study{number}"
        place.mkdir()
        command = small_search(model, place, "--wait", "300")
        first, second = commands.start(*command), commands.start(*command)
        instant = instants.uniform(0.2, 0.9) * undisturbed[0].seconds
        killed += commands.wait(first, kill_after=instant).was_killed
        ended = commands.wait(second)
        assert ended.code == 0, ended.err
        assert differences(content_of(place), undisturbed[1]) == []
        checked = commands.run("store", "check", "--store", store_in(place))
        assert checked.code == 0, checked.out
    tally("races", {"races": races, "killed": killed, "losses": 0})
