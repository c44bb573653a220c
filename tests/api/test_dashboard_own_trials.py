"""Trials that users add, and versions of Optuna with other tables: nothing of it is harmed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import autoq
from autoq.api.dashboards.dashboard import prepare_store
from autoq.api.refinement._trials import read_history
from autoq.studies import StudyStore, trial_storage
from tests.api.refinements import SMALL, open_with

pytest.importorskip("optuna_dashboard")
optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def measured(measured_store: Path, tmp_path: Path) -> Iterator[autoq.Study]:
    url = f"sqlite:///{shutil.copy(measured_store, tmp_path / 'autoq.db')}"
    with StudyStore.open(url) as store:
        yield autoq.open_study(None, store)


def shown(study: autoq.Study, notes: list[str] | None = None) -> optuna.Study:
    prepared = prepare_store(study.store, say=(notes if notes is not None else []).append)
    assert prepared.skipped == ()
    (name,) = prepared.shown
    return optuna.load_study(study_name=name, storage=trial_storage(study.store.url))


def one_number_changed(study: autoq.Study, value: float) -> str:
    """The plan whose divergence is another from now on."""
    record = next(
        record
        for record in study.store.measurements(study.id)
        if record.metric == "kl_divergence" and record.plan_id is not None
    )
    study.store.add_measurement(
        study.id,
        plan_id=record.plan_id,
        label=record.label,
        metric=record.metric,
        value=value,
        data_sha256=record.data_sha256,
    )
    return json.dumps(study.store.plan(record.plan_id).assignment)


THEIRS: list[dict[str, Any]] = [
    {},
    {"plan": "my own"},
    {"plan": ["no", "text"], "source": "me"},
    {"plan": "no JSON", "source": "me"},
    {"plan": "[]", "source": "me"},
]


def test_complete_trials_of_a_users_stay_as_they_are(measured: autoq.Study) -> None:
    first = shown(measured)
    count = len(first.trials)
    for attributes in THEIRS:
        first.add_trial(optuna.trial.create_trial(values=[5.0, 0.25], user_attrs=attributes))
    plan = one_number_changed(measured, 0.125)
    trials = shown(measured).trials
    assert all(trial.state.name == "COMPLETE" for trial in trials)
    ours, theirs = trials[:count], trials[count:]
    assert [trial.user_attrs for trial in theirs] == THEIRS
    assert all(trial.values == [5.0, 0.25] for trial in theirs)
    assert [t.values[1] for t in ours if t.user_attrs["plan"] == plan] == [0.125]


def test_a_copy_of_one_of_our_trials_does_not_take_its_place(measured: autoq.Study) -> None:
    first = shown(measured)
    plan = one_number_changed(measured, 0.125)
    (own,) = (trial for trial in first.trials if trial.user_attrs["plan"] == plan)
    first.add_trial(optuna.trial.create_trial(values=own.values, user_attrs=own.user_attrs))
    found = {trial.number: trial for trial in shown(measured).trials}
    assert found[own.number].values[1] == 0.125
    assert found[len(found) - 1].values == own.values


@pytest.mark.parametrize("missing", ["TrialUserAttributeModel", "models"])
def test_where_optunas_tables_are_others_older_numbers_are_shown_and_that_is_said(
    measured: autoq.Study, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    import optuna.storages._rdb as tables

    before = [(trial.values, trial.user_attrs) for trial in shown(measured).trials]
    one_number_changed(measured, 0.125)
    with monkeypatch.context() as patched:
        if missing == "models":
            patched.setitem(__import__("sys").modules, "optuna.storages._rdb.models", None)
            patched.delattr(tables, "models")
        else:
            patched.delattr(tables.models, missing)
        notes: list[str] = []
        found = shown(measured, notes)
    assert [(trial.values, trial.user_attrs) for trial in found.trials] == before
    assert any("shows older numbers: the tables of Optuna" in note for note in notes)
    assert 0.125 in [trial.values[1] for trial in shown(measured).trials]


def test_a_table_that_does_not_take_the_numbers_changes_nothing(
    measured: autoq.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails after the first rows were written: all of it is undone."""
    from optuna.storages._rdb import models

    before = [(trial.values, trial.user_attrs) for trial in shown(measured).trials]
    one_number_changed(measured, 0.125)

    class Renamed(models.TrialValueModel):  # type: ignore[misc]
        def __init__(self, **columns: Any) -> None:
            raise TypeError("'value_type' is an invalid keyword argument")

    with monkeypatch.context() as patched:
        patched.setattr(models, "TrialValueModel", Renamed)
        notes: list[str] = []
        found = shown(measured, notes)
    assert [(trial.values, trial.user_attrs) for trial in found.trials] == before
    assert any("invalid keyword argument" in note for note in notes)


def test_a_users_trial_among_those_of_a_refinement_is_none_of_its_trials(
    study: autoq.Study,
) -> None:
    study.refine(trials=2, **SMALL)
    trials = open_with(study)
    before = read_history(trials)
    trials.add_trial(optuna.trial.create_trial(value=-1.0, user_attrs={"plan": "my own"}))
    assert read_history(trials) == before
    assert study.refine(trials=3, **SMALL).trials == 3
