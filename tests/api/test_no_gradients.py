"""Models that block backward: the layer is named, and forward passes alone score them, said aloud."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoq
from autoq.errors import ModelError
from autoq.progress import SilentProgress
from autoq.testing.tiny_models import make_tiny_model


class Noting(SilentProgress):
    """Keeps what is said aloud."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class ForwardOnlySilu(torch.autograd.Function):
    """As a kernel that somebody wrote for inference: there is no backward."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return nn.functional.silu(inputs)


class CustomActivation(nn.Module):
    """Calls the kernel."""

    def forward(self, inputs: Tensor) -> Tensor:
        """silu(inputs), as far as anybody can tell from outside."""
        result: Tensor = ForwardOnlySilu.apply(inputs)  # type: ignore[no-untyped-call]
        return result


def with_detached_mlp(model: Any) -> None:
    """The second block's MLP runs without a graph; the residual lets other gradients pass."""
    mlp = model.model.layers[1].mlp
    mlp.forward = torch.no_grad()(mlp.forward)


def with_custom_activation(model: Any) -> None:
    """The first block's activation has a forward only: backward raises there."""
    model.model.layers[0].mlp.act_fn = CustomActivation()


def without_any_graph(model: Any) -> None:
    """The whole model is wrapped for inference: the loss has no graph."""
    model.forward = torch.no_grad()(model.forward)


BLOCKED = [
    pytest.param(with_detached_mlp, "model.layers.1.mlp.down_proj", "", id="no_grad"),
    # The activation takes what gate_proj gives; up_proj is multiplied in after it.
    pytest.param(with_custom_activation, "model.layers.0.mlp.gate_proj", "backward", id="function"),
    pytest.param(without_any_graph, "model.layers.1.mlp.down_proj", "no graph", id="whole_model"),
]


@pytest.fixture
def settings(quick: Any, tmp_path: Path) -> dict[str, Any]:
    """A small search of a model in memory."""
    torch.save(torch.arange(4, 260).repeat(4), tmp_path / "ids.pt")
    quick.update(calibration_data=str(tmp_path / "ids.pt"), measure=False)
    return dict(quick)


@pytest.mark.parametrize(("block", "slot", "cause"), BLOCKED)
def test_the_layer_is_named_and_forward_passes_score_the_model(
    settings: dict[str, Any], block: Callable[[nn.Module], None], slot: str, cause: str
) -> None:
    model = make_tiny_model("llama", dtype=torch.float32)
    free = make_tiny_model("llama", dtype=torch.float32)
    block(model)
    progress = Noting()
    study = autoq.search(model, **settings, progress=progress)
    (note,) = [text for text in progress.notes if "no gradient" in text]
    assert f"no gradient reaches {slot}" in note
    assert cause in note
    assert "forward_only" in note
    assert "\n" not in note
    assert study.summary()["estimator"] == "forward_only"
    # What blocks backward changes no output, so the same scores come from a model without it.
    settings["store"] = settings["store"].replace("studies", "free")
    reference = autoq.search(free, **settings, estimator="forward_only")
    scores = study.sensitivity.scores()
    assert (scores > 0).all()
    np.testing.assert_array_equal(scores, reference.sensitivity.scores())


def test_the_fallback_is_remembered_and_computes_nothing_twice(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model("llama", dtype=torch.float32)
    with_detached_mlp(model)
    first = autoq.search(model, **settings)
    monkeypatch.setattr("autoq.search.estimators.ForwardOnly.score_batch", None)
    monkeypatch.setattr("autoq.search.estimators.TokenProjection.score_batch", None)
    again = autoq.search(model, **{**settings, "effective_bits": 7.0})
    assert again.id == first.id
    assert again.summary()["estimator"] == "forward_only"
    assert json.loads(json.dumps(again.summary())) == again.summary()


def test_the_drop_in_call_names_its_own_option() -> None:
    model = make_tiny_model("llama", dtype=torch.float32)
    with_detached_mlp(model)
    batches = [torch.arange(4, 52).reshape(2, 24)]
    with pytest.warns(UserWarning, match="no gradient reaches") as warned:
        _, state = autoq.auto_quantize(model, {"effective_bits": 6.0}, data_loader=batches)
    (text,) = [str(entry.message) for entry in warned if "no gradient" in str(entry.message)]
    assert "exclude it with disabled_layers 'model.layers.1.mlp.down_proj'" in text
    assert "--exclude" not in text
    assert state.sensitivity.estimator == "forward_only"


def test_excluding_what_the_note_names_keeps_gradients(settings: dict[str, Any]) -> None:
    model = make_tiny_model("llama", dtype=torch.float32)
    with_detached_mlp(model)
    progress = Noting()
    study = autoq.search(model, **settings, exclude=["model.layers.1.mlp.*"], progress=progress)
    assert not [text for text in progress.notes if "no gradient" in text]
    assert study.summary()["estimator"] != "forward_only"


def test_a_loss_of_nan_is_no_reason_to_fall_back(settings: dict[str, Any]) -> None:
    model: Any = make_tiny_model("llama", dtype=torch.float32)
    with_detached_mlp(model)
    model.lm_head.weight.data *= 1e38
    progress = Noting()
    with pytest.raises(ModelError, match="NaN or Inf"):
        autoq.search(model, **settings, progress=progress)
    assert not [text for text in progress.notes if "no gradient" in text]


def with_rounded_mlp(model: Any) -> None:
    """The second block's MLP is rounded to sixteenths, which has a gradient: zero, everywhere."""
    mlp = model.model.layers[1].mlp
    exact = mlp.forward
    mlp.forward = lambda inputs: (exact(inputs) * 16).round() / 16


def test_groups_that_score_exactly_zero_are_named(settings: dict[str, Any]) -> None:
    model = make_tiny_model("llama", dtype=torch.float32)
    with_rounded_mlp(model)
    progress = Noting()
    study = autoq.search(model, **settings, progress=progress)
    (note,) = [text for text in progress.notes if "exactly zero" in text]
    blind = [name for name in study.sensitivity.groups if ".layers.1.mlp." in name]
    assert note.startswith(
        f"2 of 8 groups score exactly zero in every format; the first is {blind[0]}"
    )
    assert "--estimator forward_only" in note
    # And so it does.
    measured = Noting()
    again = autoq.search(model, **settings, estimator="forward_only", progress=measured)
    assert (again.sensitivity.scores() > 0).all()
    assert not [text for text in measured.notes if "exactly zero" in text]
