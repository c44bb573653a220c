"""The main job: stored, resumable, repeatable, and refused with a reason."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autoq
from autoq.api import remarks, renewal, search_setup, stages
from autoq.errors import (
    BudgetInfeasibleError,
    DataError,
    ExportError,
    InputError,
    ModelError,
    StudyLockedError,
    UnknownNameError,
    VerificationError,
)
from autoq.models import load_model
from autoq.progress import SilentProgress
from autoq.search.sensitivity import SensitivityScorer
from autoq.studies import StudyLease, StudyStore


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may swallow it."""


def test_summary_has_the_documented_keys_and_is_json(llama_folder: Path, quick: Any) -> None:
    study = autoq.search(llama_folder, **quick)
    summary = study.summary()
    documented = {
        *("study", "model", "budget", "assignment", "groups", "effective_bits"),
        *("stored_bits_per_weight", "stored_bytes", "predicted_loss", "predicted_loss_interval"),
        *("bound", "gap", "measured", "timings_s", "peak_rss_bytes", "export"),
    }
    assert documented <= set(summary)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["assignment"].keys() == study.model_map.slots.keys()
    assert summary["effective_bits"] <= 6.0
    assert 0 <= summary["gap"] < 1e-6
    assert summary["measured"]["kl_divergence"] > 0


def test_the_same_search_again_computes_nothing(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = autoq.search(llama_folder, **quick)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(stages, "calibrate", refuse)
    monkeypatch.setattr(SensitivityScorer, "score_batch", refuse)
    monkeypatch.setattr(stages, "measure_plans", refuse)
    second = autoq.search(llama_folder, **quick)
    assert second.summary()["measured"] == first.summary()["measured"]
    assert second.id == first.id


def test_another_budget_needs_no_pass_over_data(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = autoq.search(llama_folder, **quick)
    monkeypatch.setattr(SensitivityScorer, "score_batch", None)
    reopened = autoq.open_study(study.name, quick["store"])
    tight, loose = reopened.solve(5.0), reopened.solve(7.5)
    assert tight.effective_bits <= 5.0 < loose.effective_bits <= 7.5
    assert loose.predicted_loss < tight.predicted_loss
    exported = reopened.export(tmp_path / "out", effective_bits=5.0)
    assert exported["effective_bits"] == tight.effective_bits


@pytest.mark.parametrize("killed_at", [0, 2], ids=["first_batch", "last_batch"])
def test_a_search_killed_while_scoring_ends_with_the_same_bits(
    llama_folder: Path, quick: Any, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = autoq.search(llama_folder, **quick)
    score_batch = SensitivityScorer.score_batch

    def killing(self: SensitivityScorer, index: int, loss: Any) -> Any:
        if index == killed_at:
            raise Killed
        return score_batch(self, index, loss)

    interrupted = {**quick, "store": f"sqlite:///{tmp_path / 'interrupted.db'}"}
    monkeypatch.setattr(SensitivityScorer, "score_batch", killing)
    with pytest.raises(Killed):
        autoq.search(llama_folder, **interrupted)
    scored: list[int] = []

    def counting(self: SensitivityScorer, index: int, loss: Any) -> Any:
        scored.append(index)
        return score_batch(self, index, loss)

    monkeypatch.setattr(SensitivityScorer, "score_batch", counting)
    resumed = autoq.search(llama_folder, **interrupted)
    assert scored == list(range(killed_at, 3))
    contributions = resumed.sensitivity.contributions
    np.testing.assert_array_equal(contributions, whole.sensitivity.contributions)
    assert resumed.plan().assignment == whole.plan().assignment
    assert resumed.summary()["measured"] == whole.summary()["measured"]


def test_killed_while_calibrating_it_starts_that_stage_again(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate = stages.calibrate

    def killing(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(stages, "calibrate", killing)
    with pytest.raises(Killed):
        autoq.search(llama_folder, **quick)
    monkeypatch.setattr(stages, "calibrate", calibrate)
    assert autoq.search(llama_folder, **quick).plan().effective_bits <= 6.0


def test_everything_is_in_the_store_before_the_export(
    llama_folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ExportError("no space left")

    monkeypatch.setattr("autoq.api.exports.exporting.export_checkpoint", failing)
    with pytest.raises(ExportError, match="no space left"):
        autoq.search(llama_folder, **quick, export=tmp_path / "out")
    study = autoq.open_study(None, quick["store"])
    assert study.summary()["measured"]["kl_divergence"] > 0
    assert [record.status.value for record in study.store.exports(study.id)] == ["failed"]


@pytest.mark.parametrize("installed", [True, False])
def test_logits_are_compared_where_transformers_can_load(
    llama_folder: Path,
    quick: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
) -> None:
    notes: list[str] = []

    class Noting(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    monkeypatch.setattr("autoq.api.exports.exporting.find_spec", lambda name: installed or None)
    quick.update(measure=False, container="compressed-tensors", export=tmp_path / "out")
    export = autoq.search(llama_folder, **quick, progress=Noting()).summary()["export"]
    assert ("transformers_logits" in export["verification"]) is installed
    assert any("extra `export`" in note for note in notes) is not installed


def test_what_does_not_read_back_never_takes_the_name(
    llama_folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = autoq.search(llama_folder, **quick, measure=False, export=tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def failing(*_: Any, **__: Any) -> None:
        raise VerificationError("differs")

    monkeypatch.setattr("autoq.api.exports.exporting.verify_checkpoint", failing)
    for name, overwrite in (("new", False), ("out", True)):
        with pytest.raises(VerificationError, match="differs"):
            study.export(tmp_path / name, effective_bits=7.0, overwrite=overwrite)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_rules_bind_and_are_part_of_the_plan_not_of_the_study(
    llama_folder: Path, quick: Any
) -> None:
    free = autoq.search(llama_folder, **quick, measure=False)
    bound = autoq.search(
        llama_folder, **{**quick, "effective_bits": 12.0}, rules=["model.layers.0.*=none"]
    )
    assert bound.id == free.id
    assignment = bound.summary()["assignment"]
    assert {fmt for slot, fmt in assignment.items() if ".layers.0." in slot} == {"none"}
    assert {fmt for slot, fmt in assignment.items() if ".layers.1." in slot} <= {"fp8", "nvfp4"}


def test_other_budgets_keep_the_rules_of_the_search(llama_folder: Path, quick: Any) -> None:
    quick["effective_bits"] = 12.0
    study = autoq.search(llama_folder, **quick, rules=["model.layers.0.*=none"], measure=False)
    reopened = autoq.open_study(study.name, quick["store"])
    for assignment in (
        reopened.plan(12.5).assignment,
        *(plan.assignment for plan in reopened.frontier(4)),
    ):
        assert {fmt for group, fmt in assignment.items() if ".layers.0." in group} == {"none"}


def test_budgets_that_differ_in_the_last_digits_are_different_plans(
    llama_folder: Path, quick: Any
) -> None:
    study = autoq.search(llama_folder, **quick, measure=False)
    wider = study.solve(6.00000001)
    assert wider.id != study.plan().id
    assert (study.plan().label, study.plan().budget_bits) == ("6 bits", 6.0)
    assert (wider.label, wider.budget_bits) == ("6.00000001 bits", 6.00000001)


def test_another_estimator_or_discovery_begins_another_study(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = autoq.search(llama_folder, **quick, measure=False)
    second = autoq.search(llama_folder, **quick, measure=False, estimator="diagonal")
    assert second.sensitivity.estimator == "diagonal"
    discover = search_setup.discover
    no_blocks = lambda *a, **k: replace(discover(*a, **k), blocks=())
    monkeypatch.setattr(search_setup, "discover", no_blocks)
    third = autoq.search(llama_folder, **quick, measure=False)
    assert len({first.id, second.id, third.id}) == 3


def test_a_measurement_that_was_cut_short_is_made_again(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def dying(session: Any, study_id: int, identity: dict[str, Any]) -> Any:
        calls.append(identity["metric"])
        if len(calls) == 2:
            raise Killed
        return measurement_like(session, study_id, identity)

    from autoq.studies import _results

    measurement_like = _results._measurement_like
    monkeypatch.setattr(_results, "_measurement_like", dying)
    with pytest.raises(Killed):
        autoq.search(llama_folder, **quick)
    monkeypatch.setattr(_results, "_measurement_like", measurement_like)
    measured = autoq.search(llama_folder, **quick).summary()["measured"]
    assert {"kl_divergence", "top1_agreement", "perplexity"} <= measured.keys()


def test_more_held_out_data_is_measured_on_and_other_data_does_not_show(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    few = autoq.search(llama_folder, **quick).summary()["measured"]
    study = autoq.search(llama_folder, **{**quick, "held_out_sequences": 4})
    many = study.summary()
    assert many["measured"] != few
    assert many["measurements"][0]["tokens"] > 64
    (tmp_path / "other.txt").write_text("What others wrote. " * 40)
    study.measure(study.plan(), data=str(tmp_path / "other.txt"), sequences=2)
    assert study.summary()["measured"] == many["measured"]


def test_too_little_held_out_data_is_refused_before_any_pass(
    llama_folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("Some words of text. " * 40)
    monkeypatch.setattr(stages, "calibrate", None)
    quick.update(calibration_data=str(tmp_path / "text.txt"), held_out_sequences=60)
    with pytest.raises(DataError, match="held out"):
        autoq.search(llama_folder, **quick)


def test_an_export_leaves_the_study_done_and_holds_it(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    study = autoq.search(llama_folder, **quick, measure=False)
    study.export(tmp_path / "out", effective_bits=7.0)
    assert study.store.study(study.id).status.value == "done"
    with study.store.lease(study.id), pytest.raises(StudyLockedError, match="held by process"):
        study.export(tmp_path / "second", effective_bits=7.0)
    assert not (tmp_path / "second").exists()


def test_the_lease_is_renewed_while_measuring_and_exporting(
    llama_folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed: list[str] = []
    monkeypatch.setattr(renewal, "RENEWAL_SECONDS", 0.0)
    monkeypatch.setattr(StudyLease, "heartbeat", lambda self: renewed.append(tasks[-1]))
    tasks: list[str] = ["none"]

    class Noting(SilentProgress):
        def task(self, description: str, total: int) -> Any:
            tasks.append(description)
            return super().task(description, total)

    autoq.search(llama_folder, **quick, export=tmp_path / "out", progress=Noting())
    assert {"calibrating", "scoring", "measuring 6 bits", "exporting"} <= set(renewed)


def test_w4a8_is_never_offered_unasked_and_warned_of(llama_folder: Path, quick: Any) -> None:
    notes: list[str] = []

    class Noting(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    quick["formats"] = None
    study = autoq.search(llama_folder, **quick, measure=False, progress=Noting())
    assert study.config.formats == ("fp8", "nvfp4")
    assert not notes
    quick["formats"] = ("w4a8_awq", "fp8")
    autoq.search(llama_folder, **quick, measure=False, progress=Noting())
    assert any("TensorRT-LLM" in note and "vLLM" in note for note in notes)


def test_compare_uniform_measures_every_format(llama_folder: Path, quick: Any) -> None:
    study = autoq.search(llama_folder, **quick, compare_uniform=True)
    # Nobody asked for the bits of the plans that it is compared with.
    assert autoq.list_studies(quick["store"])[0]["budgets"] == [quick["effective_bits"]]
    rows = {row["label"]: row for row in study.summary()["measurements"]}
    assert rows.keys() == {"6 bits", "uniform fp8", "uniform nvfp4"}
    losses = [
        rows[label]["metrics"]["kl_divergence"]["value"]
        for label in ("uniform fp8", "6 bits", "uniform nvfp4")
    ]
    assert losses == sorted(losses)


def test_a_model_in_memory_can_be_searched(llama_folder: Path, quick: Any, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 250, (16, 32))
    np.save(tmp_path / "ids.npy", ids)
    model = load_model(llama_folder, dtype="float32")
    study = autoq.search(model, **quick, calibration_data=str(tmp_path / "ids.npy"))
    assert study.plan().effective_bits <= 6.0
    with pytest.raises(ModelError, match="model in memory"):
        autoq.open_study(study.name, quick["store"]).measure(study.plan())


def test_a_changed_model_folder_is_noticed(llama_folder: Path, quick: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    study = autoq.search(folder, **quick, measure=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match="fingerprints differ"):
        autoq.open_study(study.name, quick["store"]).export(tmp_path / "out")


def test_a_second_process_is_told_who_holds_the_study(llama_folder: Path, quick: Any) -> None:
    study = autoq.search(llama_folder, **quick, measure=False)
    with (
        StudyStore.open(quick["store"]) as store,
        store.lease(study.id),
        pytest.raises(StudyLockedError, match="held by process"),
    ):
        autoq.search(llama_folder, **quick)


REFUSED = [
    pytest.param({"effective_bits": 3.0}, BudgetInfeasibleError, r"4\.5.*16", id="below_floor"),
    pytest.param({"effective_bits": 17.0}, BudgetInfeasibleError, r"4\.5.*16", id="above_ceiling"),
    pytest.param({"formats": ("nvpf4",)}, UnknownNameError, "did you mean nvfp4", id="format"),
    pytest.param({"formats": ()}, InputError, "at least one quantised", id="no_format"),
    pytest.param({"formats": ("none",)}, InputError, "at least one quantised", id="only_none"),
    pytest.param({"rules": ["model.layer.0.*=none"]}, InputError, "match", id="rule_no_match"),
    pytest.param({"exclude": ["nothing*"]}, InputError, "nothing", id="exclude_no_match"),
    pytest.param({"container": "gguf"}, InputError, "known: modelopt", id="container"),
    pytest.param({"dtype": "int8"}, InputError, "dtype must be one of", id="dtype"),
    pytest.param({"calibration_data": "missing.jsonl"}, DataError, "missing", id="data"),
    pytest.param({"calibration_sequences": 0}, InputError, ">= 1, got 0", id="sequences"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_search_refuses(
    llama_folder: Path,
    quick: Any,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        autoq.search(llama_folder, **{**quick, **changes})


def test_an_existing_output_is_refused_before_any_work(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note").write_text("mine")
    with pytest.raises(ExportError, match=r"exists.*--overwrite"):
        autoq.search(llama_folder, **quick, export=tmp_path / "out")
    for place, message in (
        (tmp_path / "out", "no config.json"),
        (llama_folder, "must not replace the model"),
        (tmp_path / "out" / "note" / "out", "must lie where you may write"),
    ):
        with pytest.raises(ExportError, match=message):
            autoq.search(llama_folder, **quick, export=place, overwrite=True)
    assert not (tmp_path / "studies.db").exists()


def test_nan_weights_are_named(llama_folder: Path, quick: Any) -> None:
    model = load_model(llama_folder, dtype="float32")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").weight[3, 5] = torch.nan  # type: ignore
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj"):
        autoq.search(model, **quick, calibration_data="unused.npy")


def test_inexpressible_formats_are_refused_by_name(quick: Any, tmp_path: Path) -> None:
    from autoq.testing.tiny_models import write_tiny_model

    folder = write_tiny_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(ExportError, match="Conv1D"):
        autoq.search(folder, **quick, container="compressed-tensors")


def test_a_store_cannot_grant_trust(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    granted = True  # the folder brings no code; what counts is that the store remembers
    study = autoq.search(llama_folder, **quick, measure=False, trust_remote_code=granted)
    seen: list[bool] = []

    def loading(config: Any, _: Any) -> Any:
        seen.append(config.trust_remote_code)
        raise Killed

    monkeypatch.setattr("autoq.api.task.load", loading)
    for asked in (False, True):
        reopened = autoq.open_study(study.name, quick["store"], trust_remote_code=asked)
        with pytest.raises(Killed):
            reopened.loaded()
    assert seen == [False, True]


def test_calibration_files_are_remembered_in_full(
    llama_folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 250, (16, 32)))
    monkeypatch.chdir(tmp_path)
    study = autoq.search(llama_folder, **quick, measure=False, calibration_data="ids.npy")
    monkeypatch.chdir("/")
    assert (
        autoq.open_study(study.name, quick["store"]).measure(study.plan(), sequences=2).tokens == 64
    )


def test_another_version_is_noted(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    autoq.search(llama_folder, **quick, measure=False)
    now = remarks.installed_versions()
    monkeypatch.setattr(remarks, "installed_versions", lambda: {**now, "torch": "0.1"})
    notes: list[str] = []

    class Noting(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    autoq.search(llama_folder, **quick, measure=False, progress=Noting())
    assert any("torch" in note and "-> 0.1" in note for note in notes)


def test_a_study_is_measured_as_it_was_searched(llama_folder: Path, quick: Any) -> None:
    study = autoq.search(llama_folder, **quick, measure=False)
    with pytest.raises(InputError, match="measured as it was searched"):
        autoq.evaluate(study.name, store=quick["store"], sequence_length=16)


def test_a_study_for_one_container_exports_to_the_other(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    """compressed-tensors cannot store every AWQ scale: plain rounding takes its place, aloud."""
    outliers = tmp_path / "outliers"
    model = load_model(llama_folder, dtype="float32")
    with torch.no_grad():
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.mlp.up_proj.weight[7].mul_(40)  # so that down_proj wants an input scale
    model.save_pretrained(outliers)  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama_folder / name, outliers)
    study = autoq.search(
        outliers, **{**quick, "formats": ("w4a8_awq",), "effective_bits": 4.25}, measure=False
    )
    down = ("model.layers.0.mlp.down_proj", "w4a8_awq")
    assert study.calibration[down].pre_quant_scale is not None
    notes: list[str] = []

    class Noting(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    exported = study.export(tmp_path / "out", container="compressed-tensors", progress=Noting())
    assert exported["verification"]["quantized_matrices"] == 14
    assert any("without their AWQ scale" in note for note in notes)
    again = study.export(tmp_path / "modelopt")
    assert again["container"] == "modelopt"


def test_a_failed_export_leaves_the_study_done(
    llama_folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = autoq.search(llama_folder, **quick, measure=False)

    def failing(*_: Any, **__: Any) -> None:
        raise ExportError("no space left")

    monkeypatch.setattr("autoq.api.exports.exporting.export_checkpoint", failing)
    with pytest.raises(ExportError):
        study.export(tmp_path / "out")
    assert autoq.list_studies(quick["store"])[0]["status"] == "done"


def test_sequences_longer_than_the_model_are_noted(llama_folder: Path, quick: Any) -> None:
    notes: list[str] = []

    class Noting(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    quick["sequence_length"] = 100_000
    autoq.search(llama_folder, **quick, measure=False, progress=Noting())
    assert any("no more positions" in note for note in notes)
