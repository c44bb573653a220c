"""Models that cannot be scored as others are: one clear sentence, and nothing that was stored is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autoq
from autoq.errors import ModelError
from autoq.studies import StudyStore
from autoq.testing.tiny_models import make_tiny_model


def with_zero_head(model: Any) -> None:
    """Every logit is 0 whatever the layers do: the loss is log(vocabulary), always."""
    model.lm_head.weight.data.zero_()


def with_saturated_head(model: Any) -> None:
    """Every distribution is one-hot in float32, and its own draw always that token."""
    model.lm_head.weight.data.mul_(1e6)


def with_overflowing_head(model: Any) -> None:
    """Logits beyond float32: the loss is NaN, though every weight is finite."""
    model.lm_head.weight.data = model.lm_head.weight.data.float() * 1e38


BAD_MODELS = [
    pytest.param(with_zero_head, r"the loss is constant .*output head", id="identical_logits"),
    pytest.param(with_saturated_head, r"the loss is constant .*output head", id="saturated"),
    pytest.param(with_overflowing_head, r"the loss is NaN or Inf .*--dtype", id="nan"),
]


@pytest.mark.parametrize(("spoil", "words"), BAD_MODELS)
def test_a_loss_that_says_nothing_is_refused_and_the_store_keeps_what_it_has(
    quick: Any, spoil: Callable[[nn.Module], None], words: str
) -> None:
    model: Any = make_tiny_model("llama", dtype=torch.float32)
    ids = Path(str(quick["store"]).removeprefix("sqlite:///")).with_name("ids.pt")
    torch.save(torch.arange(4, 260).repeat(4), ids)
    quick.update(calibration_data=str(ids), measure=False)
    good = autoq.search(model, **quick)
    before = good.summary()
    spoil(model)
    with pytest.raises(ModelError, match=words) as caught:
        autoq.search(model, **quick)
    assert "\n" not in str(caught.value)
    assert autoq.open_study(good.name, quick["store"]).summary() == before
    # The study that failed has its calibration, and no scores.
    store = StudyStore.open(quick["store"])
    (failed,) = [entry for entry in store.list_studies() if entry.name != good.name]
    assert store.score_batches(failed.id) == {}
    assert store.stage(failed.id, "calibration") is not None
