from __future__ import annotations

import os
import sys

import pytest

from autoq.cli import _progress
from autoq.cli._output import plain, results_kept_clean, write_text


def test_line_progress_writes_now_and_then_with_an_estimate(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 30.0, 40.0])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    with _progress.LineProgress().task("scoring", 4) as advance:
        advance()
        advance()
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 2 of 4, 30.00 s, about 30.00 s left",
        "scoring: 2 of 4, 40.00 s",
    ]


def test_before_the_first_step_is_done_nothing_is_known_of_the_rest(capsys, monkeypatch):
    """A trial of a refinement advances by none, batch by batch, until it ends."""
    clock = iter([0.0, 30.0, 40.0])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    with _progress.LineProgress().task("refining", 4) as advance:
        advance(0)
    assert capsys.readouterr().err.splitlines()[0] == "refining: 0 of 4, 30.00 s"


def test_bars_show_stage_count_and_time_and_end_with_the_work(capsys):
    progress = _progress.BarProgress()
    with progress.task("calibrating [x]", 3) as advance:
        advance(3)
    with progress.task("exporting", 0) as advance:
        advance()
    text = capsys.readouterr().err
    assert "calibrating [x]" in text
    assert "3/3" in text
    assert "1/1" in text


def test_bars_end_when_the_work_fails(capsys):
    progress = _progress.BarProgress()
    with pytest.raises(ValueError, match="broken"), progress.task("scoring", 3):
        raise ValueError("broken")
    with progress.task("scoring again", 1) as advance:
        advance()
    assert "scoring again" in capsys.readouterr().err


def test_notes_keep_brackets_and_long_lines_whole(capsys):
    text = "loads in [vLLM] " + "only " * 60 + "end"
    _progress.QuietProgress().note(text)
    assert capsys.readouterr().err == f"note: {text}\n"


def test_native_output_is_kept_off_standard_output(capfd):
    with results_kept_clean():
        print("python")
        os.write(1, b"native\n")
    print("result")
    sys.stdout.flush()
    found = capfd.readouterr()
    assert found.out == "result\n"
    assert "python" in found.err
    assert "native" in found.err


def test_plain_turns_arrays_and_infinities_into_json():
    import numpy as np

    assert plain({"a": np.float64("nan"), "b": (np.int64(3), float("inf")), 4: np.bool_(True)}) == {
        "a": None,
        "b": [3, None],
        "4": True,
    }


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]
