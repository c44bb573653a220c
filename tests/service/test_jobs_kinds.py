"""What a job's process does for each kind of request, beside what the functions of autoq do.

In this process, so that torch is loaded once; `test_jobs_killed.py` has the processes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from autoq.api import open_study, search
from autoq.bundled import model_path
from autoq.errors import (
    BudgetInfeasibleError,
    DataError,
    ExportError,
    InputError,
    ModelError,
    UnknownNameError,
)
from autoq.export.checkup import check_checkpoint
from autoq.service.guard.roots import Roots
from autoq.service.jobs import _speech as _job_speech
from autoq.service.jobs import _tasks as _job_tasks
from autoq.service.jobs._speech import EventProgress, Speech
from autoq.service.problems import problem_of
from autoq.studies import StudyStore
from autoq.wire import SearchRequest

SMALL = {
    "model": "bundled",
    "effective_bits": 5.0,
    "calibration_sequences": 4,
    "sequence_length": 64,
    "held_out_sequences": 2,
    "name": "demo",
}


class Heard:
    """A file that a job speaks into."""

    def __init__(self, path):
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.speech = Speech(self.descriptor)

    @property
    def messages(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def events(self, kind):
        return [each["data"] for each in self.messages if each.get("kind") == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def place(folder):
    (folder / "checkpoints").mkdir()
    roots = Roots(exports=folder / "checkpoints")
    return SimpleNamespace(url=f"sqlite:///{folder / 'autoq.db'}", roots=roots, folder=folder)


@pytest.fixture
def heard(tmp_path):
    found = Heard(tmp_path / "said")
    yield found
    os.close(found.descriptor)


def order(place, kind, request, *, study=None, attempts=1, ray=None):
    with StudyStore.open(place.url) as store:
        job, _ = store.add_job(kind=kind, request=request, created_by="ada", study=study)
        store.request_cancel(job.id)  # nobody else is to do it
    return {
        "store": place.url,
        "job": {**asdict(job), "attempts": attempts, "started": job.created},
        "roots": place.roots.to_json(),
        "ray": ray,
    }


@pytest.fixture(scope="module")
def searched(place):
    heard = Heard(place.folder / "said")
    result = _job_tasks.perform(order(place, "search", SMALL), heard.speech)
    os.close(heard.descriptor)
    return SimpleNamespace(result=result, heard=heard)


def do(place, heard, kind, request, **options):
    return _job_tasks.perform(order(place, kind, request, **options), heard.speech)


# Searching


def test_a_search_gives_what_autoq_search_gives(searched, place, tmp_path):
    options = {name: value for name, value in SMALL.items() if name != "model"}
    expected = search(model_path(), store=str(tmp_path / "own.db"), **options)
    found = open_study("demo", place.url)
    assert found.plan().assignment == expected.plan().assignment
    result = searched.result
    assert result["study"] == "demo"
    assert result["effective_bits"] == expected.plan().effective_bits
    assert result["predicted_loss"] == expected.plan().predicted_loss
    assert result["measured"] == expected.summary()["measured"]
    assert result["export"] is None


def test_the_studys_name_is_told_before_it_is_calibrated(searched):
    messages = searched.heard.messages
    assert messages.index({"study": "demo"}) < next(
        n for n, each in enumerate(messages) if each.get("data", {}).get("name") == "calibration"
    )


def test_stages_are_told_as_they_begin_and_end(searched):
    told = [(stage["name"], stage["status"]) for stage in searched.heard.events("stage")]
    assert told == [
        (name, status)
        for name in ("discovery", "calibration", "sizes", "sensitivity", "solve", "measure")
        for status in ("running", "done")
    ]
    assert all(
        (stage["seconds"] is None) == (stage["status"] == "running")
        for stage in searched.heard.events("stage")
    )


def test_every_field_of_a_request_reaches_the_search():
    assert {*_job_tasks._AS_GIVEN, *_job_tasks.PATHS} == set(SearchRequest.model_fields)


def test_a_search_is_called_with_what_was_asked_and_no_remote_code(
    place, heard, monkeypatch, searched
):
    called = {}

    def record(model, **arguments):
        called.update(arguments, model=model)
        return open_study("demo", place.url)

    monkeypatch.setattr(_job_tasks, "search", record)
    asked = {**SMALL, "formats": ["fp8"], "max_memory": "4GB", "export": "checkpoints/x/y"}
    do(place, heard, "search", asked)
    assert called["model"] == model_path()
    assert (called["formats"], called["max_memory"]) == (("fp8",), "4GB")
    assert called["export"] == place.folder / "checkpoints" / "x" / "y"
    assert "trust_remote_code" not in called


@pytest.mark.parametrize(("bound", "cluster"), [(None, "auto"), ("4GB", None)])
def test_a_search_goes_to_the_cluster_unless_its_memory_is_bounded(
    place, heard, monkeypatch, searched, bound, cluster
):
    called = {}

    def record(_, **arguments):
        called.update(arguments)
        return open_study("demo", place.url)

    monkeypatch.setattr(_job_tasks, "search", record)
    do(place, heard, "search", {**SMALL, "max_memory": bound}, ray="auto")
    assert called["ray"] == cluster


def test_what_fails_says_what_autoq_says(place, heard, tmp_path):
    with pytest.raises(BudgetInfeasibleError) as own:
        search(model_path(), effective_bits=1.0, store=str(tmp_path / "own.db"))
    with pytest.raises(BudgetInfeasibleError) as found:
        do(place, heard, "search", {**SMALL, "effective_bits": 1.0})
    problem = problem_of(found.value)
    assert problem.detail == str(own.value)
    assert problem.limits["floor"] == own.value.floor_bits


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model": "elsewhere/model"}, ModelError),
        ({"model": "checkpoints/../../etc"}, InputError),
        ({"calibration_data": "wikitext"}, DataError),
        ({"export": "/srv/x"}, InputError),
        ({"export": "checkpoints"}, ExportError),
    ],
)
def test_paths_are_looked_at_again(place, heard, changes, error):
    with pytest.raises(error):
        do(place, heard, "search", {**SMALL, **changes})


# With a study


def test_a_plan_is_measured(searched, place, heard):
    plan = open_study("demo", place.url).solve(6.0)
    result = do(place, heard, "measure", {"plan": plan.id}, study="demo")
    assert (result["plan"], result["label"]) == (plan.id, "6 bits")
    assert result["measured"]["kl_divergence"] > 0
    with StudyStore.open(place.url) as store:
        stored = [m for m in store.measurements(store.find("demo").id) if m.plan_id == plan.id]
    assert result["measured"] == {entry.metric: entry.value for entry in stored}


def test_a_plan_of_another_study_is_refused(searched, place, heard):
    with pytest.raises(UnknownNameError, match="study demo has no plan 999; its last ones: 1"):
        do(place, heard, "measure", {"plan": 999}, study="demo")


def test_a_study_that_is_gone_is_refused(place, heard):
    with pytest.raises(UnknownNameError, match="gone"):
        do(place, heard, "measure", {"plan": 1}, study="gone")


def test_an_export_is_written_below_its_root_and_verified(searched, place, heard):
    asked = {"output": "checkpoints/deep/one", "effective_bits": 6.0}
    result = do(place, heard, "export", asked, study="demo")
    written = place.folder / "checkpoints" / "deep" / "one"
    assert result["export"]["path"] == "checkpoints/deep/one"
    files = {entry["path"] for entry in result["export"]["files"]}
    assert files <= {path.name for path in written.iterdir()}
    report = do(place, heard, "verify", {"checkpoint": "checkpoints/deep/one"})
    expected = {**check_checkpoint(written).as_plain(), "checkpoint": "checkpoints/deep/one"}
    assert report == expected
    assert report["faults"] == []


def test_an_export_replaces_only_what_the_same_job_wrote(searched, place, heard):
    asked = {"output": "checkpoints/twice", "plan": searched.result["plan"]}
    first = order(place, "export", asked, study="demo")
    _job_tasks.perform(first, heard.speech)
    with pytest.raises(ExportError, match="the output folder must be new"):
        do(place, heard, "export", asked, study="demo")
    # Its runner died before it could say that the job was done.
    again = {**first, "job": {**first["job"], "attempts": 2}}
    assert _job_tasks.perform(again, heard.speech)["export"]["path"] == "checkpoints/twice"


def test_a_plan_and_a_budget_at_once_are_refused(searched, place, heard):
    asked = {"output": "checkpoints/x", "plan": 1, "effective_bits": 5.0}
    with pytest.raises(InputError, match="give one of both"):
        do(place, heard, "export", asked, study="demo")


@pytest.mark.slow
def test_trials_of_a_refinement_are_told(searched, place, heard):
    asked = {"trials": 3, "effective_bits": 5.0}
    result = do(place, heard, "refine", asked, study="demo")
    trials = heard.events("trial")
    assert len(trials) == result["refinement"]["trials"] == 3
    assert {trial["state"] for trial in trials} <= {"complete", "pruned"}
    assert [trial["number"] for trial in trials] == sorted(trial["number"] for trial in trials)
    # Those of before are not told again.
    do(place, heard, "refine", {**asked, "trials": 4}, study="demo")
    assert len(heard.events("trial")) == 4


def test_a_refinement_within_a_latency_is_refused(searched, place, heard):
    with pytest.raises(InputError, match="leave out max_latency_ms"):
        do(place, heard, "refine", {"trials": 2, "max_latency_ms": 3.0}, study="demo")


# How work is told


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(_job_speech, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_progress_is_told_a_few_times_a_second_with_the_time_left(heard, clock):
    progress = EventProgress(heard.speech)
    with progress.task("scoring", 100) as advance:
        for _ in range(100):
            clock.seconds += 1 / 16
            advance()
    told = heard.events("progress")
    # At the beginning, and every quarter of a second (four steps).
    assert [each["done"] for each in told] == [*range(0, 101, 4)]
    assert told[0]["seconds_left"] is None
    assert told[1]["seconds_left"] == 96 / 16
    assert told[-1]["seconds_left"] == 0.0
    assert {each["total"] for each in told} == {100}


def test_a_task_of_unknown_length_says_nothing_of_the_time_left(heard, clock):
    with EventProgress(heard.speech).task("exporting", 0) as advance:
        clock.seconds += 1.0
        advance(7)
    last = heard.events("progress")[-1]
    assert last == {"task": "exporting", "done": 7, "total": 0, "seconds_left": None}


def test_what_does_not_advance_is_told_now_and_then(heard, clock):
    with EventProgress(heard.speech).task("scoring", 2) as advance:
        for _ in range(30):  # a cluster is waited for
            clock.seconds += 1.0
            advance(0)
        advance(2)
    # At the beginning, every ten seconds, and at the end.
    assert [each["done"] for each in heard.events("progress")] == [0, 0, 0, 0, 2]
