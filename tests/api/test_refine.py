"""Refining by measuring: how the procedure goes, on which data, and what is believed in the end."""

from __future__ import annotations

import json

import numpy as np
import pytest

import autoq
from autoq.api import open_study
from autoq.api.refinement._data import Confirmations, refine_data
from autoq.api.refinement.refining import RefineOptions
from autoq.errors import InputError
from autoq.search import effective_bits
from autoq.search.refine import Refinement
from autoq.search.sampling import random_plans
from autoq.studies import (
    WorkStatus,
)
from tests.api.refinements import SMALL, entries, open_with, the_second_is_a_finalist


def test_the_three_parts_of_the_data_share_no_sequence(study):
    data = refine_data(study, RefineOptions(**SMALL))
    rows = [tuple(row) for part in (data.selection, data.fresh, data.report) for row in part.ids]
    assert len(rows) == len(set(rows)) == 4 + 4 + 2
    assert data.remark is None


def test_without_further_tokens_the_held_out_part_is_split_and_that_is_said(
    llama_folder, quick, tmp_path
):
    ids = np.random.default_rng(0).integers(4, 260, (32, 32))
    np.save(tmp_path / "ids.npy", ids)  # 24 sequences to calibrate on, 8 held out
    quick |= {"calibration_sequences": 24, "calibration_data": str(tmp_path / "ids.npy")}
    found = autoq.search(llama_folder, **quick)
    options = RefineOptions(sequences=4, fresh_sequences=16, held_out_sequences=8)
    data = refine_data(found, options)
    assert (len(data.fresh.ids), len(data.report.ids)) == (4, 4)
    assert {tuple(row) for row in data.fresh.ids}.isdisjoint(tuple(row) for row in data.report.ids)
    assert "held-out part is split" in data.remark


def test_a_refinement_measures_as_many_plans_as_asked_each_within_the_budget(study):
    result = study.refine(trials=6, **SMALL)
    found = entries(study)
    assert result.trials == len(found) == 6
    assert found[0][1] == "start"
    assert json.loads(found[0][0]) == study.unrefined_plan().assignment
    assert len({plan for plan, *_ in found}) == 6
    costs = study.costs()
    assert all(effective_bits(costs, json.loads(plan)) <= 6.0 for plan, *_ in found)


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(copy_of):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        again = copy_of(f"{name}.db")
        again.refine(trials=5, seed=seed, **SMALL)
        found.append(entries(again, seed=seed))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_more_trials_go_on_where_fewer_ended(study):
    study.refine(trials=3, **SMALL)
    first = entries(study)
    result = study.refine(trials=6, **SMALL)
    assert entries(study)[:3] == first
    assert result.trials == 6
    assert study.refine(trials=6, **SMALL).as_plain() == result.as_plain()


def test_a_better_plan_is_taken_from_then_on_and_the_start_stays_beside_it(study, monkeypatch):
    from autoq.api.refinement import _decide as _refine_decide
    from autoq.api.refinement import _fresh as _refine_fresh
    from autoq.search.refine import Verdict

    start = study.unrefined_plan()

    def generous(*_args, **_options):
        return Verdict(better=True, difference=-1.0, low=-2.0, high=-0.5, reason="better")

    monkeypatch.setattr(_refine_fresh, "accepted", generous)
    the_second_is_a_finalist(monkeypatch)
    monkeypatch.setattr(_refine_decide, "is_worse", lambda *_: False)
    result = study.refine(trials=2, **SMALL)
    assert result.improved
    assert result.plan.label == "6 bits, refined"
    assert study.plan().id == study.plan(6.0).id == result.plan.id
    assert study.plan().assignment == json.loads(entries(study)[1][0])
    assert study.unrefined_plan().id == start.id
    summary = study.summary()
    assert summary["refined_from"] == "6 bits"
    labels = [row["label"] for row in summary["measurements"]]
    assert labels == ["6 bits", "6 bits, refined"]
    assert open_study(None, study.store.url).plan().id == result.plan.id


def test_what_wins_by_luck_is_not_kept(study):
    """Tiny random models: with four sequences nothing is significant, and that is said."""
    result = study.refine(trials=5, **SMALL)
    if not result.improved:
        assert study.plan().id == study.unrefined_plan().id
        assert result.verdict["reason"]
        assert "refined" not in result.verdict["held_out"]


def test_a_search_can_refine_at_its_end(llama_folder, quick, tmp_path):
    options = {key: value for key, value in SMALL.items() if key != "held_out_sequences"}
    study = autoq.search(
        llama_folder, **quick, refine=3, refine_options=options, export=tmp_path / "out"
    )
    assert len(entries(study)) == 3
    assert study.summary()["export"]["path"] == str(tmp_path / "out")


def test_other_tokens_are_not_mixed_into_a_refinement(study):
    study.refine(trials=2, **SMALL)
    open_with(study).set_user_attr("selection_sha256", "of other tokens")
    with pytest.raises(InputError, match="measured on other tokens"):
        study.refine(trials=3, **SMALL)


def test_the_last_verdict_decides_which_plan_is_taken(study):
    start = study.unrefined_plan()
    other = study.add_plan("another", random_plans(study.sensitivity, study.costs(), count=1)[0])
    study.set_refined(start, other)
    assert study.refined(start).id == other.id
    assert study.store.study(study.id).status is WorkStatus.DONE
    study.set_refined(start, start)
    assert study.refined(start).id == start.id


def test_what_an_earlier_refinement_found_is_measured_again_beside_the_others(study):
    start = study.unrefined_plan()
    other = study.add_plan("another", random_plans(study.sensitivity, study.costs(), count=1)[0])
    study.set_refined(start, other)
    result = study.refine(trials=2, **SMALL)
    assert -1 in [row["trial"] for row in result.verdict["finalists"]]
    assert study.refined(start).id == result.plan.id


# Confirming more than once


def test_another_confirmation_takes_tokens_that_none_has_used(study, monkeypatch):
    """Whatever the aim: the verdicts are about the same plan."""
    the_second_is_a_finalist(monkeypatch)
    found = [
        study.refine(trials=trials, objective=objective, **SMALL).verdict
        for trials, objective in ((2, "kl"), (3, "kl"), (2, "ppl"))
    ]
    assert [verdict["confirmations"] for verdict in found] == [1, 2, 3]
    parts = [
        refine_data(study, RefineOptions(**SMALL), Confirmations(count=n, sequences=4 * n))
        for n in range(3)
    ]
    for verdict, part in zip(found, parts, strict=True):
        assert verdict["fresh"]["data_sha256"] == part.fresh.sha256
        assert verdict["remark"] is None
    rows = [tuple(row) for part in parts for row in part.fresh.ids]
    assert len(set(rows)) == 3 * 4
    again = study.refine(trials=3, **SMALL)  # nothing is new: nothing is used up
    assert again.verdict["confirmations"] == 2


def test_where_nothing_beside_the_start_is_confirmed_no_tokens_are_used_up(study, monkeypatch):
    monkeypatch.setattr(Refinement, "finalists", lambda self, finished: finished[:1])
    first, second = (study.refine(trials=trials, **SMALL).verdict for trials in (2, 3))
    assert first["fresh"] == second["fresh"]


def test_where_all_tokens_were_used_the_same_are_used_again_and_that_is_said(
    llama_folder, quick, tmp_path, monkeypatch
):
    the_second_is_a_finalist(monkeypatch)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(4, 260, (32, 32)))
    # 24 sequences to calibrate on; 16 are, so that there is one set of 8
    quick |= {"calibration_sequences": 16, "calibration_data": str(tmp_path / "ids.npy")}
    study = autoq.search(llama_folder, **quick)
    options = {**SMALL, "fresh_sequences": 8}
    first, second = (study.refine(trials=trials, **options).verdict for trials in (2, 3))
    assert first["remark"] is None
    assert second["fresh"] == first["fresh"]
    assert "on the same tokens again (confirmation 2)" in second["remark"]
