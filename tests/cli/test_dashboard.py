"""`autoq dashboard`: the real server over a real study, and what is refused with one line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autoq.cli import app
from autoq.errors import without_password

pytest.importorskip("optuna_dashboard")

# A pipeline in the background ignores Ctrl-C, and its children do.
_COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from autoq.cli import main
main()
"""
END_SECONDS = 120  # a hang, not a benchmark


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a study of a tiny model."""
    import autoq
    from autoq.testing.tiny_models import write_tiny_model

    folder = tmp_path_factory.mktemp("dashboard")
    autoq.search(
        write_tiny_model("llama", folder / "llama"),
        formats=("fp8", "nvfp4"),
        effective_bits=6.0,
        calibration_sequences=6,
        sequence_length=32,
        batch_size=2,
        held_out_sequences=2,
        store=f"sqlite:///{folder / 'autoq.db'}",
    ).store.close()
    return folder / "autoq.db"


class Served:
    """A running `autoq dashboard`."""

    def __init__(self, store: Path) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", _COMMAND, "dashboard"),
                *("--store", f"sqlite:///{store}", "--port", "0", "--no-browser"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "AUTOQ_DEBUG": ""},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.fullmatch(r"dashboard: (http://127\.0\.0\.1:\d+)/dashboard\n", line)
        assert match, line + self.end()[1]
        self.url = match[1]

    def get(self, path: str) -> tuple[str, bytes]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=END_SECONDS) as response:
            return response.headers["Content-Type"], response.read()

    def json(self, path: str) -> Any:
        return json.loads(self.get(path)[1])

    def end(self) -> tuple[int, str]:
        """Exit code and messages after Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        _, messages = self.process.communicate(timeout=END_SECONDS)
        return self.process.returncode, messages


@pytest.fixture(scope="module")
def served(store: Path) -> Iterator[Served]:
    running = Served(store)
    yield running
    if running.process.poll() is None:
        running.end()


def test_the_page_and_its_script_are_there(served: Served) -> None:
    assert b"<html" in served.get("/dashboard")[1]
    assert len(served.get("/static/bundle.js")[1]) > 1_000_000


def test_the_study_has_trial_note_plots_and_files(served: Served) -> None:
    (entry,) = served.json("/api/studies")["study_summaries"]
    assert entry["study_name"].endswith(" · measured plans")
    study = served.json(f"/api/studies/{entry['study_id']}")
    (trial,) = study["trials"]
    attributes = {attribute["key"]: attribute["value"] for attribute in trial["user_attrs"]}
    assert attributes["label"] == "6 bits"
    assert trial["values"] == [
        float(attributes["effective_bits"]),
        float(attributes["kl_divergence"]),
    ]
    assert "## How to read it" in study["note"]["body"]
    assert {plot["id"] for plot in study["plotly_graph_objects"]} == {
        "frontier",
        "predicted-and-measured",
        "layers",
    }
    assert study["objective_names"] == ["effective bits", "KL divergence"]
    assert {file["filename"] for file in trial["artifacts"]} == {"plan.csv", "plan.json"}


def test_files_are_served(served: Served) -> None:
    (entry,) = served.json("/api/studies")["study_summaries"]
    number = entry["study_id"]
    study = served.json(f"/api/studies/{number}")
    files = {file["filename"]: file["artifact_id"] for file in study["artifacts"]}
    kind, picture = served.get(f"/artifacts/{number}/{files['heat-map.png']}")
    assert (kind, picture[:4]) == ("image/png", b"\x89PNG")
    trial = study["trials"][0]
    files = {file["filename"]: file["artifact_id"] for file in trial["artifacts"]}
    path = f"/artifacts/{number}/{trial['trial_id']}/{files['plan.json']}"
    assert served.json(path)["label"] == "6 bits"


def test_files_outside_the_folder_are_not_served(served: Served, store: Path) -> None:
    (entry,) = served.json("/api/studies")["study_summaries"]
    for path in (f"{entry['study_id']}/..%2Fautoq.db", f"{entry['study_id']}/../autoq.db"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            served.get(f"/artifacts/{path}")
        assert refused.value.code == 404


def test_a_second_dashboard_cannot_take_the_port(served: Served, store: Path) -> None:
    port = served.url.rpartition(":")[2]
    done = invoke("--store", f"sqlite:///{store}", "--port", port)
    assert done.exit_code == 2
    assert f"error: the dashboard cannot listen on 127.0.0.1:{port}" in done.stderr


def test_ctrl_c_ends_it_without_a_traceback(served: Served) -> None:
    code, messages = served.end()
    assert code == 0
    assert "Traceback" not in messages
    assert messages.endswith("the dashboard has ended\n")


# Refusals: one line and exit code 2


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["dashboard", "--no-browser", *arguments])


def refusal(*arguments: str) -> str:
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_other_machines_are_kept_out_unless_asked_for(store: Path) -> None:
    line = refusal("--store", f"sqlite:///{store}", "--host", "0.0.0.0")
    assert "has no password" in line
    assert "--allow-remote" in line


def test_other_machines_are_let_in_with_a_warning(tmp_path: Path) -> None:
    done = invoke(
        "--store", f"sqlite:///{tmp_path / 'no.db'}", "--host", "0.0.0.0", "--allow-remote"
    )
    assert done.exit_code == 2  # there is no such store
    assert done.stderr.startswith("warning: whoever reaches 0.0.0.0 can read and delete studies")


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert "does not exist" in refusal("--store", f"sqlite:///{tmp_path / 'no.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_a_study_says_how_to_make_one(tmp_path: Path) -> None:
    from autoq.studies import StudyStore

    url = f"sqlite:///{tmp_path / 'empty.db'}"
    StudyStore.open(url).close()
    line = refusal("--store", url, "--port", "0")
    assert line == (
        "error: the store has no study yet; make one with `autoq search MODEL --bits B`"
    )


def test_a_database_in_memory_has_no_place_for_files() -> None:
    assert "--artifacts DIR" in refusal("--store", "sqlite:///:memory:", "--port", "0")


def test_missing_packages_are_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "plotly" else find(name, *rest),
    )
    line = refusal("--store", f"sqlite:///{store}")
    assert line == (
        "error: the dashboard needs plotly, not installed here; run `pip install 'autoq[dashboard]'`"
    )


@pytest.mark.parametrize("port", ["-1", "65536", "http"])
def test_a_port_that_is_none_is_refused(store: Path, port: str) -> None:
    assert invoke("--store", f"sqlite:///{store}", "--port", port).exit_code == 2


# Passwords


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://ann:s3cret@db:5432/autoq", "postgresql://ann:***@db:5432/autoq"),
        ("postgresql://ann:s3@c/r:et@db/autoq", "postgresql://ann:***@db/autoq"),
        ("postgresql+psycopg://:s3cret@/autoq", "postgresql+psycopg://:***@/autoq"),
        (
            "postgresql://db/autoq?user=ann&password=s3cret&port=1",
            "postgresql://db/autoq?user=ann&password=***&port=1",
        ),
        ("postgresql://ann@db:5432/autoq", "postgresql://ann@db:5432/autoq"),
        ("sqlite:////a:b@c/autoq.db", "sqlite:////a:b@c/autoq.db"),
        ("autoq.db", "autoq.db"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown


def test_a_url_that_cannot_be_read_is_told_without_its_password() -> None:
    line = refusal("--store", "postgresql://ann:s3cret@db:many/autoq", "--port", "0")
    assert "s3cret" not in line
    assert "must be a file path or a URL" in line


def test_a_server_that_is_not_there_is_told_without_its_password() -> None:
    url = "postgresql+psycopg://ann:s3cret@127.0.0.1:1/autoq?password=s3cret"
    line = refusal("--store", url, "--port", "0", "--artifacts", "/nowhere")
    assert "s3cret" not in line
