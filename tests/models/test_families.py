import json

import pytest
from safetensors import safe_open
from torch import equal

from autoq.errors import ModelError
from autoq.models import checkpoint_module_name, discover, expert_tensor_names, slot_weight
from autoq.models.families import _EXPERT_NAMING, is_cross_attention
from autoq.testing.tiny_models import make_tiny_model, write_tiny_model


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_expert_slots_are_the_tensors_of_the_saved_checkpoint(name, tmp_path):
    folder = write_tiny_model(name, tmp_path)
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = make_tiny_model(name)
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for slot in discover(model).slots.values():
            if slot.expert is None:
                continue
            names = expert_tensor_names(model_type, slot)
            parts = slot_weight(model, slot).chunk(len(names))
            for tensor_name, part in zip(names, parts, strict=True):
                assert equal(stored.get_tensor(f"{tensor_name}.weight"), part)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_router_is_spelled_as_in_the_saved_checkpoint(name, tmp_path):
    folder = write_tiny_model(name, tmp_path)
    router = checkpoint_module_name(name, "model.layers.1.mlp.gate")
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert f"{router}.weight" in stored.keys()  # noqa: SIM118


def test_mixtral_spelling():
    slots = discover(make_tiny_model("mixtral")).slots
    path = "model.layers.0.mlp.experts.3"
    stored = "model.layers.0.block_sparse_moe.experts.3"
    assert expert_tensor_names("mixtral", slots[f"{path}.gate_up_proj"]) == (
        f"{stored}.w1",
        f"{stored}.w3",
    )
    assert expert_tensor_names("mixtral", slots[f"{path}.down_proj"]) == (f"{stored}.w2",)


@pytest.mark.parametrize("model_type", sorted(_EXPERT_NAMING))
def test_spelling_agrees_with_transformers_conversion(model_type):
    """The projections' names, in order, are the sources that transformers fuses."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    naming = _EXPERT_NAMING[model_type]
    sources = {
        target.rpartition(".")[2]: [s.split(".")[-2] for s in conversion.source_patterns]
        for conversion in get_checkpoint_conversion_mapping(model_type)
        for target in conversion.target_patterns
        if "experts" in target
    }
    assert sources["gate_up_proj"] == [naming.gate, naming.up]
    assert sources["down_proj"] == [naming.down]


def test_unknown_family_is_refused():
    slot = discover(make_tiny_model("mixtral")).slots["model.layers.0.mlp.experts.0.down_proj"]
    with pytest.raises(ModelError, match=r"model_type 'nobody' \(known: .*mixtral"):
        expert_tensor_names("nobody", slot)


def test_only_experts_are_split():
    slot = discover(make_tiny_model("mixtral")).slots["model.layers.0.self_attn.q_proj"]
    with pytest.raises(ValueError, match=r"q_proj is a linear slot, not an expert's"):
        expert_tensor_names("mixtral", slot)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("decoder.block.0.layer.1.EncDecAttention", True),
        ("model.decoder.layers.0.encoder_attn", True),
        ("bert.encoder.layer.0.crossattention.self", True),
        ("model.layers.3.cross_attn", True),
        ("decoder.block.0.layer.0.SelfAttention", False),
        ("model.encoder.layers.0.self_attn", False),
        ("bert.encoder.layer.0.attention.self", False),
    ],
)
def test_cross_attention_is_told_by_its_path(path, expected):
    assert is_cross_attention(path) is expected
