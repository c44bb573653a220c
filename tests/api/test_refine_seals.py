"""Trials that changed on the disk: refused when a refinement goes on, named by `autoq store check`."""

from __future__ import annotations

import sqlite3

import pytest

from autoq.api.opening import open_study
from autoq.api.refinement import _worker as _refine_worker
from autoq.errors import StoreError
from autoq.studies import maintenance
from tests.api.refinements import SMALL, entries

CHANGES = [
    (
        "UPDATE trial_user_attributes SET value_json = replace(value_json, 'fp8', 'nvfp4') "
        "WHERE key = 'plan'"
    ),
    "UPDATE trial_user_attributes SET value_json = '9' WHERE key = 'position' AND value_json = '1'",
    "UPDATE trial_user_attributes SET value_json = '\"[0.0]\"' WHERE key = 'losses'",
    "DELETE FROM trial_user_attributes WHERE key = 'source'",
    "UPDATE trial_values SET value = value * 1.0000001",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_trial_that_changed_is_refused_and_named(change, study):
    study.refine(trials=2, **SMALL)
    url, name = study.store.url, study.name
    study.store.close()
    assert maintenance.check(url) == []
    with sqlite3.connect(study.store.file) as connection:
        assert connection.execute(change).rowcount > 0
    connection.close()
    faults = maintenance.check(url)
    assert faults
    assert all("trial" in fault.what and fault.study == name for fault in faults)
    if "source" not in change:  # without it a trial says nothing and is not counted
        with pytest.raises(StoreError, match=r"trial \d is damaged"):
            open_study(None, url).refine(trials=3, **SMALL)


def test_trials_of_before_have_no_seal_and_count(study):
    study.refine(trials=2, **SMALL)
    before = entries(study)
    study.store.close()
    with sqlite3.connect(study.store.file) as connection:
        connection.execute("DELETE FROM trial_user_attributes WHERE key = 'sealed'")
    connection.close()
    again = open_study(None, study.store.url)
    assert again.refine(trials=3, **SMALL).trials == 3
    assert entries(again)[:2] == before
    assert maintenance.check(study.store.url) == []


def test_a_trial_that_is_interrupted_before_its_end_is_not_damaged(study, monkeypatch):
    sealed = _refine_worker._seal

    def seal_and_stop(trial, values):
        sealed(trial, values)
        if trial.number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(_refine_worker, "_seal", seal_and_stop)
    with pytest.raises(KeyboardInterrupt):
        study.refine(trials=3, **SMALL)
    assert maintenance.check(study.store.url) == []
    monkeypatch.undo()
    assert study.refine(trials=3, **SMALL).trials == 3
    assert maintenance.check(study.store.url) == []
