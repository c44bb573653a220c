"""The drop-in call: quantised in place, tolerant of generators, solved again from its state."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoq
from autoq.errors import DataError, InputError
from autoq.models import forward_logits
from autoq.testing.tiny_models import make_tiny_model


@pytest.fixture
def model() -> nn.Module:
    return make_tiny_model("llama", dtype=torch.float32).eval()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (2, 24), generator=generator) for _ in range(3)]


def peer_style_arguments(batches: list[Tensor]) -> dict[str, Any]:
    return {
        "data_loader": [{"input_ids": ids, "labels": ids} for ids in batches],
        "forward_step": lambda model, batch: model(**batch),
        "loss_func": lambda output, batch: output.loss,
    }


def test_the_peers_call_works_as_it_is(model: nn.Module, batches: list[Tensor]) -> None:
    before = forward_logits(model, batches[0]).detach()
    returned, state = autoq.auto_quantize(
        model,
        constraints={"effective_bits": 6.0},
        quantization_formats=["NVFP4_DEFAULT_CFG", "FP8_DEFAULT_CFG"],
        **peer_style_arguments(batches),
        disabled_layers=["*lm_head*", "model.layers.0.self_attn.q_proj"],
        num_calib_steps=2,
        num_score_steps=3,
        verbose=False,
    )
    assert returned is model
    assert state.plan.effective_bits <= 6.0
    assert not torch.equal(forward_logits(model, batches[0]), before)
    assert "model.layers.0.self_attn.k_proj" not in state.assignment  # its group is left alone
    assert set(state.assignment.values()) <= {"nvfp4", "fp8", "none"}


def test_the_state_solves_another_budget_without_scoring(
    model: nn.Module, batches: list[Tensor]
) -> None:
    untouched = copy.deepcopy(model)
    model, state = autoq.auto_quantize(model, {"effective_bits": 5.0}, data_loader=batches)
    at_five = forward_logits(model, batches[0]).detach()
    model, looser = autoq.auto_quantize(model, {"effective_bits": 8.0}, state=state)
    assert looser.plan.effective_bits > state.plan.effective_bits
    fresh, _ = autoq.auto_quantize(untouched, {"effective_bits": 8.0}, data_loader=batches)
    assert torch.equal(forward_logits(model, batches[0]), forward_logits(fresh, batches[0]))
    model, _ = autoq.auto_quantize(model, {"effective_bits": 5.0}, state=looser)
    assert torch.equal(forward_logits(model, batches[0]), at_five)


def test_a_generator_is_read_once_and_serves_every_phase(
    model: nn.Module, batches: list[Tensor]
) -> None:
    other = copy.deepcopy(model)

    def generate() -> Iterator[Tensor]:
        yield from batches

    _, from_generator = autoq.auto_quantize(model, {"effective_bits": 6}, data_loader=generate())
    _, from_list = autoq.auto_quantize(other, {"effective_bits": 6}, data_loader=batches)
    assert (from_generator.sensitivity.contributions == from_list.sensitivity.contributions).all()
    assert (from_list.sensitivity.scores() > 0).all()


def test_the_older_key_is_the_same_budget(model: nn.Module, batches: list[Tensor]) -> None:
    other = copy.deepcopy(model)
    _, keyed = autoq.auto_quantize(model, {"auto_quantize_bits": 5.5}, data_loader=batches)
    _, named = autoq.auto_quantize(other, auto_quantize_bits=5.5, data_loader=batches)
    assert keyed.plan.budget_bits == named.plan.budget_bits == 5.5


def test_fused_experts_are_quantised_in_place(batches: list[Tensor]) -> None:
    from transformers import MixtralForCausalLM

    config = make_tiny_model("mixtral").config
    model = MixtralForCausalLM(config).eval()  # with the default experts implementation
    model, state = autoq.auto_quantize(model, {"effective_bits": 5.0}, data_loader=batches)
    assert state.assignment["model.layers.0.mlp.experts.0.gate_up_proj"] in {"nvfp4", "fp8"}
    copied = copy.deepcopy(model)
    assert torch.equal(forward_logits(copied, batches[0]), forward_logits(model, batches[0]))


def test_verbose_prints_the_plan(
    model: nn.Module, batches: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    autoq.auto_quantize(model, {"effective_bits": 6.0}, data_loader=batches, verbose=True)
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed
    assert "effective bits" in printed


REFUSED = [
    pytest.param({"constraints": {"latency": 1.0}}, "know effective_bits only", id="constraint"),
    pytest.param(
        {"constraints": {"effective_bits": 5, "auto_quantize_bits": 6}}, "give one", id="both_keys"
    ),
    pytest.param({"quantization_formats": [{"a": 1}]}, "are names, got a dict", id="dict_format"),
    pytest.param({"quantization_formats": ["FP9"]}, "did you mean|known", id="unknown_format"),
    pytest.param({"loss_func": len}, "loss_func needs forward_step", id="loss_alone"),
    pytest.param({"data_loader": ["text"]}, "token ids", id="text_batches"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_auto_quantize_refuses(
    model: nn.Module, batches: list[Tensor], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        autoq.auto_quantize(model, **{"data_loader": batches, **changes})


def test_no_data_is_refused(model: nn.Module) -> None:
    with pytest.raises(DataError, match="gave no batch"):
        autoq.auto_quantize(model, {"effective_bits": 6.0})


def test_a_state_of_another_model_is_refused(model: nn.Module, batches: list[Tensor]) -> None:
    other = copy.deepcopy(model)
    _, state = autoq.auto_quantize(model, {"effective_bits": 6.0}, data_loader=batches)
    with pytest.raises(InputError, match="another model object"):
        autoq.auto_quantize(other, {"effective_bits": 5.0}, state=state)
