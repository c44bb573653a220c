"""`autoq worker`: what it refuses, and a job that it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from autoq import wire
from autoq.studies import JobStatus, StudyStore


def worker(*arguments):
    command = [sys.executable, "-m", "autoq", "worker", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["--store", ":memory:"], "a store in memory is seen by one process"),
        (["--store", "sqlite://"], "a store in memory is seen by one process"),
        (["--max-job-memory", "much"], "a size must be a number and MB"),
        (["--exports", "/dev/null"], "--exports takes folders, and '/dev/null' is none"),
        (
            ["--exports", "/dev/null/x"],
            "--exports takes a folder, and '/dev/null/x' cannot be made",
        ),
        (["--models", "no-such-folder"], "--models takes folders, and 'no-such-folder' is none"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, arguments, refusal):
    store = [] if "--store" in arguments else ["--store", tmp_path / "autoq.db"]
    ended = worker("--once", *store, *arguments)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert refusal in line


def test_once_does_what_waits_and_ends(tmp_path):
    path = tmp_path / "autoq.db"
    exports = tmp_path / "not" / "yet"
    with StudyStore.open(str(path)) as store:
        request = {"checkpoint": "elsewhere/x"}
        job, _ = store.add_job(kind="verify", request=request, created_by="ada")
        ended = worker("--once", "--store", path, "--exports", exports)
        assert ended.returncode == 0, ended.stderr
        assert exports.is_dir()  # made
        failed = store.job(job.id)
        assert failed.status is JobStatus.FAILED
        assert failed.problem["type"] == "urn:autoq:problem:model"
        assert "elsewhere/x" in failed.problem["detail"]
        assert str(tmp_path) not in failed.problem["detail"]
        assert store.live_runners() == 0


def test_the_store_and_the_wire_know_the_same_statuses():
    assert [status.value for status in JobStatus] == [status.value for status in wire.JobStatus]
