"""Validation: plans measured once, stored, resumed, and put to use."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autoq
from autoq.api import measuring
from autoq.api.measuring import PlanMeasurer
from autoq.errors import InputError, StudyLockedError
from autoq.evaluators import calibrate_prediction, compare
from autoq.studies import StudyStore

QUICK = {"random": 3, "near": 6, "sequences": 2}


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may swallow it."""


@pytest.fixture
def study(llama_folder: Path, quick: Any) -> Any:
    return autoq.search(llama_folder, **quick)


@pytest.fixture
def measured_labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the plans that are really measured, in order."""
    labels: list[str] = []
    measure = PlanMeasurer.measure_silently

    def remembering(self: PlanMeasurer, plan: Any, advance: Any) -> Any:
        labels.append(plan.label)
        return measure(self, plan, advance)

    monkeypatch.setattr(PlanMeasurer, "measure_silently", remembering)
    return labels


def test_it_measures_random_and_near_optimal_plans(study: Any) -> None:
    found = study.validate(**QUICK)
    assert json.loads(json.dumps(found)) == found == study.validation
    kinds = [row["kind"] for row in found["plans"]]
    assert (kinds.count("random"), kinds.count("near")) == (3, 6)
    assert (found["sequences"], found["tokens"]) == (2, 64)
    assert {name: row["plans"] for name, row in found["quality"].items()} == {
        "all": 9,
        "random": 3,
        "near": 6,
    }
    assert 0.5 < found["quality"]["all"]["rank_correlation"] <= 1.0
    assignments = [study.store.plan(row["plan_id"]).assignment for row in found["plans"]]
    assert len({tuple(sorted(each.items())) for each in assignments}) == 9
    assert study.plan().assignment in assignments


def test_what_it_measures_is_what_measuring_alone_gives(study: Any) -> None:
    found = study.validate(**QUICK)
    for row in found["plans"][::4]:
        plan = study.store.plan(row["plan_id"])
        assert plan.predicted_loss == row["predicted"]["value"]
        alone = study.measure(plan, sequences=2).kl_divergence
        assert row["measured"] == {"value": alone.value, "low": alone.low, "high": alone.high}


def test_the_model_has_its_own_weights_again(study: Any) -> None:
    before = {name: value.clone() for name, value in study.loaded().model.state_dict().items()}
    study.validate(**QUICK)
    after = study.loaded().model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any("forward" in vars(module) for module in study.loaded().model.modules())


def test_the_line_corrects_the_predicted_loss(study: Any) -> None:
    assert study.summary()["predicted_calibrated"] is None
    found = study.validate(**QUICK)
    near = [row for row in found["plans"] if row["kind"] == "near"]
    line = calibrate_prediction(
        [row["predicted"]["value"] for row in near], [row["measured"]["value"] for row in near]
    )
    assert line is not None
    expected = math.exp(line.intercept) * study.plan().predicted_loss ** line.slope
    summary = study.summary()
    assert summary["predicted_calibrated"]["value"] == pytest.approx(expected)
    assert summary["validation"] == found
    assert found["calibrated_on"] == "near"


def test_few_near_optimal_plans_calibrate_with_the_random_ones(study: Any) -> None:
    found = study.validate(random=6, near=2, sequences=2)
    assert found["calibrated_on"] == "all"
    # A plan without loss has no logarithm.
    positive = [row for row in found["plans"] if row["predicted"]["value"] > 0.0]
    assert found["calibration"]["plans"] == len(positive) >= 5
    few = study.validate(random=2, near=2, sequences=2)
    assert few["calibration"] is None
    assert study.summary()["predicted_calibrated"] is None


@pytest.mark.parametrize("killed_at", [0, 7])
def test_killed_it_goes_on_with_the_plan_that_it_lost(
    study: Any, llama_folder: Path, quick: Any, tmp_path: Path, killed_at: int,
    monkeypatch: pytest.MonkeyPatch, measured_labels: list[str],
) -> None:  # fmt: skip
    whole = study.validate(**QUICK)
    other = autoq.search(llama_folder, **{**quick, "store": f"sqlite:///{tmp_path / 'b.db'}"})
    other.validate(random=2, near=0, sequences=2, seed=9)
    earlier = other.validation
    remembering = PlanMeasurer.measure_silently

    def killing(self: PlanMeasurer, plan: Any, advance: Any) -> Any:
        if len(measured_labels) == killed_at:
            raise Killed
        return remembering(self, plan, advance)

    measured_labels.clear()
    monkeypatch.setattr(PlanMeasurer, "measure_silently", killing)
    with pytest.raises(Killed):
        other.validate(**QUICK)
    assert other.validation == earlier
    monkeypatch.setattr(PlanMeasurer, "measure_silently", remembering)
    resumed = other.validate(**QUICK)
    assert len(measured_labels) == len(set(measured_labels))
    assert without_ids(resumed) == without_ids(whole)


def without_ids(found: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {k: v for k, v in row.items() if k not in ("plan_id", "label")} for row in found["plans"]
    ]
    return {**found, "plans": rows}


def test_again_it_measures_nothing(study: Any, measured_labels: list[str]) -> None:
    first = study.validate(**QUICK)
    measured_labels.clear()
    assert study.validate(**QUICK) == first
    assert measured_labels == []
    # The study's own plan and those of equal budgets are known; random ones are drawn anew.
    study.validate(random=4, near=6, sequences=2)
    assert 0 < len(measured_labels) <= 4


def test_a_plan_measured_by_the_search_is_not_measured_again(
    study: Any, quick: Any, measured_labels: list[str]
) -> None:
    found = study.validate(random=0, near=6, sequences=quick["held_out_sequences"])
    own = study.plan()
    assert own.id in [row["plan_id"] for row in found["plans"]]
    assert len(measured_labels) == 5


def test_the_original_runs_once_for_all_plans(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards: list[int] = []
    forward = measuring.forward_logits

    def counting(model: Any, ids: Any) -> Any:
        forwards.append(1)
        return forward(model, ids)

    monkeypatch.setattr(measuring, "forward_logits", counting)
    found = study.validate(random=3, near=3, sequences=4)  # two batches of two
    # The floor needs the original and a noisy run; then every plan runs alone.
    assert len(forwards) == 2 * (2 + len(found["plans"]))


def test_validated_plans_are_nobodys_choice(study: Any, quick: Any) -> None:
    before = study.summary()
    study.validate(**QUICK)
    after = study.summary()
    for key in ("measured", "measurements", "budget", "assignment", "noise_floor"):
        assert after[key] == before[key]
    assert autoq.list_studies(quick["store"])[0]["budgets"] == [6.0]
    assert autoq.list_studies(quick["store"])[0]["status"] == "done"
    assert "validation" in after["timings_s"]


@pytest.mark.parametrize(("random", "near"), [(0, 0), (1, 0), (0, 1), (-1, 5), (5, -1)])
def test_fewer_than_two_plans_are_refused(study: Any, random: int, near: int) -> None:
    with pytest.raises(InputError, match="a validation needs two plans at least"):
        study.validate(random=random, near=near)


def test_another_process_keeps_its_study(study: Any, quick: Any) -> None:
    with (
        StudyStore.open(quick["store"]) as other,
        other.lease(study.id),
        pytest.raises(StudyLockedError),
    ):
        study.validate(**QUICK)


def test_rules_bind_validated_plans(llama_folder: Path, quick: Any) -> None:
    study = autoq.search(llama_folder, **quick, rules=("*down_proj=fp8",))
    found = study.validate(**QUICK)
    for row in found["plans"]:
        assignment = study.store.plan(row["plan_id"]).assignment
        down = [fmt for group, fmt in assignment.items() if group.endswith("down_proj")]
        assert down == ["fp8"] * len(down) != []


def test_neighbours_keep_to_the_study_s_budgets(llama_folder: Path, quick: Any) -> None:
    study = autoq.search(llama_folder, **quick)
    stored_gb = study.plan().takes["stored_bytes"] / 1e9
    tight = autoq.search(
        llama_folder, **{**quick, "effective_bits": None}, max_gb=stored_gb, max_latency_ms=1e3,
        gpu="h100",
    )  # fmt: skip
    assert set(tight.plan().budgets) == {"stored_bytes", "latency_seconds"}
    found = tight.validate(random=0, near=6, sequences=2)
    around = found["plans"][4:]  # after those at evenly spaced budgets and the study's own
    assert around
    for row in around:
        assert row["effective_bits"] <= tight.plan().effective_bits
        assert tight.store.plan(row["plan_id"]).takes["stored_bytes"] <= stored_gb * 1e9


def test_search_measures_the_noise_floor_once(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = autoq.search(llama_folder, **quick, compare_uniform=True)
    floor = study.summary()["noise_floor"]
    rows = [r for r in study.store.measurements(study.id) if r.label == "noise floor"]
    assert {row.metric for row in rows} >= {"kl_divergence", "top1_agreement"}
    assert all(row.plan_id is None for row in rows)
    assert 0.0 < floor["value"] < study.summary()["measured"]["kl_divergence"]
    assert floor["low"] <= floor["value"] <= floor["high"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measuring, "rounding_noise", refuse)
    study.measure(study.solve(7.0), sequences=2)
    with pytest.raises(AssertionError, match="measured again"):  # other tokens have their own
        study.measure(study.solve(7.0), sequences=1)


def test_measured_plans_are_compared_sequence_by_sequence(llama_folder: Path, quick: Any) -> None:
    options = {**quick, "held_out_sequences": 6, "compare_uniform": True}
    study = autoq.search(llama_folder, **options)
    summary = study.summary()
    stored = {
        record.plan_id: record.details["per_sequence"]
        for record in study.store.measurements(study.id)
        if record.metric == "kl_divergence"
    }
    own = study.plan()
    for row in summary["measurements"]:
        plan = next(plan for plan in study.plans() if plan.label == row["label"])
        values = stored[plan.id]
        assert np.mean(values) == pytest.approx(row["metrics"]["kl_divergence"]["value"])
        if plan.id == own.id:
            assert row["this_plan"] is None
            continue
        expected = compare(stored[own.id], values, summary["noise_floor"]["value"])
        assert row["this_plan"]["difference"] == pytest.approx(expected.difference)
        assert row["this_plan"]["verdict"] == expected.verdict
    verdicts = {row["label"]: row["this_plan"] for row in summary["measurements"]}
    assert verdicts["uniform nvfp4"]["verdict"] == "better"


def test_plans_on_other_tokens_are_not_compared(study: Any) -> None:
    study.measure(study.uniform("fp8"), sequences=1)
    rows = {row["label"]: row for row in study.summary()["measurements"]}
    assert rows["uniform fp8"]["this_plan"] is None


def test_evaluating_a_study_tells_the_noise_floor(study: Any, quick: Any) -> None:
    found = autoq.evaluate(study.name, store=quick["store"], sequences=2)
    assert found["noise_floor"] == study.summary()["noise_floor"]
