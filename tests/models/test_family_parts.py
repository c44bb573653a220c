"""Parts of families that stay unquantised, and why; what a model must take to be searched."""

from __future__ import annotations

import pytest
import torch

from autoq.api.task import longest_sequence
from autoq.errors import ModelError
from autoq.models import discover, forward_logits, is_causal
from autoq.testing._family_settings import MAXIMUM_POSITIONS
from autoq.testing.tiny_models import make_family_model

VISION = "encodes images or sounds"


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("llava", "model.vision_tower"),
        ("llava", "model.multi_modal_projector"),
        ("qwen2_5_vl", "model.visual"),
        ("mllama", "model.vision_model"),
    ],
)
def test_what_sees_stays_out_unless_included(family: str, part: str) -> None:
    model = make_family_model(family)
    model_map = discover(model)
    assert not [slot for slot in model_map.slots if slot.startswith(part)]
    assert not [block for block in model_map.blocks if block.startswith(part)]
    reasons = [entry.reason for entry in model_map.excluded if entry.name.startswith(part)]
    assert reasons
    assert all(VISION in reason for reason in reasons)
    included = discover(model, include=[f"{part}.*"])
    assert len([s for s in included.slots if s.startswith(part)]) == len(reasons)


def test_layers_that_only_look_at_pictures_stay_out() -> None:
    model_map = discover(make_family_model("mllama"))
    assert {slot.split(".")[3] for slot in model_map.slots} == {"0"}
    reasons = {e.name: e.reason for e in model_map.excluded}
    assert (
        "attends to what an encoder saw" in reasons["model.language_model.layers.1.mlp.down_proj"]
    )
    # BART's encoder reads the same tokens, so its cross-attention stays in.
    assert any("encoder_attn" in slot for slot in discover(make_family_model("bart")).slots)


def test_latent_attention_keeps_what_engines_absorb() -> None:
    model = make_family_model("deepseek_v3")
    model_map = discover(model)
    attention = "model.layers.0.self_attn"
    assert f"{attention}.kv_b_proj" not in model_map.slots
    groups = {group.name: group for group in model_map.groups}
    fused = groups[f"{attention}.q_a_proj+kv_a_proj_with_mqa"]
    assert fused.fusion_sets == (fused.slots,)
    assert "model.layers.1.mlp.shared_experts.gate_proj+up_proj" in groups
    assert f"{attention}.kv_b_proj" in discover(model, include=["*.kv_b_proj"]).slots


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_oss", "experts of class GptOssExperts are stored transposed or interleaved"),
        ("llama4", "experts of class Llama4TextExperts multiply in their own way"),
        ("mamba", "Mamba's code takes its weight itself, and cannot take a quantised one"),
    ],
)
def test_what_cannot_be_quantised_says_why(family: str, reason: str) -> None:
    model = make_family_model(family)
    assert reason in {entry.reason for entry in discover(model, include=["*"]).excluded}


def test_falcons_linears_are_linears() -> None:
    names = {slot.rpartition(".")[2] for slot in discover(make_family_model("falcon")).slots}
    assert names == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_sounds_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"takes input_features; give autoq\.auto_quantize"):
        forward_logits(make_family_model("whisper"), torch.zeros((1, 4), dtype=torch.int64))


def test_roberta_has_fewer_positions_than_it_says() -> None:
    # It counts from behind the number of the padding token, which is 0.
    assert longest_sequence(make_family_model("roberta")) == MAXIMUM_POSITIONS - 1
    assert longest_sequence(make_family_model("llava")) == MAXIMUM_POSITIONS


def test_models_that_tell_of_pictures_continue_text() -> None:
    assert is_causal(make_family_model("llava"))
    assert not is_causal(make_family_model("t5"))
