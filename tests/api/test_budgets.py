"""Budgets in bytes, active bits, time and quality, alone and together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import autoq
from autoq.api import budgets as budgets_module
from autoq.api.budgets import Budgets
from autoq.api.quality import _Bracket, _close_in
from autoq.errors import (
    InputError,
    QualityInfeasibleError,
    ResourceInfeasibleError,
    UnknownNameError,
)
from autoq.search.sensitivity import SensitivityScorer
from autoq.testing.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def mixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("qwen3_moe", tmp_path_factory.mktemp("models") / "mixture")


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """All budgets share one scoring pass."""
    return f"sqlite:///{tmp_path_factory.mktemp('stores') / 'studies.db'}"


@pytest.fixture
def unlimited(quick: Any, shared_store: str) -> dict[str, Any]:
    """Arguments of a quick search without a budget."""
    del quick["effective_bits"]
    return {**quick, "store": shared_store}


def tensor_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            total += sum(file.get_tensor(name).nbytes for name in names)
    return total


def test_a_checkpoint_within_a_size_is_as_large_as_was_said(
    llama_folder: Path, unlimited: Any, tmp_path: Path
) -> None:
    study = autoq.search(
        llama_folder, **unlimited, max_gb=0.00035, export=tmp_path / "out", measure=False
    )
    summary = study.summary()
    assert summary["budgets"] == {"stored_bytes": 350_000.0}
    assert summary["takes"]["stored_bytes"] == tensor_bytes(tmp_path / "out") <= 350_000
    assert study.plan().label == "0.00035 GB"
    # With what it takes and a byte less there is another, and with no more room the same.
    takes = summary["takes"]["stored_bytes"]
    assert study.solve(max_gb=takes / 1e9).assignment == study.plan().assignment
    less = study.solve(max_gb=(takes - 1) / 1e9)
    assert less.takes["stored_bytes"] < takes
    assert less.predicted_loss > study.plan().predicted_loss


def test_several_budgets_hold_at_once(mixture_folder: Path, unlimited: Any) -> None:
    study = autoq.search(
        mixture_folder,
        **unlimited,
        effective_bits=8.0,
        max_active_bits=6.0,
        max_latency_ms=2.0,
        gpu="h200",
        latency_tokens=4,
        measure=False,
    )
    plan = study.plan()
    assert plan.budgets == {"effective_bits": 8.0, "active_bits": 6.0, "latency_seconds": 0.002}
    assert plan.takes["active_bits"] <= 6.0 < study.solve(8.0).takes["active_bits"]
    assert plan.label == "8 bits, 6 active bits, 2 ms, h200 at 4 tokens"
    assert plan.details["latency"]["tokens"] == 4
    # Each token goes to two of the four experts, in each of the two layers.
    shares = study.token_shares
    assert shares is not None
    experts = [name for name in study.model_map.slots if ".experts." in name]
    gate_up = [shares[name] for name in experts if name.endswith("gate_up_proj")]
    assert sum(gate_up) == pytest.approx(2 * 2)


def test_other_hardware_is_another_plan_of_the_same_study(
    llama_folder: Path, unlimited: Any, tmp_path: Path
) -> None:
    study = autoq.search(llama_folder, **unlimited, effective_bits=6.0, measure=False)
    on_h200 = study.solve(6.0, gpu="h200")
    on_a100 = study.solve(6.0, gpu="a100")
    assert on_h200.takes["latency_seconds"] < on_a100.takes["latency_seconds"]
    assert "latency_seconds" not in study.solve(6.0).takes
    row = {
        "operation": "fp8.linear",
        "variant": "input scale given",
        "shape": {"m": 1, "n": 256, "k": 128},
        "milliseconds": 1.0,
        "baselines": {"bf16": {"milliseconds": 2.0}},
    }
    table = tmp_path / "times.json"
    rows = [row, {**row, "operation": "nvfp4.linear", "variant": "input quantised"}]
    table.write_text(json.dumps({"benchmark": "autoq kernels", "format": 1, "rows": rows}))
    measured = study.solve(6.0, latency_table=table)
    # Every shape takes 1 ms for 256 * 128 weights in both formats; nothing is left unquantised.
    assert "none" not in measured.assignment.values()
    weights = sum(slot.weights for slot in study.model_map.slots.values())
    assert measured.takes["latency_seconds"] == pytest.approx(1e-3 * weights / (256 * 128))


def test_the_smallest_model_that_keeps_a_measured_divergence(
    llama_folder: Path, unlimited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = autoq.search(llama_folder, **unlimited, max_kl=0.02)
    summary = study.summary()
    assert summary["budgets"] == {"kl_divergence": 0.02}
    assert summary["least"]["bound"] <= summary["effective_bits"] == summary["least"]["value"]
    listed = autoq.list_studies(unlimited["store"])
    entry = next(entry for entry in listed if entry["name"] == study.name)
    assert "0.02 KL" in entry["other_budgets"]
    # Nobody asked for the bits of the plans that were tried; other tests ask this study for 6.
    assert entry["budgets"] in ([], [6.0])
    assert summary["measured"]["kl_divergence"] <= 0.02
    measured = {
        record.plan_id: record.value
        for record in study.store.measurements(study.id)
        if record.metric == "kl_divergence"
    }
    trials = [plan for plan in study.plans() if plan.label.startswith("KL 0.02, predicted")]
    assert len(trials) >= 2  # one was not enough to know
    smaller = [plan for plan in trials if plan.effective_bits < summary["effective_bits"]]
    assert all(measured[plan.id] > 0.02 for plan in smaller)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(SensitivityScorer, "score_batch", refuse)
    monkeypatch.setattr("autoq.api.measuring.PlanMeasurer.measure", refuse)
    again = autoq.search(llama_folder, **unlimited, max_kl=0.02)
    assert again.plan().id == study.plan().id


def test_a_wide_limit_ends_with_the_smallest_plan_of_all(
    llama_folder: Path, unlimited: Any
) -> None:
    study = autoq.search(llama_folder, **unlimited, max_kl=20.0)
    assert set(study.plan().assignment.values()) == {"nvfp4"}


def test_divergence_that_no_plan_reaches_names_the_best(llama_folder: Path, unlimited: Any) -> None:
    with pytest.raises(
        QualityInfeasibleError,
        match=r"measured KL divergence of at most 1e-09 cannot .* best reachable is 0\.0",
    ):
        autoq.search(llama_folder, **unlimited, max_kl=1e-9, rules=("*=fp8,nvfp4",))
    with pytest.raises(QualityInfeasibleError, match=r"predicted loss of at most 1e-09"):
        autoq.search(llama_folder, **unlimited, max_kl=1e-9, rules=("*=fp8,nvfp4",), measure=False)


def test_a_search_without_a_plan_leaves_the_one_before(
    llama_folder: Path, unlimited: Any, tmp_path: Path
) -> None:
    unlimited = {**unlimited, "store": f"sqlite:///{tmp_path / 'own.db'}", "measure": False}
    rules = ("*=fp8,nvfp4",)
    first = autoq.search(llama_folder, **unlimited, effective_bits=6.0, rules=rules)
    with pytest.raises(QualityInfeasibleError):
        autoq.search(llama_folder, **unlimited, max_kl=1e-9, rules=rules)
    reopened = autoq.open_study(store=unlimited["store"])
    assert reopened.plan().id == first.plan().id and reopened.rules == rules


def test_a_divergence_can_be_limited_within_a_size(llama_folder: Path, unlimited: Any) -> None:
    study = autoq.search(llama_folder, **unlimited, max_kl=0.05, max_gb=0.0006, measure=False)
    plan = study.plan()
    assert plan.label == "0.0006 GB, KL 0.05, predicted"
    assert plan.predicted_loss <= 0.05 and plan.takes["stored_bytes"] <= 600_000
    assert study.summary()["budgets"] == {"stored_bytes": 600_000.0, "kl_divergence": 0.05}


REFUSED = [
    pytest.param({"max_gb": 1e-5}, ResourceInfeasibleError, "10000 stored bytes", id="bytes"),
    pytest.param({"max_active_bits": 4}, ResourceInfeasibleError, "4 active bits", id="active"),
    pytest.param(
        {"max_latency_ms": 1e-9, "gpu": "h200"}, ResourceInfeasibleError, "latency", id="time"
    ),
    pytest.param({"max_latency_ms": 1}, InputError, "name it with --gpu", id="nowhere"),
    pytest.param({"gpu": "h20"}, UnknownNameError, "did you mean h200", id="gpu"),
    pytest.param({"max_gb": -1}, InputError, "max_gb must be a positive number", id="negative"),
    pytest.param({"latency_tokens": 0}, InputError, "latency_tokens must be >= 1", id="tokens"),
]


@pytest.mark.parametrize("limits, error, message", REFUSED)
def test_budgets_are_refused_before_any_pass(
    limits: Any,
    error: type[Exception],
    message: str,
    llama_folder: Path,
    quick: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autoq.api.stages.calibrate", None)
    del quick["effective_bits"]
    with pytest.raises(error, match=message):
        autoq.search(llama_folder, **quick, **limits)


def test_labels_keep_all_digits_and_every_budget() -> None:
    assert Budgets(effective_bits=6.0).label() == "6 bits"
    assert Budgets(effective_bits=6.00000001).label(["a=none"]) == "6.00000001 bits, rules a=none"
    everything = Budgets(
        effective_bits=5.5,
        max_gb=24.000000001,
        max_active_bits=5,
        max_latency_ms=1 / 3,
        max_kl=0.01,
        gpu="b200",
        latency_tokens=8,
    )
    assert everything.label() == (
        "5.5 bits, 24.000000001 GB, 5 active bits, 0.3333333333333333 ms, KL 0.01, b200 at 8 tokens"
    )


def test_nothing_stated_means_the_default() -> None:
    assert budgets_module.budgets_or_default(Budgets()).effective_bits == 4.8
    assert budgets_module.budgets_or_default(Budgets(max_gb=1.0)).effective_bits is None
    with pytest.raises(InputError, match="a plan needs a budget"):
        budgets_module.required_budgets(Budgets(gpu="h200"))


@pytest.mark.parametrize("slope", [0.25, 1.0, 3.0])
def test_the_bracket_closes_on_the_limit_where_predictions_are_off(slope: float) -> None:
    """Plans at every predicted loss; the measured one is `slope` times as much, and a bit more."""

    bracket, kept = _Bracket(0.01, largest_loss=5.0), []
    for _ in range(8):
        trial = FakeTrial(bracket.limit, slope * bracket.limit**0.1)
        bracket.add(trial)  # type: ignore[arg-type]
        kept += [trial.measured] if trial.measured <= 0.01 else []
        if bracket.is_closed:
            break
    assert bracket.is_closed
    assert 0.95 * 0.01 <= max(kept) <= 0.01


class FakeTrial:
    """A plan that loses a third of what is predicted."""

    def __init__(self, predicted: float, factor: float = 1 / 3) -> None:
        self.predicted = predicted
        self.measured = factor * predicted


class FakeTrials:
    """Plans of losses that are predicted to be 0.004, 0.0041, ..., and none below."""

    def __init__(self, factor: float) -> None:
        self.done: list[FakeTrial] = []
        self._factor = factor

    def run(self, measurer: object, limit: float) -> FakeTrial | None:
        step = int((limit - 0.004) * 1e4 * (1 + 1e-12))
        return None if limit < 0.004 else self._tried(0.004 + step * 1e-4)

    def run_most_faithful(self, measurer: object) -> FakeTrial:
        return self._tried(0.004)

    def _tried(self, predicted: float) -> FakeTrial:
        self.done.append(FakeTrial(predicted, self._factor))
        return self.done[-1]


def test_smaller_plans_are_found_where_all_predictions_are_above_the_limit() -> None:
    trials = FakeTrials(1 / 3)
    _close_in(_Bracket(0.002, largest_loss=1.0), trials, None)  # type: ignore[arg-type]
    # The plan of least loss keeps the limit, and the plans up to 0.006 do, too.
    kept = [trial.predicted for trial in trials.done if trial.measured <= 0.002]
    assert min(kept) == 0.004
    assert 0.95 * 0.006 <= max(kept) <= 0.006


def test_nothing_is_looked_for_where_the_plan_of_least_loss_breaks_the_limit() -> None:
    trials = FakeTrials(0.9)
    _close_in(_Bracket(0.002, largest_loss=1.0), trials, None)  # type: ignore[arg-type]
    assert [trial.predicted for trial in trials.done] == [0.004]
