"""Searches that are cancelled or killed while they score, in real processes, and go on after it.

What an interrupted search ends with is compared, bit for bit, with one that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from autoq.api import search
from autoq.bundled import model_path
from autoq.service.jobs.runner import RunnerSettings
from autoq.service.jobs.runner_pool import RunnerPool
from autoq.studies import SCORING_STAGE, JobStatus, StudyStore, WorkStatus

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 240.0
BATCHES = 48
REQUEST = {
    "model": "bundled",
    "effective_bits": 5.0,
    "formats": ["fp8", "nvfp4", "int8_wo"],
    "calibration": "max",
    "calibration_sequences": BATCHES,
    "sequence_length": 128,
    "batch_size": 1,
    "held_out_sequences": 2,
    "name": "demo",
}

SERVER = """
import json, sys, time
from autoq.service.jobs.runner import RunnerSettings
from autoq.service.jobs.runner_pool import RunnerPool
with RunnerPool(RunnerSettings(**json.loads(sys.argv[1])), 1) as pool:
    time.sleep(600)
"""


def until(condition, what):
    """Wait for what another process does; the limit is only there to end a broken test."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Cells, plan and measurements of the same search in one piece."""
    path = tmp_path_factory.mktemp("undisturbed") / "autoq.db"
    options = {name: value for name, value in REQUEST.items() if name != "model"}
    search(model_path(), store=str(path), **options)
    with StudyStore.open(str(path)) as store:
        return outcome(store)


def outcome(store):
    study = store.find("demo")
    cells = {(c.group, c.format): (c.score, c.standard_error) for c in store.sensitivity(study.id)}
    (plan,) = store.plans(study.id)
    batches = {n: batch.tobytes() for n, batch in store.score_batches(study.id).items()}
    measured = {(m.label, m.metric): m.value for m in store.measurements(study.id)}
    return cells, plan.assignment, plan.predicted_loss, plan.gap, batches, measured


@pytest.fixture
def settings(tmp_path):
    roots = {"models": [], "data": [], "exports": None}
    return RunnerSettings(store=f"sqlite:///{tmp_path / 'autoq.db'}", roots=roots)


@pytest.fixture
def store(settings):
    with StudyStore.open(settings.store) as opened:
        yield opened


@pytest.fixture
def job(store):
    return store.add_job(kind="search", request=REQUEST, created_by="ada", study="demo")[0]


def while_it_scores(store, job, attempt=1):
    """The process of the job, some batches after it began to score."""

    def scoring():
        now = store.job(job.id)
        is_scoring = now.progress is not None and now.progress["task"] == "scoring"
        return now.attempts == attempt and is_scoring and now.progress["done"] >= 2

    until(scoring, "the job scores")
    return process_of(store.job(job.id))


def process_of(job):
    runner = psutil.Process(int(job.worker.rpartition(":")[2]))
    (process,) = [
        child
        for child in runner.children()
        if "autoq.service.jobs.job" in " ".join(child.cmdline())
    ]
    return process


def is_gone(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def scored(store):
    return len(store.score_batches(store.find("demo").id))


def check_done(store, job, undisturbed):
    until(lambda: store.job(job.id).status.is_ended, "the job has ended")
    done = store.job(job.id)
    assert (done.status, done.problem) == (JobStatus.DONE, None)
    assert outcome(store) == undisturbed


def test_a_cancelled_search_stops_keeps_its_results_and_is_resumed(
    store, settings, job, undisturbed
):
    with RunnerPool(settings, 1):
        process = while_it_scores(store, job)
        store.request_cancel(job.id)
        until(lambda: store.job(job.id).status.is_ended, "the job is cancelled")
        assert is_gone(process)
        assert store.job(job.id).status is JobStatus.CANCELLED
        study = store.find("demo")
        assert store.stage(study.id, SCORING_STAGE).status is WorkStatus.RUNNING
        assert store.plans(study.id) == []
        kept = scored(store)
        assert 0 < kept < BATCHES
        with store.lease(study.id):  # nobody holds it any more
            pass
        stages = [event.data["name"] for event in store.events_after(job=job.id, kind="stage")]
        assert "solve" not in stages

        store.resume_job(job.id)
        check_done(store, job, undisturbed)
    last_begin = max(
        event.id
        for event in store.events_after(job=job.id, kind="status")
        if event.data["status"] == "running"
    )
    counts = [
        event.data["done"]
        for event in store.events_after(last_begin, job=job.id, kind="progress")
        if event.data["task"] == "scoring"
    ]
    assert min(filter(None, counts)) >= kept  # what was scored before is not scored again
    assert store.job(job.id).attempts == 2


def test_a_search_whose_process_is_killed_goes_on(store, settings, job, undisturbed):
    with RunnerPool(settings, 1):
        while_it_scores(store, job).kill()
        check_done(store, job, undisturbed)
    done = store.job(job.id)
    assert (done.attempts, done.deaths) == (2, 1)


def test_a_search_whose_runner_is_killed_goes_on_in_another(store, settings, job, undisturbed):
    with RunnerPool(settings, 1) as pool:
        process = while_it_scores(store, job)
        os.kill(pool.pids[0], signal.SIGKILL)
        until(lambda: is_gone(process), "the job's process ended with its runner")
        check_done(store, job, undisturbed)
    assert store.job(job.id).deaths == 1


def test_a_search_whose_server_is_killed_goes_on_under_the_next(store, settings, job, undisturbed):
    server = subprocess.Popen([sys.executable, "-c", SERVER, json.dumps(settings.to_json())])
    try:
        process = while_it_scores(store, job)
        server.kill()
        server.wait()
        until(lambda: is_gone(process), "the job's process ended with the server")
        until(lambda: store.job(job.id).status is JobStatus.QUEUED, "the job waits again")
        assert 0 < scored(store) < BATCHES
    finally:
        server.kill()
        server.wait()
    with RunnerPool(settings, 1):
        check_done(store, job, undisturbed)
    assert store.job(job.id).deaths == 0  # it was given back


def test_a_search_that_takes_too_much_memory_ends_and_says_what_to_do(store, settings, job):
    limited = RunnerSettings(store=settings.store, roots=settings.roots, max_job_memory=150_000_000)
    with RunnerPool(limited, 1):
        until(lambda: store.job(job.id).status.is_ended, "the job has ended")
    failed = store.job(job.id)
    assert failed.status is JobStatus.FAILED
    assert "0.15 GB of memory here (--max-job-memory)" in failed.problem["detail"]
