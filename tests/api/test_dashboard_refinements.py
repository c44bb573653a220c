"""Refinements in Optuna's dashboard: their best trials, their result, the refined plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import autoq
from autoq.api.dashboards.dashboard import annotate, artifact_folder, prepare_store
from autoq.studies import StudyStore, trial_storage

get_note = pytest.importorskip("optuna_dashboard").get_note
optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def study(measured_store: Path, tmp_path: Path) -> Iterator[autoq.Study]:
    """A study with a plan of 6 bits."""
    url = f"sqlite:///{shutil.copy(measured_store, tmp_path / 'autoq.db')}"
    with StudyStore.open(url) as store:
        yield autoq.open_study(None, store)


@pytest.fixture
def refined(study: autoq.Study) -> optuna.Study:
    """A refinement of the study's plan with a better trial, a worse one and one stopped early."""
    found = optuna.create_study(
        study_name=f"{study.name} · 6 bits",
        storage=trial_storage(study.store.url),
        direction="minimize",
    )
    for name, value in {"autoq_study": study.name, "autoq_plan": "6 bits"}.items():
        found.set_user_attr(name, value)
    plan = json.dumps(study.plan().assignment)
    state = optuna.trial.TrialState
    for source, value, ended in (
        ("start", 0.5, state.COMPLETE),
        ("swap", 0.25, state.COMPLETE),
        ("diverse", 0.75, state.COMPLETE),
        ("multipliers", 0.875, state.PRUNED),
    ):
        attributes = {
            "plan": plan,
            "source": source,
            "effective_bits": 6.0,
            "predicted_loss": 0.5,
            "kl_divergence": value,
            "kl_low": value - 0.125,
            "kl_high": value + 0.125,
            "sequences": 2 if ended == state.COMPLETE else 1,
        }
        found.add_trial(optuna.trial.create_trial(state=ended, value=value, user_attrs=attributes))
    return found


def test_a_refinement_is_shown_instead_of_measured_plans(
    study: autoq.Study, refined: optuna.Study
) -> None:
    prepared = prepare_store(study.store)
    assert (prepared.shown, prepared.skipped) == ((refined.study_name,), ())
    names = {entry.study_name for entry in prepared.storage.get_all_studies()}
    assert names == {refined.study_name}


def test_the_note_of_a_refinement_ranks_its_trials(
    study: autoq.Study, refined: optuna.Study
) -> None:
    annotate(study, refined, artifacts=None)
    note = get_note(refined)
    assert "Refinement of the plan *6 bits*" in note
    assert "3 measured, each on the same 2 sequences; 1 stopped early or not finished" in note
    ranked = [
        line.split(" | ")[0] for line in note.splitlines() if line[:3] in ("| 0", "| 1", "| 2")
    ]
    assert ranked == ["| 1", "| 0", "| 2"]
    assert "**result**" not in note


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"accepted": False, "reason": "all are ties"}, "The start is kept: all are ties."),
        (
            {
                "accepted": True,
                "reason": "",
                "held_out": {"start": {"value": 0.5}, "refined": {"value": 0.25}},
            },
            "A better plan was found: KL divergence 0.2500 on held-out",
        ),
        (
            {
                "accepted": True,
                "reason": "",
                "objective": "ppl",
                "held_out": {
                    "start": {"value": 0.5},
                    "refined": {"value": 0.75},
                    "refined_is": "tie",
                },
            },
            (
                "A better plan was found by ppl: KL divergence 0.7500 on held-out tokens, where the "
                "start has 0.5000, a tie."
            ),
        ),
    ],
)
def test_the_note_of_a_refinement_tells_its_result(
    study: autoq.Study, refined: optuna.Study, result: dict[str, Any], words: str
) -> None:
    refined.set_user_attr("result", json.dumps(result))
    annotate(study, refined, artifacts=None)
    assert f"| **result** | **{words}" in get_note(refined)


def test_files_of_a_refinement_have_the_refined_plan(
    study: autoq.Study, refined: optuna.Study
) -> None:
    better = study.solve(7.5)
    refined.set_user_attr(
        "result", json.dumps({"accepted": False, "reason": "-", "plan_id": better.id})
    )
    folder = artifact_folder(study.store)
    annotate(study, refined, artifacts=folder)
    entries = {e.filename: e.artifact_id for e in optuna.artifacts.get_all_artifact_meta(refined)}
    written = json.loads((folder / entries["plan.json"]).read_text())
    assert (written["plan"], written["groups"]) == ("7.5 bits", better.assignment)


def test_trials_that_others_added_without_our_attributes_are_left_out(
    study: autoq.Study, refined: optuna.Study
) -> None:
    refined.add_trial(optuna.trial.create_trial(value=1.0, user_attrs={"kl_divergence": "much"}))
    annotate(study, refined, artifacts=None)
    assert "3 measured" in get_note(refined)
