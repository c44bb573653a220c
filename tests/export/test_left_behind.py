"""What killed exports left beside their destination, and what loading prints."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch

from autoq.api.exports.compressing import compress
from autoq.errors import ExportError
from autoq.export import _folder as folder_module
from autoq.export import check_destination, verify_logits
from autoq.export._folder import written_folder
from autoq.testing.tiny_models import write_tiny_model

DEAD = 2**22 + 1  # no process has a number above 2**22


def moved_away(destination: Path, pid: int, text: str) -> Path:
    """The checkpoint that was at the destination, as an export renames it before the second rename."""
    former = destination.with_name(
        f".{destination.name}.{socket.gethostname()}.{pid}.0123abcd.former"
    )
    former.mkdir()
    (former / "config.json").write_text(text)
    return former


def write(destination: Path, text: str, *, overwrite: bool) -> None:
    with written_folder(destination, overwrite=overwrite) as folder:
        (folder / "config.json").write_text(text)


def test_a_checkpoint_that_a_killed_export_moved_away_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    moved_away(out, DEAD, "old")

    with pytest.raises(ExportError, match="must be new"):
        check_destination(out, overwrite=False)

    assert (out / "config.json").read_text() == "old"
    write(out, "new", overwrite=True)
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_it_does_not_replace_what_is_there_and_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, "new", overwrite=False)
    moved_away(out, DEAD, "old")

    write(out, "newer", overwrite=True)

    assert (out / "config.json").read_text() == "newer"
    assert list(tmp_path.iterdir()) == [out]


def test_that_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    former = moved_away(out, os.getpid(), "old")

    write(out, "new", overwrite=False)

    assert former.exists() and (out / "config.json").read_text() == "new"


def test_killed_between_both_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies after the first rename: neither its clean-up nor the second one runs."""
    out = tmp_path / "out"
    write(out, "old", overwrite=False)
    child = os.fork()
    if not child:
        rename = Path.rename

        def die_second(path: Path, target: Path) -> Path:
            if path.suffix == ".partial":
                os._exit(9)
            return rename(path, target)

        monkeypatch.setattr(folder_module.Path, "rename", die_second)
        write(out, "new", overwrite=True)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not out.exists()

    write(tmp_path / "out", "newest", overwrite=True)

    assert (out / "config.json").read_text() == "newest"
    assert list(tmp_path.iterdir()) == [out]


def test_loading_with_transformers_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    compress(write_tiny_model("llama", tmp_path / "model"), tmp_path / "out", fmt="fp8_pc_pt")
    capfd.readouterr()

    verify_logits(tmp_path / "out", torch.arange(12)[None])

    assert capfd.readouterr().err == ""
