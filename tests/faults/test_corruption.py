"""Bytes that change on the disk change no result: either nothing needs them, or what is damaged is named."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections import Counter
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

_MANY = pytest.mark.slow
_HASHED = {"blob_chunk": "data", "score_batch": "data", "plan": "assignment"}
"""Tables and their columns whose bytes have a hash in the store."""

_FAULTY = 4
"""Exit code of `autoq store check` where something is not as it was written."""

_REFUSED = 2
"""Exit code of a command that was told why it cannot do its work."""


@pytest.fixture(scope="module")
def searched(model: Path, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store and the checkpoint of a search; copy it to damage it."""
    place = tmp_path_factory.mktemp("searched")
    ended = commands.run(*small_search(model, place))
    assert ended.code == 0, ended.err
    content_of(place)  # whoever closes the store as the last one leaves one file
    return place


@pytest.mark.parametrize(
    ("pages", "seed"), [pytest.param(2, 1, id="few"), pytest.param(15, 2, id="many", marks=_MANY)]
)
def test_a_page_of_the_database_is_lost(
    pages: int,
    seed: int,
    model: Path,
    searched: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
    tmp_path: Path,
) -> None:
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for number in range(pages):
        place = tmp_path / f"study{number}"
        shutil.copytree(searched, place)
        _scramble_page(place / "autoq.db", chance)
        ended = commands.run(*small_search(model, place))
        outcomes[_outcome(ended, place, commands, undisturbed[1])] += 1
    tally("lost pages", {"pages": pages, **outcomes, "silent": 0})


@pytest.mark.parametrize(
    ("flips", "seed"), [pytest.param(2, 1, id="few"), pytest.param(15, 2, id="many", marks=_MANY)]
)
def test_a_byte_that_has_a_hash_is_flipped(
    flips: int,
    seed: int,
    model: Path,
    searched: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
    tmp_path: Path,
) -> None:
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for number in range(flips):
        place = tmp_path / f"study{number}"
        shutil.copytree(searched, place)
        table = list(_HASHED)[number % len(_HASHED)]
        _flip_value(place / "autoq.db", table, chance)
        checked = commands.run("store", "check", "--store", store_in(place))
        assert checked.code == _FAULTY, (table, checked.out)
        assert "damaged" in checked.out + checked.err
        if table != "plan":  # plans are checked when asked only
            ended = commands.run(*small_search(model, place))
            outcomes[_outcome(ended, place, commands, undisturbed[1])] += 1
    tally("flipped bytes", {"flips": flips, **outcomes, "silent": 0})


@pytest.mark.parametrize(
    ("flips", "seed"), [pytest.param(3, 1, id="few"), pytest.param(25, 2, id="many", marks=_MANY)]
)
def test_a_byte_anywhere_in_rows_and_indices_is_flipped(
    flips: int,
    seed: int,
    model: Path,
    searched: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
    tmp_path: Path,
) -> None:
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    expected = [_told(commands, searched, *command) for command in _LOOKS]
    for number in range(flips):
        place = tmp_path / f"study{number}"
        shutil.copytree(searched, place)
        _flip_in_a_tree(place / "autoq.db", chance)
        checked = commands.run("store", "check", "--store", store_in(place))
        outcomes["found by store check"] += checked.code in (_REFUSED, _FAULTY)
        for command, as_it_was in zip(_LOOKS, expected, strict=True):
            told = _told(commands, place, *command)
            if told != as_it_was:
                assert told[0] == _REFUSED, (command, told)
                assert "damaged" in told[1] or str(place) in told[1], (command, told)
            outcomes["looks named" if told != as_it_was else "looks unaffected"] += 1
        ended = commands.run(*small_search(model, place))
        outcomes[_outcome(ended, place, commands, undisturbed[1])] += 1
    assert outcomes["found by store check"] == flips
    tally("bytes flipped anywhere in rows", {"flips": flips, **outcomes, "silent": 0})


_LOOKS = (("show", "--json"), ("frontier", "--json"))
"""What a user asks of a study that is done."""


def _told(commands: Commands, place: Path, *command: str) -> tuple[int, str]:
    """A command's exit code and its answer, or where there is none its last words."""
    ended = commands.run(*command, "--store", store_in(place))
    return ended.code, ended.out or ended.err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_whose_bytes_changed_is_not_exported_as_the_one_that_was_searched(
    name: str, model: Path, searched: Path, commands: Commands, tmp_path: Path
) -> None:
    chance = random.Random(name)
    kept = (model / name).read_bytes()
    for position in (chance.randrange(8, 64), chance.randrange(len(kept) // 2, len(kept))):
        (model / name).write_bytes(_flipped(kept, position, chance))
        try:
            destination = str(tmp_path / "out")
            ended = commands.run("export", "--store", store_in(searched), destination)
        finally:
            (model / name).write_bytes(kept)
        assert ended.code == 2, ended.err
        assert str(model) in ended.err.strip().splitlines()[-1]
        assert not Path(destination).exists()


def _outcome(ended: Ended, place: Path, commands: Commands, expected: dict[str, Any]) -> str:
    """What became of a search on a damaged store; fails where its result silently differs."""
    if ended.code != 0:
        assert ended.code == 2, ended.err
        last = ended.err.strip().splitlines()[-1]
        assert last.startswith("error: "), last
        assert "damaged" in last or str(place / "autoq.db") in last, last
        return "named"
    assert differences(_files_of(place), {"files": expected["files"]}) == []
    try:
        found = content_of(place)
    except sqlite3.DatabaseError:
        found = {}
    if differences(found, expected) == []:
        return "unaffected"
    checked = commands.run("store", "check", "--store", store_in(place))
    assert checked.code == _FAULTY, differences(found, expected)
    return "unaffected, found by store check"


def _files_of(place: Path) -> dict[str, Any]:
    from tests.faults.commands import files_of

    return {"files": files_of(place / "checkpoint")}


def _scramble_page(path: Path, chance: random.Random) -> None:
    """Put noise in the place of a page, though not the first, without which it is no database."""
    size = 4096
    data = bytearray(path.read_bytes())
    start = size * chance.randrange(1, len(data) // size)
    data[start : start + size] = chance.randbytes(size)
    path.write_bytes(data)


def _flip_in_a_tree(path: Path, chance: random.Random) -> None:
    """Flip a bit of a page that holds rows or an index, in a byte that says something.

    Pages are of 4096 bytes, and the first says in its byte 100, others in their byte 0, what they
    are; pieces of arrays, which have hashes, are on pages of other kinds. Bytes of zero are mostly
    free room.
    """
    size, kinds = 4096, (2, 5, 10, 13)
    data = bytearray(path.read_bytes())
    kind_of = [data[page * size + (0 if page else 100)] for page in range(len(data) // size)]
    trees = [page for page, kind in enumerate(kind_of) if kind in kinds]
    while True:
        position = chance.choice(trees) * size + chance.randrange(size)
        if position > 100 and data[position]:
            break
    data[position] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _flip_value(path: Path, table: str, chance: random.Random) -> None:
    column = _HASHED[table]
    with sqlite3.connect(path) as connection:
        (rows,) = connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()
        row_id, value = connection.execute(
            f'SELECT id, {column} FROM "{table}" LIMIT 1 OFFSET {chance.randrange(rows)}'
        ).fetchone()
        data = value.encode() if isinstance(value, str) else value
        flipped: Any = _flipped(data, chance.randrange(len(data)), chance)
        if isinstance(value, str):  # another format: bytes of text rarely stay text
            flipped = value.replace("nvfp4", "fp8") if "nvfp4" in value else value.replace("8", "4")
        connection.execute(f'UPDATE "{table}" SET {column} = ? WHERE id = {row_id}', (flipped,))
    connection.close()


def _flipped(data: bytes, position: int, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << chance.randrange(8)
    return bytes(changed)
