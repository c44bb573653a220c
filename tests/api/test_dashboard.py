"""Studies in Optuna's dashboard: trials with their numbers, notes, plots and files; twice is once."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

import autoq
from autoq.api.dashboards._files import ArtifactFiles
from autoq.api.dashboards.dashboard import artifact_folder, prepare_store
from autoq.errors import InputError, UnknownNameError
from autoq.report.numbers import loss_text
from autoq.studies import StudyStore, trial_storage

get_note = pytest.importorskip("optuna_dashboard").get_note
optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture(scope="module")
def study(measured_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[autoq.Study]:
    """A prepared study, for tests that change nothing."""
    path = shutil.copy(measured_store, tmp_path_factory.mktemp("dashboard") / "autoq.db")
    with StudyStore.open(f"sqlite:///{path}") as store:
        yield autoq.open_study(None, store)


@pytest.fixture(scope="module")
def found(study: autoq.Study) -> optuna.Study:
    """The Optuna study that was made for it."""
    return shown(study.store)


@pytest.fixture
def own(study: autoq.Study, found: optuna.Study, tmp_path: Path) -> Iterator[autoq.Study]:
    """A copy of the prepared study, to change."""
    file = study.store.file
    assert file is not None
    for path in (file, file.with_name(f"{file.name}-wal")):
        shutil.copy(path, tmp_path)
    shutil.copytree(artifact_folder(study.store), tmp_path / "autoq.db.artifacts")
    with StudyStore.open(f"sqlite:///{tmp_path / 'autoq.db'}") as store:
        yield autoq.open_study(None, store)


def shown(store: StudyStore) -> optuna.Study:
    """The only Optuna study of a store, prepared."""
    prepared = prepare_store(store)
    assert prepared.skipped == ()
    (name,) = prepared.shown
    return optuna.load_study(study_name=name, storage=trial_storage(store.url))


def divergences(study: autoq.Study) -> dict[int, Any]:
    """Plan id -> the divergence that the store has of it."""
    return {
        record.plan_id: record
        for record in study.store.measurements(study.id)
        if record.metric == "kl_divergence" and record.plan_id is not None
    }


def everything(study: optuna.Study) -> tuple[Any, ...]:
    """All that Optuna keeps of a study."""
    storage = study._storage
    trials = [
        (t.number, t._trial_id, t.values, t.params, t.user_attrs, t.datetime_complete)
        for t in study.get_trials()
    ]
    return (
        study._study_id,
        trials,
        study.user_attrs,
        storage.get_study_system_attrs(study._study_id),
    )


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def artifacts_of(study: optuna.Study, folder: Path) -> dict[str, bytes]:
    """Name -> content of the study's own artifacts."""
    entries = optuna.artifacts.get_all_artifact_meta(study)
    return {entry.filename: (folder / entry.artifact_id).read_bytes() for entry in entries}


# Trials


def test_every_measured_plan_is_a_trial_with_its_numbers(
    study: autoq.Study, found: optuna.Study
) -> None:
    trials = found.get_trials()
    measured = divergences(study)
    plans = {json.dumps(plan.assignment): plan for plan in study.plans() if plan.id in measured}
    assert len(trials) == len(plans) > 5
    for trial in trials:
        attributes = trial.user_attrs
        plan = plans[attributes["plan"]]
        record = measured[plan.id]
        assert trial.values == [plan.effective_bits, record.value]
        assert (attributes["kl_low"], attributes["kl_high"]) == record.interval
        assert attributes["kl_divergence"] == record.value
        assert attributes["stored_bytes"] == plan.stored_bytes
        assert attributes["predicted_loss"] == plan.predicted_loss
        gap = record.value / plan.predicted_loss if plan.predicted_loss else None
        assert attributes.get("measured_over_predicted") == gap  # nothing is lost by "none"
        assert attributes["sequences"] == 2


def test_parameters_are_the_shares_of_weights_in_each_format(
    study: autoq.Study, found: optuna.Study
) -> None:
    weights = {row["name"]: row["weights"] for row in study.summary()["groups"]}
    for trial in found.trials:
        plan = json.loads(trial.user_attrs["plan"])
        for name, share in trial.params.items():
            fmt = name.removeprefix("share in ")
            taken = sum(weights[group] for group, taken_by in plan.items() if taken_by == fmt)
            assert share == taken / sum(weights.values())
        assert sum(trial.params.values()) == pytest.approx(1.0)


def test_trials_are_dated_when_they_were_measured(study: autoq.Study, found: optuna.Study) -> None:
    measured = {record.created[:19] for record in divergences(study).values()}
    assert {trial.datetime_complete.isoformat()[:19] for trial in found.trials} <= measured


def test_the_plan_that_was_asked_for_is_told_from_those_that_check_the_prediction(
    found: optuna.Study,
) -> None:
    sources = {trial.user_attrs["label"]: trial.user_attrs["source"] for trial in found.trials}
    assert sources.pop("6 bits") == "asked"
    assert set(sources.values()) == {"validation"}


def test_metrics_have_names_and_the_study_says_whose_it_is(
    study: autoq.Study, found: optuna.Study
) -> None:
    assert found.metric_names == ["effective bits", "KL divergence"]
    assert found.user_attrs["autoq_study"] == study.name
    assert found.study_name == f"{study.name} · measured plans"


# Once more


def test_preparing_twice_changes_nothing(study: autoq.Study, found: optuna.Study) -> None:
    before, files = everything(found), contents(artifact_folder(study.store))
    assert everything(shown(study.store)) == before
    assert contents(artifact_folder(study.store)) == files


def test_a_plan_that_is_measured_later_is_added(own: autoq.Study, found: optuna.Study) -> None:
    own.measure(own.solve(7.5), sequences=2)
    before, after = everything(found), everything(shown(own.store))
    assert after[0] == before[0]
    assert after[1][:-1] == before[1]
    assert after[1][-1][4]["label"] == "7.5 bits"


def change_a_number(study: autoq.Study, value: float) -> str:
    """Let one plan have another divergence on the same tokens; the plan."""
    record = next(iter(divergences(study).values()))
    study.store.add_measurement(
        study.id,
        plan_id=record.plan_id,
        label=record.label,
        metric="kl_divergence",
        value=value,
        data_sha256=record.data_sha256,
    )
    return json.dumps(study.store.plan(record.plan_id).assignment)


def test_numbers_that_changed_are_changed_in_place(own: autoq.Study, found: optuna.Study) -> None:
    plan = change_a_number(own, 0.125)
    second = shown(own.store)
    assert second._study_id == found._study_id
    for before, after in zip(found.trials, second.trials, strict=True):
        assert (after.number, after._trial_id) == (before.number, before._trial_id)
        assert after.params == before.params
        if after.user_attrs["plan"] == plan:
            assert after.values == [before.values[0], 0.125]
            assert after.user_attrs["kl_divergence"] == 0.125
        else:
            assert (after.values, after.user_attrs) == (before.values, before.user_attrs)
    everything_before = everything(second)
    assert everything(shown(own.store)) == everything_before


def test_what_a_user_wrote_and_attached_survives_numbers_that_changed(
    own: autoq.Study, found: optuna.Study
) -> None:
    from optuna_dashboard import save_note
    from optuna_dashboard.artifact._backend import list_trial_artifacts

    first = optuna.load_study(study_name=found.study_name, storage=trial_storage(own.store.url))
    plan = change_a_number(own, 0.125)
    (trial,) = (trial for trial in first.trials if trial.user_attrs["plan"] == plan)
    handle = optuna.trial.Trial(first, trial._trial_id)
    save_note(first, "my own words")
    save_note(handle, "of this trial")
    files = ArtifactFiles(first, artifact_folder(own.store))  # as the dashboard keeps them
    files.put({"mine.txt": b"mine"})
    files.put({"mine.txt": b"of this trial"}, trial._trial_id)
    second = shown(own.store)
    assert get_note(second) == "my own words"
    assert get_note(optuna.trial.Trial(second, trial._trial_id)) == "of this trial"
    assert artifacts_of(second, artifact_folder(own.store))["mine.txt"] == b"mine"
    (changed,) = (one for one in second.trials if one.user_attrs["plan"] == plan)
    assert changed.values[1] == 0.125
    kept = second._storage.get_study_system_attrs(second._study_id)
    attached = list_trial_artifacts(kept, changed.system_attrs, changed)
    (mine,) = (entry for entry in attached if entry["filename"] == "mine.txt")
    content = (artifact_folder(own.store) / mine["artifact_id"]).read_bytes()
    assert content == b"of this trial"


def test_plans_measured_on_other_tokens_since_are_withdrawn_and_come_back(
    own: autoq.Study, found: optuna.Study
) -> None:
    """The trials are those on the tokens that most plans were measured on."""
    records = list(divergences(own).values())
    kept, gone = records[:-1], records[-1]

    def store_all(records: list[Any], data_sha256: str) -> None:
        for record in records:
            own.store.add_measurement(
                own.id,
                plan_id=record.plan_id,
                label=record.label,
                metric="kl_divergence",
                value=2 * record.value,
                data_sha256=data_sha256,
            )

    # Twice as often on other tokens, since those of before are still stored.
    store_all(kept, "of other tokens")
    for record in kept:
        own.store.add_measurement(
            own.id,
            plan_id=record.plan_id,
            label=f"{record.label} again",
            metric="kl_divergence",
            value=2 * record.value,
            data_sha256="of other tokens",
        )
    second = shown(own.store)
    states = {trial.user_attrs["plan"]: trial.state.name for trial in second.trials}
    lost = json.dumps(own.store.plan(gone.plan_id).assignment)
    assert states.pop(lost) == "FAIL"
    assert set(states.values()) == {"COMPLETE"}
    assert len(second.trials) == len(found.trials)
    store_all([gone], "of other tokens")
    third = shown(own.store)
    values = {trial.user_attrs["plan"]: trial.values for trial in third.trials}
    assert values[lost][1] == 2 * gone.value
    assert {trial.state.name for trial in third.trials} == {"COMPLETE"}


def test_an_edited_note_stays_and_a_lost_file_comes_back(
    own: autoq.Study, found: optuna.Study
) -> None:
    from optuna_dashboard import save_note

    name, storage = found.study_name, trial_storage(own.store.url)
    save_note(optuna.load_study(study_name=name, storage=storage), "my own words")
    folder = artifact_folder(own.store)
    before = artifacts_of(found, folder)
    shutil.rmtree(folder)
    after = shown(own.store)
    assert get_note(after) == "my own words"
    assert artifacts_of(after, folder) == before


def test_a_study_that_another_process_works_on_is_shown_as_it_was(
    own: autoq.Study, found: optuna.Study
) -> None:
    own.measure(own.solve(7.5), sequences=2)
    with own.store.lease(own.id):
        assert len(shown(own.store).trials) == len(found.trials)


# Notes, plots, files


def test_the_note_says_what_was_searched_and_found(study: autoq.Study, found: optuna.Study) -> None:
    note, summary = get_note(found), study.summary()
    assert f"# {study.name}" in note.replace("\\", "")
    assert "6.0000 effective bits per weight" in note
    assert f"{summary['effective_bits']:.4f} effective bits per weight" in note
    assert f"KL divergence {loss_text(summary['measured']['kl_divergence'])} nats" in note
    assert f"| trials | {len(found.trials)} measured, each on the same 2 sequences" in note
    assert "noise floor | KL divergence" in note


def test_plots_show_every_trial_and_every_layer(study: autoq.Study, found: optuna.Study) -> None:
    from optuna_dashboard._custom_plot_data import get_plotly_graph_objects

    plots = get_plotly_graph_objects(found._storage.get_study_system_attrs(found._study_id))
    assert set(plots) == {"frontier", "predicted-and-measured", "layers"}
    lossy = [trial for trial in found.trials if trial.user_attrs["predicted_loss"] > 0]
    for name in ("frontier", "predicted-and-measured"):
        traces = json.loads(plots[name])["data"]
        measured = [trace for trace in traces if trace["name"].startswith("measured")]
        assert sum(len(trace["x"]) for trace in measured) == len(lossy) > 3
    heat_map = json.loads(plots["layers"])["data"][0]
    cells = [value for row in heat_map["z"] for value in row if value is not None]
    scores = [value for row in study.summary()["groups"] for value in row["scores"].values()]
    assert len(cells) == sum(value is not None and value > 0 for value in scores)


def test_files_hold_the_plan_the_heat_map_and_the_report(
    study: autoq.Study, found: optuna.Study
) -> None:
    files = artifacts_of(found, artifact_folder(study.store))
    plan = study.plan()
    assert set(files) == {"plan.csv", "plan.json", "heat-map.png", "heat-map.html", "report.html"}
    assert json.loads(files["plan.json"])["groups"] == plan.assignment
    assert json.loads(files["plan.json"])["assignment"] == study.summary()["assignment"]
    rows = csv.DictReader(io.StringIO(files["plan.csv"].decode()))
    assert {row["name"]: row["format"] for row in rows} == plan.assignment
    assert files["heat-map.png"].startswith(b"\x89PNG")
    assert files["report.html"].startswith(b"<!DOCTYPE html>")
    assert study.name.encode() in files["heat-map.html"]


def test_best_trials_have_their_own_plan(study: autoq.Study, found: optuna.Study) -> None:
    from optuna_dashboard.artifact._backend import list_trial_artifacts

    kept = found._storage.get_study_system_attrs(found._study_id)
    folder = artifact_folder(study.store)
    for trial in found.best_trials:
        files = {
            entry["filename"]: (folder / entry["artifact_id"]).read_bytes()
            for entry in list_trial_artifacts(kept, {}, trial)
        }
        written = json.loads(files["plan.json"])
        assert written["groups"] == json.loads(trial.user_attrs["plan"])
        assert written["trial"] == trial.number
        assert set(files) == {"plan.csv", "plan.json"}


def test_nothing_that_is_shown_holds_a_database_url(
    study: autoq.Study, found: optuna.Study
) -> None:
    assert "sqlite:" not in json.dumps(everything(found), default=str)
    files = contents(artifact_folder(study.store))
    assert files and all(b"sqlite:" not in content for content, _ in files.values())


# What cannot be


def test_a_study_that_is_not_finished_is_skipped_with_its_reason(own: autoq.Study) -> None:
    own.store.reset_stage(own.id, "sensitivity")
    prepared = prepare_store(own.store)
    assert prepared.shown == ()
    ((name, reason),) = prepared.skipped
    assert name == own.name
    assert "has not finished its sensitivity" in reason


def test_somebody_elses_optuna_study_of_the_name_is_left_alone(
    measured_store: Path, tmp_path: Path
) -> None:
    url = f"sqlite:///{shutil.copy(measured_store, tmp_path)}"
    with StudyStore.open(url) as store:
        name = f"{autoq.open_study(None, store).name} · measured plans"
        theirs = optuna.create_study(study_name=name, storage=trial_storage(store.url))
        assert "was not made by autoq" in prepare_store(store).skipped[0][1]
    assert theirs.trials == []


def test_a_store_without_a_study_is_refused(tmp_path: Path) -> None:
    with (
        StudyStore.open(f"sqlite:///{tmp_path / 'empty.db'}") as empty,
        pytest.raises(UnknownNameError, match="has no study yet; make one"),
    ):
        prepare_store(empty)


def test_an_artifact_folder_that_is_a_file_is_refused(study: autoq.Study, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(InputError, match=r"cannot be one .*; name another with --artifacts"):
        prepare_store(study.store, tmp_path / "taken")


def test_only_sqlite_files_have_a_folder_beside_them(tmp_path: Path) -> None:
    database: Any = SimpleNamespace(file=None, described="study store postgresql://u:***@h/d")
    with pytest.raises(InputError, match=r"u:\*\*\*@h/d need a folder.*--artifacts DIR"):
        artifact_folder(database)
    assert artifact_folder(database, tmp_path) == tmp_path


def test_missing_packages_are_named(study: autoq.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "optuna_dashboard" else find(name, *rest),
    )
    with pytest.raises(InputError, match=r"needs optuna-dashboard, .*'autoq\[dashboard\]'"):
        prepare_store(study.store)
