"""Losses that no estimator can use."""

from __future__ import annotations

import pytest
import torch

from autoq.calibration import calibrate
from autoq.errors import ModelError
from autoq.formats import FormatName
from autoq.layers.quantize import Container
from autoq.models import discover, forward_logits
from autoq.search.estimators import TokenProjection
from autoq.search.sensitivity import BatchLoss
from autoq.testing.tiny_models import make_tiny_model

IDS = torch.arange(16).reshape(2, 8)
FORMATS = (FormatName("fp8"),)


@pytest.fixture
def scorer():
    """A scorer of a tiny model, and the model."""
    model = make_tiny_model("llama", dtype=torch.float32)
    options = {"container": Container.MODELOPT, "scale_dtype": torch.bfloat16}
    calibration = calibrate(
        model,
        discover(model),
        FORMATS,
        [IDS],
        lambda ids: forward_logits(model, ids),
        run_small=lambda: forward_logits(model, IDS),
        **options,
    )
    return TokenProjection(model, discover(model), FORMATS, calibration, **options), model


def loss_of(model, factor):
    return BatchLoss(factor * forward_logits(model, IDS).square().sum(), *IDS.shape)


def test_a_loss_whose_gradient_is_zero_everywhere_is_constant(scorer):
    scorer, model = scorer
    with pytest.raises(ModelError, match=r"loss is constant .* no plan is better than another"):
        scorer.score_batch(0, lambda: loss_of(model, 0.0))


def test_a_batch_without_a_gradient_among_others_counts_as_zero(scorer):
    scorer, model = scorer
    assert (scorer.score_batch(0, lambda: loss_of(model, 1.0)) > 0).all()
    assert (scorer.score_batch(1, lambda: loss_of(model, 0.0)) == 0).all()
