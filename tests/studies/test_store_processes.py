"""Several processes on one store, and processes that die in the middle of a write."""

from __future__ import annotations

import signal

import numpy as np
import optuna
import pytest

from autoq.studies import StudyStore, trial_storage

WRITE = """
import sys
import numpy as np
from autoq.studies import StudyStore

number, batches = int(sys.argv[2]), int(sys.argv[3])
with StudyStore.open(sys.argv[1]) as store:
    study = store.create_or_get(
        name="shared", key="5" * 64, model_path="m", fingerprint="f", architecture="a",
        configuration={}, versions={}, seed=0,
    )
    for index in range(number * batches, (number + 1) * batches):
        store.put_score_batch(study.id, index, np.full((8, 4), index), 0.01)
        store.put_arrays(study.id, "calibration", {f"{index}.{i}": np.ones(16) for i in range(20)})
"""

DIE_BEFORE_COMMIT = """
import os, signal, sys
import numpy as np
from sqlalchemy import event
from autoq.studies import StudyStore

def die(connection):
    os.kill(os.getpid(), signal.SIGKILL)

store = StudyStore.open(sys.argv[1])
study_id = int(sys.argv[2])
with store.lease(study_id):
    store.begin_stage(study_id, "calibration")
    store.put_array(study_id, "calibration", "before", np.ones(3))
    event.listen(store._database._engine, "commit", die)
    # More than SQLite's page cache, so that part of it lies in the log when the process dies.
    store.put_arrays(study_id, "calibration", {f"x{i}": np.ones(100_000) for i in range(16)})
"""

OPEN_TRIALS_AT_THE_SHOT = """
import sys
import optuna
from autoq.studies import trial_storage

print("ready", flush=True)
sys.stdin.readline()
storage = trial_storage("sqlite:///" + sys.argv[1])
optuna.create_study(storage=storage, study_name="refinement", load_if_exists=True)
"""


def test_processes_create_migrate_and_write_one_store_together(store_path, start_child):
    processes, batches = 3, 10
    children = [start_child(WRITE, number, batches) for number in range(processes)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    with StudyStore.open(str(store_path)) as store:
        (study,) = store.list_studies()
        stored = store.score_batches(study.id)
        assert list(stored) == list(range(processes * batches))
        assert all(np.array_equal(stored[i], np.full((8, 4), i)) for i in stored)
        assert len(store.arrays(study.id, "calibration")) == processes * batches * 20


def test_processes_that_open_their_trials_at_the_same_instant_share_them(store, start_child):
    children = [start_child(OPEN_TRIALS_AT_THE_SHOT) for _ in range(5)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    (summary,) = optuna.get_all_study_summaries(trial_storage(store.url))
    assert summary.study_name == "refinement"


def test_kill_in_the_middle_of_a_write_leaves_nothing_of_it(store, study_id, start_child):
    child = start_child(DIE_BEFORE_COMMIT, study_id)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors
    assert list(store.arrays(study_id, "calibration")) == ["before"]
    with store.lease(study_id) as lease:
        assert store.begin_stage(study_id, "calibration").status == "running"
        store.put_array(study_id, "calibration", "after", np.ones(2))
        lease.heartbeat()
    assert list(store.arrays(study_id, "calibration")) == ["before", "after"]


def test_failed_write_leaves_nothing_of_it(store, study_id):
    def breaking():
        for index in range(600):
            yield f"x{index}"

    class Breaking(dict):
        def __getitem__(self, name):
            if name == "x599":
                raise KeyboardInterrupt
            return np.ones(2)

    with pytest.raises(KeyboardInterrupt):
        store.put_arrays(study_id, "calibration", Breaking.fromkeys(breaking()))
    assert store.arrays(study_id, "calibration") == {}
