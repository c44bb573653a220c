"""The scoring pass in a study: states, models without gradients, and passes that end early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import autoq
from autoq.api._study_batches import StudyBatches
from autoq.api.config import ScoringConfig
from autoq.api.study_tables import SENSITIVITY
from autoq.api.task import load, load_data, scoring_task
from autoq.errors import InputError
from autoq.formats import FormatName
from autoq.models import forward_logits
from autoq.progress import SilentProgress
from autoq.search import stability
from autoq.search.estimators import ESTIMATORS
from autoq.search.objectives import fisher_noise_loss, next_token_loss, own_distribution_loss
from autoq.search.sensitivity import BatchLoss, SensitivityScorer
from autoq.studies import StudyStore
from autoq.testing.tiny_models import make_tiny_model


class KilledError(BaseException):
    """Stands for the process being killed."""


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


class OneWay(torch.autograd.Function):
    """An operation that somebody wrote without a backward."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values * 1.0


@pytest.fixture
def quick_on_ids(quick: Any, tmp_path: Path) -> dict[str, Any]:
    """`quick` for a model in memory, which has no tokenizer."""
    path = tmp_path / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(4, 260, (12, 32)))
    return {**quick, "calibration_data": str(path), "measure": False}


def interactions(study: Any) -> Any:
    return study.store.arrays(study.id, SENSITIVITY)["interactions"]


def kill_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> list[int]:
    """Score until `batch`, which is never scored; returns the batches that are, from now on."""
    score_batch = SensitivityScorer.score_batch
    scored: list[int] = []

    def killing(self: SensitivityScorer, index: int, loss: Any) -> Any:
        if index == batch:
            raise KilledError
        scored.append(index)
        return score_batch(self, index, loss)

    monkeypatch.setattr(SensitivityScorer, "score_batch", killing)
    return scored


@pytest.mark.parametrize("state_bytes", [1 << 20, 1], ids=["every_batch", "now_and_then"])
def test_sums_over_batches_survive_a_kill(
    llama_folder: Path,
    quick: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state_bytes: int,
) -> None:
    from autoq.api import scoring

    quick = {**quick, "batch_size": 1, "measure": False}
    whole = autoq.search(llama_folder, **quick)
    interrupted = {**quick, "store": f"sqlite:///{tmp_path / 'interrupted.db'}"}
    if state_bytes == 1:  # a large state is written after every third batch
        size = interactions(whole).nbytes + 8
        monkeypatch.setattr(scoring, "STATE_BYTES_PER_BATCH", size // 3)
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(KilledError):
            autoq.search(llama_folder, **interrupted)
    scored = kill_at(monkeypatch, 99)
    resumed = autoq.search(llama_folder, **interrupted)
    assert scored == ([4, 5] if state_bytes > 1 else [3, 4, 5])
    assert np.array_equal(interactions(resumed), interactions(whole))
    assert np.array_equal(resumed.sensitivity.contributions, whole.sensitivity.contributions)
    found = whole.interactions
    assert found is not None
    diagonal = found.gram.reshape(16, 16).diagonal().reshape(8, 2)
    np.testing.assert_allclose(diagonal, 2 * whole.sensitivity.scores(), rtol=1e-5)
    states = [
        array
        for name, array in resumed.store.arrays(resumed.id, SENSITIVITY).items()
        if name.startswith("state/")
    ]
    assert sum(array.nbytes for array in states) == 0  # not kept for ever


def test_a_state_survives_kills_before_the_same_batch_is_put(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {**quick, "batch_size": 1, "measure": False}
    put = StudyBatches.put

    def killing_put(self: Any, index: int, *rest: Any) -> None:
        if index == 3:
            raise KilledError
        put(self, index, *rest)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            patch.setattr(StudyBatches, "put", killing_put)
            autoq.search(llama_folder, **quick)
    scored = kill_at(monkeypatch, 99)
    autoq.search(llama_folder, **quick)
    assert scored == [3, 4, 5]


def test_a_search_killed_after_its_last_batch_goes_on(
    llama_folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {**quick, "measure": False}
    whole = autoq.search(llama_folder, **quick)
    quick["store"] = f"sqlite:///{tmp_path / 'killed.db'}"

    def kill(*_arguments: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "put_sensitivity", kill)
        with pytest.raises(KilledError):
            autoq.search(llama_folder, **quick)
    scored = kill_at(monkeypatch, 99)
    resumed = autoq.search(llama_folder, **quick)
    assert scored == []
    assert np.array_equal(interactions(resumed), interactions(whole))
    assert np.array_equal(resumed.sensitivity.contributions, whole.sensitivity.contributions)


@pytest.mark.parametrize("how", ["detached", "no_backward"])
def test_a_model_without_gradients_is_measured_group_by_group(quick_on_ids: Any, how: str) -> None:
    model: Any = make_tiny_model("llama", dtype=torch.float32)
    operation = torch.Tensor.detach if how == "detached" else OneWay.apply
    model.model.layers[1].self_attn.o_proj.register_forward_hook(
        lambda _module, _inputs, output: operation(output)
    )
    model.model.layers[1].input_layernorm.register_forward_hook(
        lambda _module, _inputs, output: operation(output)
    )
    model.model.layers[0].register_forward_hook(lambda _module, _inputs, output: operation(output))
    notes = Notes()
    study = autoq.search(model, **quick_on_ids, progress=notes)
    assert study.sensitivity.estimator == "forward_only"
    assert study.sensitivity.unit == "nats_per_token"
    (note,) = [text for text in notes.texts if "no gradient" in text]
    assert "no gradient reaches model.layers.1.self_attn.o_proj" in note
    assert "forward passes alone (forward_only), on 16 sequences" in note
    assert (study.sensitivity.scores() > 0).all()

    again = autoq.search(model, **quick_on_ids, progress=notes)
    assert again.id == study.id


def test_a_killed_fallback_goes_on_as_fallback(
    quick_on_ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = quick_on_ids

    def model() -> Any:
        made: Any = make_tiny_model("llama", dtype=torch.float32)
        made.model.norm.register_forward_hook(lambda _m, _i, output: output.detach())
        return made

    whole = autoq.search(model(), **quick)
    store = f"sqlite:///{tmp_path / 'killed.db'}"
    put = StudyBatches.put

    def dying(self: StudyBatches, index: int, scores: Any, seconds: float) -> None:
        if index == 1:
            raise KilledError
        put(self, index, scores, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(StudyBatches, "put", dying)
        with pytest.raises(KilledError):
            autoq.search(model(), **{**quick, "store": store})
    refused = kill_at(monkeypatch, 0)  # no gradient is tried again
    resumed = autoq.search(model(), **{**quick, "store": store})
    assert not refused
    assert resumed.sensitivity.estimator == "forward_only"
    assert np.array_equal(resumed.sensitivity.contributions, whole.sensitivity.contributions)


def stage_payload(study: Any) -> Any:
    return study.store.stage(study.id, SENSITIVITY).payload


def test_a_pass_ends_when_the_plan_is_sure_and_a_resumed_one_ends_there_too(
    llama_folder: Path, quick: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stability, "FEWEST_SEQUENCES", 4)
    monkeypatch.setattr(stability, "RELATIVE_SLACK", 10.0)  # anything will do
    quick = {**quick, "calibration_sequences": 12, "measure": False, "confidence": 0.9}
    study = autoq.search(llama_folder, **quick)
    payload = stage_payload(study)
    assert (payload["sequences"], payload["batches"]) == (4, 2)
    assert payload["stability"]["reached"] >= 0.9
    assert len(study.sensitivity.contributions) == 4
    stored = {**quick, "store": f"sqlite:///{tmp_path / 'killed.db'}"}
    with monkeypatch.context() as patch:
        kill_at(patch, 1)
        with pytest.raises(KilledError):
            autoq.search(llama_folder, **stored)
    scored = kill_at(monkeypatch, 99)
    resumed = autoq.search(llama_folder, **stored)
    assert scored == [1]
    assert np.array_equal(resumed.sensitivity.contributions, study.sensitivity.contributions)
    assert {**stage_payload(resumed), "peak_rss_bytes": 0} == {**payload, "peak_rss_bytes": 0}


def test_data_too_small_for_the_confidence_is_said(llama_folder: Path, quick: Any) -> None:
    notes = Notes()
    study = autoq.search(llama_folder, **quick, measure=False, confidence=0.999999, progress=notes)
    payload = stage_payload(study)
    assert payload["sequences"] == 6
    assert payload["stability"]["asked"] == 0.999999
    reached = payload["stability"]["reached"]
    said = [text for text in notes.texts if "too small for the confidence asked" in text]
    assert bool(said) == (reached < 0.999999)
    assert reached < 1.0
    assert f"{reached:.0%} of the draws of its 6 sequences" in said[0]
    assert f"about {payload['stability']['sequences_needed']} sequences would do" in said[0]
    with pytest.raises(InputError, match=r"confidence must be in \(0, 1\), got 95; try 0\.95"):
        autoq.search(llama_folder, **quick, confidence=95)


def test_another_confidence_is_another_study(llama_folder: Path, quick: Any) -> None:
    studies = [
        autoq.search(llama_folder, **quick, measure=False, confidence=confidence)
        for confidence in (None, 0.5)
    ]
    assert studies[0].id != studies[1].id
    assert stage_payload(studies[0])["stability"] is None
    with StudyStore.open(quick["store"]) as store:
        assert len(store.list_studies()) == 2


def test_every_estimator_gets_the_loss_it_wants(quick_on_ids: Any) -> None:
    model = make_tiny_model("llama", dtype=torch.float32)
    formats = (FormatName("fp8"),)

    def loss(estimator: str) -> BatchLoss:
        config = ScoringConfig(formats=formats, estimator=estimator, batch_size=2, seed=3)
        loaded = load(config, model)
        data = load_data(
            loaded,
            quick_on_ids["calibration_data"],
            sequences=4,
            sequence_length=32,
            split="calibration",
            seed=0,
        )
        ids.append(torch.from_numpy(data.ids)[2:4])
        with torch.no_grad():
            return scoring_task(loaded, data, config).loss(1)

    ids: list[torch.Tensor] = []
    found = {name: loss(name) for name in ESTIMATORS}
    with torch.no_grad():
        output = forward_logits(model, ids[0])
    seed = 3 * 1_000_003 + 1
    drawn = own_distribution_loss(output, torch.Generator().manual_seed(seed))
    noise = fisher_noise_loss(output, torch.Generator().manual_seed(seed))
    for name, batch in found.items():
        labels = ESTIMATORS[name].labels
        expected = {
            "model": drawn,
            "noise": noise,
            "data": next_token_loss(output, ids[0], shift=True),
        }[labels]
        torch.testing.assert_close(batch.total, expected)
        assert batch.output is not None
        assert (batch.sequences, batch.tokens_per_sequence) == (2, 31 if labels == "data" else 32)
        if labels != "data":
            assert batch.redraw is not None
            assert batch.redraw(0) == batch.total != batch.redraw(1)


def test_labels_need_a_model_that_predicts_tokens() -> None:
    from transformers import BertConfig, BertModel

    config = ScoringConfig(formats=(FormatName("fp8"),), estimator="diagonal")
    settings = {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 1}
    model = BertModel(BertConfig(**settings, num_attention_heads=2, intermediate_size=64))
    loaded = load(config, model)
    with pytest.raises(InputError, match="diagonal needs a model that predicts tokens, and Bert"):
        scoring_task(loaded, None, config)  # type: ignore[arg-type]


def test_a_layer_before_the_head_is_calibrated_on_all_tokens(quick_on_ids: Any) -> None:
    config = transformers.BertConfig(
        vocab_size=260,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        is_decoder=True,
    )
    study = autoq.search(transformers.BertLMHeadModel(config), **quick_on_ids)
    rows = {slot: calibration.input_rows for (slot, _), calibration in study.calibration.items()}
    assert "cls.predictions.transform.dense" in rows
    assert set(rows.values()) == {6 * 32}
