"""A search whose database goes away in the middle of a transaction says so, and can be continued."""

from __future__ import annotations

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
from tests.faults.cuts import AT_COMMIT, AT_STATEMENT, cut

_NEVER = 0


@pytest.fixture(scope="module")
def transactions(model: Path, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many write transactions the search has."""
    place = tmp_path_factory.mktemp("counted")
    counted = place / "count"
    ended = commands.run(*small_search(model, place), **cut(_NEVER, AT_COMMIT, counted))
    assert ended.code == 0, ended.err
    return int(counted.read_text())


@pytest.mark.parametrize(
    "step", [pytest.param(22, id="some"), pytest.param(1, id="every", marks=pytest.mark.slow)]
)
def test_a_transaction_that_is_cut_leaves_nothing_and_is_made_again(
    step: int,
    transactions: int,
    model: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
    tmp_path: Path,
) -> None:
    cuts = range(1, transactions + 1, step)
    for number in cuts:
        place = tmp_path / f"study{number}"
        place.mkdir()
        where = (AT_STATEMENT, AT_COMMIT)[number // step % 2]
        command = small_search(model, place)
        ended = commands.run(*command, **cut(number, where, tmp_path / "count"))
        if int((tmp_path / "count").read_text()) < number:
            continue  # the one that was counted took longer, and renewed its lease in between
        said = ended.err.strip().splitlines()[-1]
        if ended.code == 0:  # all was done: the lease ends with the process
            assert said.startswith("the lease was not given back: study store"), (number, said)
        else:
            assert ended.code == 2, (number, where, ended.err)
            assert said.startswith("error: study store"), said
        assert str(place / "autoq.db") in said
        again = commands.run(*command)
        assert again.code == 0, again.err
        assert differences(content_of(place), undisturbed[1]) == [], (number, where)
        checked = commands.run("store", "check", "--store", store_in(place))
        assert checked.code == 0, checked.out
    tally("cut transactions", {"of": transactions, "cut": len(cuts), "losses": 0})
