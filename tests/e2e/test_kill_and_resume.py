"""The real command, killed for real."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autoq.testing.tiny_models import write_tiny_model

STARTUP_LIMIT_SECONDS = 120.0


def command(model: Path, store: Path) -> list[str]:
    return [
        *(sys.executable, "-c", "from autoq.cli import main; main()"),
        *("search", str(model), "--bits", "6"),
        *("--calib-sequences", "120", "--sequence-length", "128", "--batch-size", "1"),
        *("--store", f"sqlite:///{store}", "--json"),
    ]


def stored_scores(store: Path) -> list[tuple[int, bytes]]:
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
        query = "select batch_index, data from score_batch order by batch_index"
        return connection.execute(query).fetchall()


def kill_while_scoring(arguments: list[str], store: Path) -> int:
    """Start the command, kill it once it has stored some batches, and return how many."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + STARTUP_LIMIT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            scored = len(stored_scores(store))
        except sqlite3.OperationalError:  # not created yet
            scored = 0
        if scored >= 3:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the search ended before it could be killed"
    return len(stored_scores(store))


def run(arguments: list[str]) -> dict[str, Any]:
    finished = subprocess.run(arguments, capture_output=True, text=True, check=True)
    summary: dict[str, Any] = json.loads(finished.stdout)
    return summary


@pytest.mark.slow
def test_a_killed_search_continues_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    model = write_tiny_model("llama", tmp_path / "model")
    killed, whole = tmp_path / "killed.db", tmp_path / "whole.db"
    scored = kill_while_scoring(command(model, killed), killed)
    assert 3 <= scored < 120
    continued, uninterrupted = run(command(model, killed)), run(command(model, whole))
    assert stored_scores(killed) == stored_scores(whole)
    for key in ("assignment", "predicted_loss", "bound", "measured"):
        assert continued[key] == uninterrupted[key], key
