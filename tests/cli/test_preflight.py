"""`autoq search --dry-run`, and what every search says first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autoq.api import preflight
from autoq.api.preflight.cluster import Cluster, Machine
from autoq.cli import app
from autoq.cli._preflight import say_first
from autoq.testing.tiny_models import write_tiny_model

ARGUMENTS = [
    *("--bits", "6", "--formats", "fp8,nvfp4", "--calib-sequences", "4", "--sequence-length", "32"),
    *("--batch-size", "2", "--held-out-sequences", "2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_a_dry_run_estimates_and_searches_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "studies.db"
    arguments = ["search", str(folder), *ARGUMENTS, "--store", f"sqlite:///{store}", "--dry-run"]
    result = run(*arguments)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [
        "loading",
        "calibrating",
        "scoring",
        "measuring",
    ]
    assert lines[-1] == "it fits"
    assert not store.exists()

    monkeypatch.setattr(preflight.estimating, "available_bytes", lambda _: 1 << 20)
    result = run(*arguments)
    assert result.exit_code == 5
    assert "will not fit: " in result.stdout
    found = run(*arguments, "--json")
    assert found.exit_code == 5
    data = json.loads(found.stdout)
    assert data["fits"] is False
    assert data["misfits"][0]["what"] == "memory"
    assert data["peak_bytes"] == max(data["memory_bytes"].values())


def test_a_folder_that_lacks_a_shard_is_refused_at_once(tmp_path: Path) -> None:
    folder = write_tiny_model("llama", tmp_path / "model")
    index = {"weight_map": {"a": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    result = run("search", str(folder), *ARGUMENTS, "--dry-run")
    assert result.exit_code == 2
    assert "gone.safetensors" in result.stderr


def test_a_search_says_it_first_unless_it_is_quiet(folder: Path, tmp_path: Path) -> None:
    arguments = ["search", str(folder), *ARGUMENTS, "--store", f"sqlite:///{tmp_path / 's.db'}"]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0].startswith("estimated: ")
    assert "estimated" not in run(*arguments, "--quiet").stderr


def test_an_estimate_that_cannot_be_made_stops_no_search(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no shapes")

    monkeypatch.setattr(preflight, "preflight", fail)
    arguments = ["search", str(folder), *ARGUMENTS, "--store", f"sqlite:///{tmp_path / 's.db'}"]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == "not estimated: RuntimeError: no shapes"


def test_no_search_is_refused_for_machines_that_may_join_later(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine = Machine(cores=4, gpus=0, memory_bytes=1 << 34)
    cluster = Cluster(machines=(machine,), is_this_machine=False)
    monkeypatch.setattr(preflight.estimating, "cluster_at", lambda _: cluster)
    options = {"model": str(folder), "ray": "a:1", "refine": 4, "workers": 10, "device": "cpu"}
    say_first({**options, "store": "postgresql+psycopg://host/db"})
    assert "note: machines must join the Ray cluster" in capsys.readouterr().err
