"""Scores of a streamed model: those of the model in memory, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from autoq.calibration import calibrate
from autoq.errors import InputError, ModelError
from autoq.export import FolderWeights, SourceMatrices
from autoq.formats import CalibrationMethod, Container
from autoq.models import discover, forward_logits, load_model
from autoq.models.block_stream import StreamedModel
from autoq.models.kept_tensors import KeptTensors
from autoq.models.loading import unloaded_model, use_eager_experts
from autoq.search._projections import projection_dtype
from autoq.search.estimators import ESTIMATORS, make_estimator
from autoq.search.objectives import fisher_noise_loss, next_token_loss, own_distribution_loss
from autoq.search.sensitivity import BatchLoss
from autoq.search.streamed import StreamedScorer, refuse_unstreamed_estimator
from autoq.testing.tiny_models import write_family_model

FORMATS = ("fp8", "nvfp4", "none")
BATCHES = 3


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(4, 260, (2, 12), generator=generator) for _ in range(BATCHES)]


class Case:
    """A model in memory and the same one on disk, calibrated alike."""

    def __init__(self, family: str, folder: Path) -> None:
        source = write_family_model(family, folder / "model")
        self.whole = load_model(source, dtype=torch.float32)
        self.map = discover(self.whole, exclude=("cls.*",) if family == "bert" else ())
        self.data = batches()
        self.calibration = calibrate(
            self.whole,
            self.map,
            FORMATS,
            self.data,
            partial(forward_logits, self.whole),
            run_small=partial(forward_logits, self.whole, self.data[0]),
            container=Container.MODELOPT,
            scale_dtype=torch.bfloat16,
            method=CalibrationMethod.MAX,
        )
        model = unloaded_model(source).to(torch.float32)
        use_eager_experts(model)
        weights = FolderWeights(model, self.map, SourceMatrices.of(source, model, self.map))
        self.streamed = StreamedModel(model, self.map, weights)
        self.folder = folder

    def loss(self, model: torch.nn.Module, labels: str, index: int) -> BatchLoss:
        ids = self.data[index]
        logits = forward_logits(model, ids)
        generator = torch.Generator().manual_seed(100 + index)
        if labels == "data":
            return BatchLoss(next_token_loss(logits, ids, shift=True), 2, ids.shape[1] - 1)
        draw = fisher_noise_loss if labels == "noise" else own_distribution_loss
        return BatchLoss(draw(logits, generator), *ids.shape)

    def estimator(self, name: str, model: torch.nn.Module, **options):
        return make_estimator(
            name,
            model,
            self.map,
            FORMATS,
            self.calibration,
            container=Container.MODELOPT,
            scale_dtype=torch.bfloat16,
            dtype=projection_dtype(self.whole),
            seed=3,
            **options,
        )

    def scores(self, estimator, model):
        loss = partial(self.loss, model, estimator.labels)
        found = [estimator.score_batch(i, partial(loss, i)) for i in range(BATCHES)]
        return estimator, estimator.finish(np.concatenate(found))

    def streamed_estimator(self, name="fisher_projection", *, together=2, memory=0, **options):
        scorer = self.estimator(name, self.streamed.model, **options)
        return StreamedScorer(
            scorer,
            self.streamed,
            self.data,
            partial(self.loss, self.streamed.model, scorer.labels),
            together=together,
            kept=KeptTensors(self.folder, memory),
            error_bytes=1 << 14,
        )


@pytest.mark.parametrize(
    ("family", "estimator", "options"),
    [
        ("llama", "fisher_projection", {}),
        ("llama", "diagonal", {"row_fraction": 0.5}),
        ("llama", "sequence_projection", {"draws": 1}),
        ("gpt2", "fisher_projection", {}),  # Conv1D, a tied head, learned positions
        ("gemma3", "token_projection", {}),  # masks and positions of two kinds, scaled embeddings
        ("bloom", "fisher_projection", {}),  # blocks that give tuples
        ("mixtral", "fisher_projection", {}),  # fused experts
        ("bert", "fisher_projection", {}),  # sees in both directions
    ],
)
def test_scores_are_those_of_the_model_in_memory(
    family: str, estimator: str, options: dict, tmp_path: Path
) -> None:
    case = Case(family, tmp_path)

    whole, expected = case.scores(case.estimator(estimator, case.whole, **options), case.whole)
    streamed, found = case.scores(
        case.streamed_estimator(estimator, **options), case.streamed.model
    )

    assert np.array_equal(found, expected, equal_nan=True)
    assert np.nanmax(np.abs(found)) > 0
    assert found.shape[0] == BATCHES * 2
    for name, array in whole.results().items():
        assert np.array_equal(streamed.results()[name], array)
    assert all(parameter.is_meta for parameter in case.streamed.model.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("together", "memory"), [(1, 0), (3, 10_000), (3, 1 << 30)])
def test_how_many_go_together_and_where_they_wait_changes_nothing(
    together: int, memory: int, tmp_path: Path
) -> None:
    case = Case("llama", tmp_path)
    _, expected = case.scores(case.estimator("fisher_projection", case.whole), case.whole)

    estimator = case.streamed_estimator(together=together, memory=memory)
    _, found = case.scores(estimator, case.streamed.model)

    assert np.array_equal(found, expected, equal_nan=True)


def test_a_pass_goes_on_from_a_batch_in_the_middle(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    first, expected = case.scores(case.streamed_estimator(), case.streamed.model)
    began = case.streamed_estimator()
    began.score_batch(0, lambda: pytest.fail("not asked"))

    goes_on = case.streamed_estimator()
    goes_on.load_state(began.state())
    rows = [goes_on.score_batch(index, lambda: pytest.fail("not asked")) for index in (1, 2)]

    assert np.array_equal(np.concatenate(rows), expected[2:], equal_nan=True)
    assert np.array_equal(goes_on.results()["interactions"], first.results()["interactions"])


@pytest.mark.parametrize(
    "name",
    sorted(
        name for name in ESTIMATORS if not getattr(ESTIMATORS[name], "goes_block_by_block", False)
    ),
)
def test_estimators_of_the_whole_model_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"block by block.*{name} needs the whole model"):
        refuse_unstreamed_estimator(name, False)


def test_several_draws_are_refused(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)

    with pytest.raises(InputError, match=r"drawn once.*draws is 2"):
        case.streamed_estimator(draws=2)


def test_a_block_that_gradients_do_not_pass_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    case = Case("llama", tmp_path)
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x).detach())

    with pytest.raises(ModelError, match=r"no gradient reaches .*mlp.*without a bound on memory"):
        case.scores(case.streamed_estimator(), case.streamed.model)
