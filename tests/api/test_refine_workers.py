"""Who shares the trials of a refinement, and what becomes of those whose worker died."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import optuna
import pytest

import autoq
from autoq.api.refinement._trials import POSITION, DeadTrials, read_history
from autoq.api.refinement._worker import Worker
from autoq.api.refinement.process import _Helper
from autoq.api.refinement.refining import RefineOptions, open_trials
from autoq.errors import InputError
from autoq.studies import (
    WORKER,
    grace_seconds_of,
    has_heartbeat,
    trial_storage,
    worker_identity,
    worker_is_gone,
)
from tests.api.refinements import SMALL, NoteTaking, entries, open_with


def test_several_workers_need_a_store_that_they_can_share(llama_folder, quick):
    quick["store"] = "sqlite:///:memory:"
    study = autoq.search(llama_folder, **quick)
    with pytest.raises(InputError, match="share trials through the store"):
        study.refine(trials=2, workers=2, **SMALL)
    assert study.refine(trials=2, **SMALL).trials == 2


def test_a_process_that_ended_is_known_to_be_gone():
    child = subprocess.Popen(
        [sys.executable, "-c", "from autoq.studies import worker_identity as w; print(w())"],
        stdout=subprocess.PIPE,
        text=True,
    )
    identity, _ = child.communicate()
    assert worker_is_gone(identity)
    assert not worker_is_gone(worker_identity())
    elsewhere = json.loads(identity)
    elsewhere[0] = "another-host"
    assert not worker_is_gone(json.dumps(elsewhere))


REFINE = """
import sys
from autoq.api import open_study
study = open_study(None, sys.argv[1])
study.refine(trials=int(sys.argv[2]), sequences=4, fresh_sequences=4, held_out_sequences=2)
"""


def start(store, trials):
    return subprocess.Popen(
        [sys.executable, "-c", REFINE, store, str(trials)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_trials(study, count, child):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert child.poll() is None, "it ended before it could be killed"
        if len(_numbers(study)) > count:
            return
        time.sleep(0.05)
    raise AssertionError("no trials")


def _numbers(study):
    storage = trial_storage(study.store.url)
    names = [entry.study_name for entry in optuna.get_all_study_summaries(storage=storage)]
    if not names:
        return []
    return optuna.load_study(study_name=names[0], storage=storage).get_trials()


@pytest.mark.slow
def test_killed_and_run_again_it_ends_with_the_trials_of_a_run_that_was_not(copy_of, study):
    child = start(study.store.url, 12)
    wait_for_trials(study, 3, child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    result = study.refine(trials=12, **SMALL)
    assert result.trials == 12
    undisturbed = copy_of("undisturbed.db")
    undisturbed.refine(trials=12, **SMALL)
    assert entries(study) == entries(undisturbed)


@pytest.mark.slow
def test_two_workers_share_the_trials_and_a_third_joins_them(study):
    other = start(study.store.url, 10)
    result = study.refine(trials=10, workers=2, **SMALL)
    assert other.wait(timeout=120) == 0
    assert result.trials == 10
    history = read_history(open_trials(study, study.unrefined_plan(), RefineOptions(**SMALL)))
    assert sorted(trial.number for trial in history.finished) == list(range(10))
    assert history.unfinished == 0


def test_a_worker_that_was_killed_is_reported_as_killed_whatever_it_wrote_before():
    helper = _Helper({"store": "sqlite://"}, 2)
    helper._errors.write("a warning of some library\n")
    helper._process.kill()
    assert helper.end() == "killed by signal 9"


def test_a_trial_whose_worker_died_before_its_first_sign_is_tried_again(study, monkeypatch):
    trials = open_with(study, heartbeat_seconds=1, grace_seconds=1)
    forgotten = trials.ask()  # and nothing more is heard of it
    assert not has_heartbeat(trials._storage, forgotten._trial_id)
    assert grace_seconds_of(trials._storage) == 1.0
    dead, now = DeadTrials(trials), time.monotonic()
    dead.bring_back()
    assert trials.get_trials()[0].state is optuna.trial.TrialState.RUNNING
    monkeypatch.setattr(time, "monotonic", lambda: now + 5.0)
    dead.bring_back()
    states = [entry.state for entry in trials.get_trials()]
    assert states == [optuna.trial.TrialState.FAIL, optuna.trial.TrialState.WAITING]


def test_nothing_of_a_dead_worker_is_left_in_the_trial_that_is_tried_again(study):
    trials = open_with(study)
    robbed = trials.ask()
    host, namespace, _, started = json.loads(worker_identity())
    robbed.set_user_attr(WORKER, json.dumps([host, namespace, 2**22 + 1, started]))
    robbed.set_user_attr(POSITION, 0)
    DeadTrials(trials).bring_back()
    failed, waiting = trials.get_trials()
    assert failed.state is optuna.trial.TrialState.FAIL
    assert waiting.state is optuna.trial.TrialState.WAITING
    assert waiting.user_attrs == {POSITION: 0}


def test_a_worker_whose_trial_was_given_to_others_goes_on(study, monkeypatch):
    """As after a sleep of the machine: the trial failed in the store while it was measured."""
    progress, robbed = NoteTaking(), []
    record = Worker._record

    def too_late(worker, trial, measured):
        record(worker, trial, measured)
        if not robbed:
            robbed.append(trial.number)
            worker._trials._storage.set_trial_state_values(
                trial._trial_id, optuna.trial.TrialState.FAIL
            )

    monkeypatch.setattr(Worker, "_record", too_late)
    study.refine(trials=3, **SMALL, progress=progress)
    assert robbed == [0]
    assert any("silent for too long" in note for note in progress.notes)
    assert len(entries(study)) >= 3
