import pytest
import torch
from torch import nn

from autoq.errors import InputError
from autoq.models import SlotKind, discover, slot_weight
from autoq.testing.tiny_models import TINY_ARCHITECTURES, make_tiny_model

QKV = "q/k/v read one input"
GATE_UP = "gate/up read one input"


def groups_of(model_map):
    return {group.name: group for group in model_map.groups}


def excluded_of(model_map):
    return {slot.name: slot.reason for slot in model_map.excluded}


EXPECTED_FIRST_GROUPS = {
    "llama": [
        "self_attn.q_proj+k_proj+v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj+up_proj",
        "mlp.down_proj",
    ],
    "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "opt": ["self_attn.q_proj+k_proj+v_proj", "self_attn.out_proj", "fc1", "fc2"],
    "mixtral": ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.experts"],
    "bert": [
        "attention.self.query+key+value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ],
    "t5": [
        "layer.0.SelfAttention.q+k+v",
        "layer.0.SelfAttention.o",
        "layer.1.DenseReluDense.wi_0+wi_1",
        "layer.1.DenseReluDense.wo",
    ],
}
EXPECTED_FIRST_GROUPS |= dict.fromkeys(
    ["qwen2", "qwen3", "mistral", "gemma3"], EXPECTED_FIRST_GROUPS["llama"]
)
EXPECTED_FIRST_GROUPS["qwen3_moe"] = EXPECTED_FIRST_GROUPS["mixtral"]

EXPECTED_BLOCKS = dict.fromkeys(TINY_ARCHITECTURES, ("model.layers.0", "model.layers.1")) | {
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "opt": ("model.decoder.layers.0", "model.decoder.layers.1"),
    "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    "t5": ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
}


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_first_layer_and_blocks(name):
    model_map = discover(make_tiny_model(name))
    assert model_map.blocks == EXPECTED_BLOCKS[name]
    first = f"{model_map.blocks[0]}."
    found = [g.name.removeprefix(first) for g in model_map.groups if g.name.startswith(first)]
    assert found == EXPECTED_FIRST_GROUPS[name]


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_every_matrix_is_a_slot_or_excluded_exactly_once(name):
    model = make_tiny_model(name)
    model_map = discover(model)
    covered = [slot for group in model_map.groups for slot in group.slots]
    assert sorted(covered) == sorted(model_map.slots)
    assert len(set(covered)) == len(covered)
    assert not set(covered) & set(excluded_of(model_map))
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embedded]
    left_out = sum(
        e.weights
        for e in model_map.excluded
        if id(model.get_submodule(e.name).weight) not in embedded
    )
    searched = sum(slot.weights for slot in model_map.slots.values())
    assert searched + left_out == sum(p.numel() for p in matrices)


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_slots_look_at_the_matrix_they_describe(name):
    model = make_tiny_model(name)
    for slot in discover(model).slots.values():
        view = slot_weight(model, slot)
        assert view.shape == (slot.out_features, slot.in_features)
        parameter = getattr(model.get_submodule(slot.module), slot.parameter)
        assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_groups_are_ordered_by_depth(name):
    model = make_tiny_model(name)
    depth = {path: index for index, (path, _) in enumerate(model.named_modules())}
    model_map = discover(model)
    firsts = [min(depth[model_map.slots[s].module] for s in g.slots) for g in model_map.groups]
    assert firsts == sorted(firsts)


def test_fused_siblings_share_a_set_and_say_why():
    groups = groups_of(discover(make_tiny_model("llama")))
    qkv = groups["model.layers.0.self_attn.q_proj+k_proj+v_proj"]
    assert qkv.fusion_sets == (qkv.slots,)
    assert [s.rpartition(".")[2] for s in qkv.slots] == ["q_proj", "k_proj", "v_proj"]
    assert qkv.reason.startswith(QKV)
    assert groups["model.layers.0.mlp.gate_proj+up_proj"].reason.startswith(GATE_UP)
    assert groups["model.layers.0.mlp.down_proj"].fusion_sets == ()


def test_conv1d_is_seen_as_out_by_in():
    slot = discover(make_tiny_model("gpt2")).slots["transformer.h.0.attn.c_attn"]
    assert (slot.kind, slot.out_features, slot.in_features) == (SlotKind.CONV1D, 384, 128)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_of_a_layer_form_one_group(name):
    model_map = discover(make_tiny_model(name))
    experts = groups_of(model_map)["model.layers.1.mlp.experts"]
    path = "model.layers.1.mlp.experts"
    assert experts.input_sets == tuple(
        tuple(f"{path}.{e}.{parameter}" for e in range(4))
        for parameter in ("gate_up_proj", "down_proj")
    )
    slot = model_map.slots[f"{path}.3.gate_up_proj"]
    assert (slot.kind, slot.expert, slot.module) == (SlotKind.EXPERT, 3, path)
    assert (slot.out_features, slot.in_features) == (512, 128)


def test_cross_attention_groups_only_what_reads_the_encoder():
    groups = groups_of(discover(make_tiny_model("t5")))
    cross = "decoder.block.1.layer.1.EncDecAttention"
    assert groups[f"{cross}.q"].slots == (f"{cross}.q",)
    assert groups[f"{cross}.k+v"].slots == (f"{cross}.k", f"{cross}.v")
    assert "encoder's output" in groups[f"{cross}.k+v"].reason
    assert "decoder.block.1.layer.0.SelfAttention.q+k+v" in groups


def test_head_is_excluded_and_can_be_included():
    model = make_tiny_model("llama")
    assert "output head" in excluded_of(discover(model))["lm_head"]
    included = discover(model, include=["lm_*"])
    assert included.groups[-1].slots == ("lm_head",)
    assert included.excluded == ()


@pytest.mark.parametrize(
    ("name", "head", "embedding"),
    [
        ("gpt2", "lm_head", "transformer.wte"),
        ("bert", "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
        ("t5", "lm_head", "shared"),
    ],
)
def test_head_tied_to_an_embedding_stays_out(name, head, embedding):
    model_map = discover(make_tiny_model(name), include=[head])
    assert head not in model_map.slots
    assert f"tied to the embedding {embedding}" in excluded_of(model_map)[head]


def test_router_of_its_own_class_stays_out():
    model_map = discover(make_tiny_model("mixtral"), include=["*.mlp.gate"])
    reason = excluded_of(model_map)["model.layers.0.mlp.gate"]
    assert reason == "router of class MixtralTopKRouter, not nn.Linear: cannot be quantised"


def make_separate_experts():
    """A mixture as older code writes it: a Linear router beside a list of expert modules."""
    experts = nn.ModuleList(
        nn.ModuleDict({n: nn.Linear(64, 64) for n in ("w1", "w2", "w3")}) for _ in range(2)
    )
    return nn.ModuleDict({"moe": nn.ModuleDict({"gate": nn.Linear(64, 2), "experts": experts})})


def test_separate_experts_form_one_group():
    (group,) = discover(make_separate_experts()).groups
    assert group.name == "moe.experts"
    assert group.fusion_sets == tuple(
        (f"moe.experts.{e}.w1", f"moe.experts.{e}.w3") for e in range(2)
    )
    assert [[s[12:] for s in names] for names in group.input_sets] == [
        ["0.w1", "0.w3", "1.w1", "1.w3"],
        ["0.w2", "1.w2"],
    ]


def test_linear_router_is_excluded_and_can_be_included():
    assert excluded_of(discover(make_separate_experts()))["moe.gate"].startswith("router:")
    assert "moe.gate" in discover(make_separate_experts(), include=["*.gate"]).slots


class TiedLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32) for _ in range(3))
        self.third.weight = self.first.weight


def test_tied_linears_form_one_group():
    first, second = discover(TiedLinears()).groups
    assert (first.slots, second.slots) == (("first", "third"), ("second",))
    assert first.reason == "these modules share one tensor"


class LinearWithOwnForward(nn.Linear):
    def forward(self, values):
        return values


def test_linear_with_its_own_forward_stays_out():
    model_map = discover(nn.Sequential(LinearWithOwnForward(8, 8), nn.Linear(8, 8)))
    assert list(model_map.slots) == ["1"]
    assert "LinearWithOwnForward" in excluded_of(model_map)["0"]


def test_excluding_one_member_excludes_the_group_and_says_why():
    model_map = discover(make_tiny_model("llama"), exclude=["*.0.self_attn.k_proj"])
    reasons = excluded_of(model_map)
    path = "model.layers.0.self_attn"
    assert reasons[f"{path}.k_proj"] == "excluded by pattern '*.0.self_attn.k_proj'"
    assert f"through {path}.k_proj, as {QKV}" in reasons[f"{path}.q_proj"]
    assert f"{path}.o_proj" in model_map.slots
    assert "model.layers.1.self_attn.k_proj" in model_map.slots


@pytest.mark.parametrize(
    "pattern",
    ["model.layers.0.mlp.experts", "model.layers.0.mlp.experts.2.down_proj", "*.0.mlp.exp*"],
)
def test_experts_are_excluded_together(pattern):
    model_map = discover(make_tiny_model("mixtral"), exclude=[pattern])
    assert "model.layers.0.mlp.experts" not in groups_of(model_map)
    assert "model.layers.1.mlp.experts" in groups_of(model_map)


def test_group_name_is_a_pattern_too():
    name = "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    model_map = discover(make_tiny_model("llama"), exclude=[name])
    assert name not in groups_of(model_map)
    assert model_map.blocks == ("model.layers.0", "model.layers.1")


def test_exclude_wins_over_include():
    model_map = discover(make_tiny_model("llama"), include=["lm_head"], exclude=["lm_head"])
    assert excluded_of(model_map)["lm_head"] == "excluded by pattern 'lm_head'"


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_pattern_that_matches_nothing(option):
    message = rf"to {option} must match a layer, and 'lm_haed' matches none; did you mean lm_head\?"
    with pytest.raises(InputError, match=message):
        discover(make_tiny_model("llama"), **{option: ["lm_haed"]})


def test_model_without_a_list_of_layers_has_no_blocks():
    model_map = discover(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    assert (model_map.blocks, len(model_map.groups)) == ((), 2)


def test_fused_linears_of_different_inputs_stay_apart():
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "k_proj": nn.Linear(64, 32)})
    assert [g.slots for g in discover(model).groups] == [("q_proj",), ("k_proj",)]


def test_transposed_experts_stay_out():
    model = make_tiny_model("mixtral")
    model.model.layers[0].mlp.experts.is_transposed = True
    model_map = discover(model)
    assert "stored transposed" in excluded_of(model_map)["model.layers.0.mlp.experts.0.down_proj"]
    assert "model.layers.1.mlp.experts" in groups_of(model_map)


def test_weights_are_left_as_they_were():
    model = make_tiny_model("mixtral")
    before = [p.detach().clone() for p in model.parameters()]
    discover(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
