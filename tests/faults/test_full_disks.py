"""A disk that is full at some point of a search is named, and the search goes on when it is not."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoq.cli._output import write_text
from tests.faults.commands import (
    Commands,
    Ended,
    content_of,
    differences,
    small_search,
    tally,
)

KIB = 1 << 10


@pytest.mark.parametrize(
    "limits_kib",
    [
        pytest.param((48, 200), id="some"),
        pytest.param(
            (2, 8, 33, 64, 100, 140, 180, 240, 300, 360), id="many", marks=pytest.mark.slow
        ),
    ],
)
def test_files_that_cannot_grow(
    limits_kib: tuple[int, ...],
    model: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
    tmp_path: Path,
) -> None:
    refused = 0
    for limit in limits_kib:
        place = tmp_path / f"limit{limit}"
        place.mkdir()
        command = small_search(model, place)
        ended = commands.run(*command, most_file_bytes=limit * KIB)
        refused += ended.code != 0
        _assert_refused_or_whole(ended, place)
        _assert_goes_on(command, commands, place, undisturbed[1])
    assert refused > 0
    tally("files that cannot grow", {"limits": len(limits_kib), "refused": refused, "losses": 0})


def test_a_report_that_does_not_fit_is_named_and_not_there(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (KIB, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write_text(report, "x" * 2 * KIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(report)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "autoq", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "sizes_kib",
    [
        pytest.param((300,), id="some"),
        pytest.param((64, 128, 400, 500, 700, 850), id="many", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full(
    sizes_kib: tuple[int, ...],
    small_disk: Path,
    model: Path,
    commands: Commands,
    undisturbed: tuple[Ended, dict[str, Any]],
) -> None:
    refused = 0
    for size in sizes_kib:
        place = small_disk / f"size{size}"
        place.mkdir()
        command = small_search(model, place)
        _resize(small_disk, f"{size}k")
        ended = commands.run(*command)
        refused += ended.code != 0
        _assert_refused_or_whole(ended, place)
        _resize(small_disk, "64m")
        _assert_goes_on(command, commands, place, undisturbed[1])
        for path in sorted(place.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    assert refused > 0
    tally("full disks", {"sizes": len(sizes_kib), "refused": refused, "losses": 0})


def _resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def _assert_refused_or_whole(ended: Ended, place: Path) -> None:
    """One sentence that names the place and exit code 2, or a search that had room enough."""
    left = {path.name for path in place.iterdir()}
    assert left <= {"autoq.db", "autoq.db-wal", "autoq.db-shm", "checkpoint"}
    if ended.code == 0:
        return
    assert ended.code == 2, ended.err
    last = ended.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and str(place) in last, ended.err
    assert "Traceback" not in ended.err
    assert "checkpoint" not in left


def _assert_goes_on(
    command: list[str], commands: Commands, place: Path, expected: dict[str, Any]
) -> None:
    again = commands.run(*command)
    assert again.code == 0, again.err
    assert differences(content_of(place), expected) == []
