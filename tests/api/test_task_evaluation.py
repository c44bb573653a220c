"""Evaluation tasks on checkpoints, studies and originals, and as a model inside lm-eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

import autoq
from autoq.api.evaluating import _folder as _evaluate_folder
from autoq.api.evaluating.tasks import ORIGINAL, _plain_run
from autoq.api.measured import PER_SEQUENCE
from autoq.api.measuring import _same_source
from autoq.bundled import model_path, tasks_path
from autoq.errors import InputError
from autoq.evaluators import Estimate
from autoq.evaluators.tasks import TaskRun

TASKS = ("autoq_choices", "autoq_text")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study of the bundled model, its store and its checkpoint."""
    folder = tmp_path_factory.mktemp("tasks")
    store = f"sqlite:///{folder}/autoq.db"
    study = autoq.search(
        model_path(),
        effective_bits=5.0,
        store=store,
        export=folder / "out",
        calibration_sequences=1,
        sequence_length=32,
        calibration="max",
        measure=False,
    )
    return study, store, folder / "out"


@pytest.fixture(scope="module")
def measured(found: Any) -> dict[str, Any]:
    study, store, _ = found
    return autoq.evaluate(
        study.name,
        store=store,
        sequences=2,
        tasks=[*TASKS, "nothing_like_it"],
        limit=16,
        metrics=["kl_p99"],
    )


def test_a_study_keeps_what_its_tasks_gave(found: Any, measured: dict[str, Any]) -> None:
    study, _, _ = found
    assert [run["task"] for run in measured["tasks"]] == list(TASKS)
    (failure,) = measured["task_failures"]
    assert failure["task"] == "nothing_like_it"
    assert "no evaluation task is named" in failure["error"]
    records = {
        (record.label, record.metric): record for record in study.store.measurements(study.id)
    }
    plan = study.plan()
    for label, plan_id in ((ORIGINAL, None), (plan.label, plan.id)):
        record = records[label, "autoq_choices.acc"]
        assert record.plan_id == plan_id
        assert record.details["versions"] == {"autoq_choices": 1.0}
        assert record.details["configurations"]["autoq_choices"]["output_type"] == "multiple_choice"
        assert record.details["examples"] == {"autoq_choices": 16}
        assert record.details["limit"] == 16
        assert record.details["harness"].startswith("lm_eval 0.4")
        assert record.data_sha256 == measured["tasks"][0]["data_sha256"]  # the same documents
        assert sum(record.details[PER_SEQUENCE]) / 16 == record.value
        assert (label, "autoq_text.byte_perplexity") in records
    entry = measured["tasks"][0]["metrics"]["autoq_choices.acc"]
    assert entry["value"] == records[plan.label, "autoq_choices.acc"].value
    assert entry["original"] == records[ORIGINAL, "autoq_choices.acc"].value
    assert entry["difference"]["value"] == pytest.approx(entry["value"] - entry["original"])


def test_tasks_do_not_become_columns_of_the_plans_table(
    found: Any, measured: dict[str, Any]
) -> None:
    assert not any("autoq_" in name for name in found[0].summary()["measured"])


def test_further_metrics_are_measured_and_stored(found: Any, measured: dict[str, Any]) -> None:
    study, _, _ = found
    entry = measured["metrics"]["kl_p99"]
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert entry["value"] > measured["metrics"]["kl_divergence"]["value"]
    stored = [r for r in study.store.measurements(study.id) if r.metric == "kl_p99"]
    assert [r.value for r in stored] == [entry["value"]]


def test_the_model_of_a_study_is_its_own_again_afterwards(found: Any, measured: Any) -> None:
    study, store, _ = found
    again = autoq.evaluate(study.name, store=store, sequences=2)
    assert again["metrics"]["kl_divergence"] == measured["metrics"]["kl_divergence"]


def test_a_checkpoint_gives_what_its_plan_gives(found: Any, measured: dict[str, Any]) -> None:
    _, _, checkpoint = found
    alone = autoq.evaluate(checkpoint, tasks=TASKS, limit=16, device="cpu")
    assert "metrics" not in alone
    for run, simulated in zip(alone["tasks"], measured["tasks"], strict=True):
        for name, entry in run["metrics"].items():
            # On CPUs packed and simulated models compute the same bits.
            assert entry["value"] == simulated["metrics"][name]["value"]


def test_an_original_is_a_target_for_tasks(found: Any, measured: dict[str, Any]) -> None:
    alone = autoq.evaluate(model_path(), tasks=["autoq_choices"], limit=16, device="cpu")
    entry = alone["tasks"][0]["metrics"]["autoq_choices.acc"]
    assert entry["value"] == measured["tasks"][0]["metrics"]["autoq_choices.acc"]["original"]


def test_beside_a_reference_both_are_measured(found: Any) -> None:
    _, _, checkpoint = found
    both = autoq.evaluate(
        checkpoint,
        reference=model_path(),
        sequences=1,
        sequence_length=32,
        tasks=["autoq_choices"],
        limit=8,
        metrics=["kl_median"],
        device="cpu",
    )
    assert both["metrics"]["kl_divergence"]["value"] > 0
    assert both["metrics"]["kl_median"]["value"] > 0
    assert both["tasks"][0]["metrics"]["autoq_choices.acc"]["original"] is not None


def test_no_third_model_is_in_memory(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed checkpoint is gone before the same is loaded with dequantised weights."""
    _, _, checkpoint = found
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def counted(make: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            alive.append(sum(reference() is not None for reference in made))
            result = make(*args, **options)
            made.append(weakref.ref(getattr(result, "model", result)))
            return result

        return wrapped

    for name in ("folder_subject", "load", "quantised_model"):
        monkeypatch.setattr(_evaluate_folder, name, counted(getattr(_evaluate_folder, name)))
    both = autoq.evaluate(
        checkpoint,
        reference=model_path(),
        sequences=1,
        sequence_length=32,
        tasks=["autoq_text"],
        limit=2,
        metrics=["kl_median", "weight_bytes_ratio"],
        device="cpu",
    )
    assert alive == [0, 1, 1]  # models in memory before each was made
    assert both["metrics"]["weight_bytes_ratio"]["value"] < 1


def test_outputs_on_disk_give_the_same_figures(found: Any, tmp_path: Path) -> None:
    _, _, checkpoint = found
    options: dict[str, Any] = {
        "reference": model_path(),
        "sequences": 2,
        "sequence_length": 32,
        "device": "cpu",
    }
    plain = autoq.evaluate(checkpoint, **options)
    for _ in range(2):
        cached = autoq.evaluate(checkpoint, **options, cache=tmp_path / "full")
        assert cached["kl_lower_bound"] is None
        assert cached["tokens"] == plain["tokens"]
        for name, entry in plain["metrics"].items():
            # sums over sequences and means of means differ by some units in the last place
            assert cached["metrics"][name] == pytest.approx(entry, rel=1e-9)
    # 64 tokens with their 10 likeliest take 88 bytes each
    compact = autoq.evaluate(
        checkpoint, **options, cache=tmp_path / "small", cache_gb=64 * 88 / 1e9
    )
    assert compact["kl_lower_bound"] == {"kept_tokens": 10}
    bound = compact["metrics"]["kl_divergence"]["value"]
    assert 0 < bound < plain["metrics"]["kl_divergence"]["value"]
    with pytest.raises(InputError, match="allow more, or measure on fewer"):
        autoq.evaluate(checkpoint, **options, cache=tmp_path / "none", cache_gb=1e-7)


def test_a_metric_is_no_task_and_a_task_no_metric(found: Any) -> None:
    _, _, checkpoint = found
    with pytest.raises(InputError, match="autoq_choices must be a metric, and is an evaluation"):
        autoq.evaluate(checkpoint, reference=model_path(), metrics=["autoq_choices"])
    with pytest.raises(InputError, match="needs the original model"):
        autoq.evaluate(checkpoint, tasks=TASKS, metrics=["kl"])


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("study", {"metrics": ["cosine_similarity"]}, "cosine_similarity needs hidden states"),
        ("study", {"metrics": ["seconds_per_step"]}, "needs weights that are packed"),
        ("folder", {"metrics": ["cosine_similarity"]}, "cosine_similarity needs hidden states"),
    ],
)
def test_what_the_model_cannot_give_is_refused_before_anything_is_measured(
    found: Any,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    options: dict[str, Any],
    message: str,
) -> None:
    study, store, checkpoint = found

    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("something was measured first")

    for name in ("measure_plan", "held_out_tokens"):
        monkeypatch.setattr(f"autoq.api.evaluating.evaluation.{name}", measured)
    for name in ("measure_fidelity", "load"):
        monkeypatch.setattr(_evaluate_folder, name, measured)
    with pytest.raises(InputError, match=message):
        if target == "study":
            autoq.evaluate(study.name, store=store, **options)
        else:
            autoq.evaluate(checkpoint, reference=model_path(), device="cpu", **options)


def test_tasks_for_a_model_without_next_tokens_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoq.testing.tiny_models import write_tiny_model

    folder = write_tiny_model("bert", tmp_path / "bert")
    monkeypatch.setattr(_evaluate_folder, "load", None)  # nothing is measured without it
    with pytest.raises(InputError, match="need a model that predicts the next token"):
        autoq.evaluate(folder, reference=folder, tasks=["autoq_choices"], device="cpu")


@pytest.mark.slow  # lm-eval's command reads all of its 14,000 task files first
def test_the_harness_own_command_runs_our_model(
    found: Any, measured: dict[str, Any], tmp_path: Path
) -> None:
    _, _, checkpoint = found
    # Nothing of autoq is imported before the task's file is read, which tells of the model.
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "autoq"),
            *("--model_args", f"pretrained={checkpoint}", "--batch_size", "auto"),
            *("--tasks", str(tasks_path() / "autoq_choices.yaml"), "--limit", "16"),
            *("--output_path", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    (file,) = tmp_path.rglob("results*.json")
    accuracy = json.loads(file.read_text())["results"]["autoq_choices"]["acc,none"]
    assert accuracy == measured["tasks"][0]["metrics"]["autoq_choices.acc"]["value"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs either pretrained=FOLDER or study=NAME"),
        ({"pretrained": "a", "study": "b"}, "needs either pretrained=FOLDER or study=NAME"),
        ({"pretrained": "/no/such"}, "holds no config.json"),
        ({"pretrained": "a", "peft": "x"}, "has no argument peft"),
        ({"pretrained": str(model_path()), "batch_size": "many"}, "batch_size must be a positive"),
    ],
)
def test_arguments_of_the_harness_model(arguments: dict[str, str], message: str) -> None:
    from lm_eval.api.registry import get_model

    import autoq.lm_eval  # noqa: F401

    with pytest.raises(InputError, match=message):
        get_model("autoq")(**arguments)


def test_the_harness_takes_our_model_by_name(found: Any, measured: dict[str, Any]) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import autoq.lm_eval  # noqa: F401

    study, store, _ = found
    results = lm_eval.simple_evaluate(
        model="autoq",
        model_args={"study": study.name, "store": store, "bits": 5.0},
        tasks=[str(tasks_path() / "autoq_choices.yaml")],
        task_manager=TaskManager(include_defaults=False),
        batch_size="auto",
        limit=16,
        bootstrap_iters=0,
    )
    accuracy = results["results"]["autoq_choices"]["acc,none"]
    assert accuracy == measured["tasks"][0]["metrics"]["autoq_choices.acc"]["value"]


def test_metrics_behind_filters_are_judged_by_their_own_direction() -> None:
    def estimates(value: float) -> dict[str, Estimate]:
        per_example = tuple([value] * 20)
        estimate = Estimate(value, value, value, per_sequence=per_example)
        return {"gen": estimate, "gen.exact_match,strict": estimate, "gen.loss,loose": estimate}

    directions = {"gen.exact_match": True, "gen.loss": False}
    run, original = (
        TaskRun(
            name="gen",
            estimates=estimates(value),
            versions={},
            configurations={},
            examples={},
            limit=None,
            higher_is_better=directions,
            harness_version="0",
            data_sha256="",
        )
        for value in (0.5, 1.0)
    )
    metrics = _plain_run(run, original)["metrics"]
    assert list(metrics) == ["gen.exact_match,strict", "gen.loss,loose"]
    verdicts = {name: entry["difference"]["verdict"] for name, entry in metrics.items()}
    assert verdicts == {"gen.exact_match,strict": "worse", "gen.loss,loose": "better"}


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (None, None, True),
        ("owner/name", "owner/name:train", True),
        ("owner/name:en:train", "owner/name:test", True),
        ("owner/name", "owner/other", False),
        ("owner/name", None, False),
    ],
)
def test_splits_of_one_dataset_may_share_documents(
    first: str | None, second: str | None, same: bool
) -> None:
    assert _same_source(first, second) is same
