"""Calibration: what layers share, what a format refuses, and where input scales go."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import nn

from autoq.bundled.outliers import add_activation_outliers
from autoq.calibration import calibrate
from autoq.errors import ModelError
from autoq.formats import FORMATS, CalibrationMethod
from autoq.layers import Container, dequantize_weight, quantize_weight
from autoq.models import SlotKind, discover, forward_logits, slot_weight
from autoq.testing.tiny_models import TINY_ARCHITECTURES, make_tiny_model

QUANTIZED = ("fp8", "nvfp4", "w4a8_awq")


def batches(count=2, sequences=2, tokens=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 260, (sequences, tokens), generator=generator) for _ in range(count)]


def calibrated(model, formats=QUANTIZED, *, container=Container.MODELOPT, data=None, **options):
    data = batches() if data is None else data
    return calibrate(
        model,
        discover(model),
        formats,
        data,
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, data[0][:1]),
        container=container,
        scale_dtype=torch.bfloat16,
        **options,
    )


def each_field_is_equal(first, second):
    pairs = [(getattr(first, each.name), getattr(second, each.name)) for each in fields(first)]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and b is not None else a is b or a == b
        for a, b in pairs
    )


def hard_llama():
    """A llama whose layers want AWQ scales."""
    model = make_tiny_model("llama", dtype=torch.float32)
    add_activation_outliers(model, channels_per_norm=4)
    with torch.no_grad():
        for layer in model.model.layers:
            # Outliers in front of the layers that no norm feeds, too.
            layer.self_attn.v_proj.weight[3].mul_(40)
            layer.mlp.up_proj.weight[7].mul_(40)
    return model


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_every_slot_has_positive_scales_in_every_format(name):
    model = make_tiny_model(name, dtype=torch.bfloat16)
    table = calibrated(model, ("none", *QUANTIZED))
    assert set(table) == {(slot, fmt) for slot in discover(model).slots for fmt in QUANTIZED}
    for calibration in table.values():
        assert 0 < calibration.weight_amax < 1e4
        assert 0 < calibration.input_amax < 1e4


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "t5"])
def test_fusion_sets_share_everything_and_input_sets_their_input(name):
    model = make_tiny_model(name, dtype=torch.float32)
    table = calibrated(model)
    sets = 0
    for group in discover(model).groups:
        for fmt in QUANTIZED:
            for members in group.fusion_sets:
                entries = [replace(table[slot, fmt], codes=None) for slot in members]
                assert all(each_field_is_equal(entry, entries[0]) for entry in entries)
                sets += 1
            for members in group.input_sets:
                assert len({table[slot, fmt].input_amax for slot in members}) == 1
                assert len({table[slot, fmt].weight_amax for slot in members}) > 1
                sets += 1
    assert sets


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
@torch.no_grad()
def test_amax_is_the_largest_of_the_set(fmt):
    model = make_tiny_model("llama", dtype=torch.float32)
    seen = []
    attention = model.model.layers[0].self_attn
    hook = attention.q_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for ids in batches():
        forward_logits(model, ids)
    hook.remove()
    table = calibrated(model, method=CalibrationMethod.MAX)
    found = table["model.layers.0.self_attn.q_proj", fmt]
    weights = [getattr(attention, f"{name}_proj").weight for name in "qkv"]
    assert found.weight_amax == max(float(w.abs().max()) for w in weights)
    assert len({float(w.abs().max()) for w in weights}) == 3
    assert found.input_amax == float(torch.cat(seen).abs().max())
    assert found.pre_quant_scale is None
    assert found.folds_into is None
    assert found.importance is None


def test_int4_amax_is_that_of_the_rounded_weights():
    model = hard_llama()
    slots = discover(model).slots
    table = calibrated(model)
    for members in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.up_proj"]):
        names = [f"model.layers.0.{member}" for member in members]
        values = [
            dequantize_weight(
                quantize_weight(
                    slot_weight(model, slots[name]),
                    FORMATS["w4a8_awq"],
                    table[name, "w4a8_awq"],
                    scale_dtype=torch.bfloat16,
                ),
                container=Container.COMPRESSED_TENSORS,
            )
            for name in names
        ]
        largest = max(float(v.abs().max()) for v in values)
        if members == ["mlp.up_proj"]:  # shares with gate_proj
            assert table[names[0], "w4a8_awq"].weight_amax >= largest
        else:
            assert table[names[0], "w4a8_awq"].weight_amax == largest


@torch.no_grad()
def test_input_amax_is_that_of_the_scaled_input():
    model = hard_llama()
    amax = torch.zeros(128)

    def remember(_module, args):
        torch.maximum(amax, args[0].flatten(0, -2).abs().amax(dim=0), out=amax)

    hook = model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(remember)
    for ids in batches():
        forward_logits(model, ids)
    hook.remove()
    found = calibrated(model)["model.layers.1.mlp.gate_proj", "w4a8_awq"]
    assert found.pre_quant_scale is not None
    assert found.input_amax == float((amax * found.pre_quant_scale).max())
    assert found.input_amax < float(amax.max())


def test_scales_are_searched_where_the_container_can_hold_them():
    model = hard_llama()
    # Chosen group scales leave some layers no use for an input scale.
    plain = CalibrationMethod.MAX
    modelopt = calibrated(model, method=plain)
    compressed = calibrated(model, method=plain, container=Container.COMPRESSED_TENSORS)
    folding = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    scaled = {Container.MODELOPT: set(), Container.COMPRESSED_TENSORS: set()}
    for container, table in (
        (Container.MODELOPT, modelopt),
        (Container.COMPRESSED_TENSORS, compressed),
    ):
        for (slot, fmt), calibration in table.items():
            if calibration.pre_quant_scale is None:
                assert calibration.folds_into is None
                continue
            projection = slot.rpartition(".")[2]
            assert fmt == "w4a8_awq"
            scaled[container].add(projection)
            norm = "input" if projection in {"q_proj", "k_proj", "v_proj"} else "post_attention"
            layer = slot.split(".")[2]
            expected = f"model.layers.{layer}.{norm}_layernorm" if projection in folding else None
            assert calibration.folds_into == expected
    assert scaled[Container.COMPRESSED_TENSORS] == folding
    assert scaled[Container.MODELOPT] == folding | {"o_proj", "down_proj"}


def test_fused_layers_have_an_awq_scale_of_int4_only_where_a_norm_takes_it():
    # TensorRT-LLM reads none of fused W4A16 layers, and one of W4A8 ones.
    model = hard_llama()
    search = partial(calibrated, model, ("int4_awq", "w4a8_awq"), method=CalibrationMethod.MAX)
    folded = search()
    scaled = {key: entry for key, entry in folded.items() if entry.pre_quant_scale is not None}
    first = "model.layers.0.self_attn.q_proj"
    assert scaled[first, "int4_awq"].folds_into == "model.layers.0.input_layernorm"
    # Stored, as nothing fuses them.
    assert scaled["model.layers.0.self_attn.o_proj", "int4_awq"].folds_into is None
    for norm in (
        model.model.layers[0].input_layernorm,
        model.model.layers[0].post_attention_layernorm,
    ):
        norm.register_forward_hook(lambda _, __, output: output + 1)  # no norm takes a scale
    unfolded = search()
    assert unfolded[first, "w4a8_awq"].pre_quant_scale is not None
    assert unfolded[first, "int4_awq"].pre_quant_scale is None
    assert unfolded["model.layers.0.mlp.up_proj", "int4_awq"].pre_quant_scale is None


@pytest.mark.parametrize("method", list(CalibrationMethod))
def test_smoothing_folds_into_norms_and_chooses_no_codes(method):
    model = hard_llama()
    table = calibrated(model, ("int8_sq",), container=Container.COMPRESSED_TENSORS, method=method)
    scaled = {slot for (slot, _), entry in table.items() if entry.pre_quant_scale is not None}
    assert "model.layers.0.self_attn.q_proj" in scaled
    for slot in scaled:
        entry = table[slot, "int8_sq"]
        assert entry.folds_into is not None
        exponents = entry.pre_quant_scale.log2()
        assert torch.equal(exponents, exponents.round())
    assert not any(slot.endswith(("o_proj", "down_proj")) for slot in scaled)
    assert all(entry.codes is None and entry.importance is None for entry in table.values())


@pytest.mark.parametrize("fmt", ["int4_awq", "nvfp4_wo"])
def test_weights_alone_are_calibrated_by_each_method(fmt):
    model = hard_llama()
    name = "model.layers.1.mlp.down_proj"
    best, scales, plain = (
        calibrated(model, (fmt,), method=method)[name, fmt]
        for method in (CalibrationMethod.BEST, CalibrationMethod.SCALES, CalibrationMethod.MAX)
    )
    assert best.codes is not None and best.importance is not None
    assert scales.codes is None and torch.equal(scales.importance, best.importance)
    assert plain.codes is None and plain.importance is None


def test_int8_weights_alone_need_nothing_but_the_weight():
    entry = calibrated(hard_llama(), ("int8_wo",))["model.layers.1.mlp.down_proj", "int8_wo"]
    assert entry.codes is entry.importance is entry.pre_quant_scale is None


def test_experts_have_no_input_scale():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[5] *= 50
    table = calibrated(model)
    for slot in discover(model).slots.values():
        if slot.kind is SlotKind.EXPERT:
            assert table[slot.name, "w4a8_awq"].pre_quant_scale is None


def test_experts_without_tokens_get_the_input_scale_of_their_set():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    token = batches(count=1, sequences=1, tokens=1)
    idle = []

    def remember(_module, args):
        idle.append(sorted({0, 1, 2, 3} - set(args[1].flatten().tolist())))

    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(remember)
    forward_logits(model, token[0])
    hook.remove()
    table = calibrated(model, data=token)
    experts = "model.layers.0.mlp.experts"
    for parameter in ("gate_up_proj", "down_proj"):
        amax = {table[f"{experts}.{e}.{parameter}", "fp8"].input_amax for e in range(4)}
        assert len(amax) == 1
        assert amax.pop() > 0
        for expert in idle[0]:
            weight = getattr(model.model.layers[0].mlp.experts, parameter)[expert].detach()
            found = table[f"{experts}.{expert}.{parameter}", "fp8"]
            assert found.weight_amax == float(weight.abs().max())


def test_nvfp4_scales_fold_into_norms_or_are_not_there():
    model = hard_llama()
    for container in Container:
        table = calibrated(model, ("nvfp4",), container=container)
        scaled = {name for (name, _), entry in table.items() if entry.pre_quant_scale is not None}
        assert scaled
        assert all(table[name, "nvfp4"].folds_into for name in scaled)
        assert not any("o_proj" in name or "down_proj" in name for name in scaled)


def test_norms_of_one_plus_weight_take_no_scale_but_blocks_are_chosen():
    model = make_tiny_model("gemma3", dtype=torch.float32)
    table = calibrated(model, ("nvfp4",))
    assert all(entry.pre_quant_scale is None for entry in table.values())
    assert all(entry.importance is not None for entry in table.values())


def test_plain_calibration_has_neither_scales_of_nvfp4_nor_importance():
    table = calibrated(hard_llama(), method=CalibrationMethod.MAX)
    assert all(entry.importance is None for entry in table.values())
    scaled = {fmt for (_, fmt), entry in table.items() if entry.pre_quant_scale is not None}
    assert scaled == {"w4a8_awq"}


@torch.no_grad()
def test_importance_is_the_mean_square_of_the_scaled_input():
    model = hard_llama()
    seen = []
    gate = model.model.layers[1].mlp.gate_proj
    hook = gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for ids in batches():
        forward_logits(model, ids)
    hook.remove()
    found = calibrated(model)["model.layers.1.mlp.gate_proj", "nvfp4"]
    expected = (torch.cat(seen).double() * found.pre_quant_scale).square().mean(0)
    # float32 norms of a few rows
    torch.testing.assert_close(found.importance.double(), expected, rtol=1e-5, atol=0)


def test_experts_of_an_input_set_pool_their_importance():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    token = batches(count=1, sequences=1, tokens=1)  # reaches two of four experts
    table = calibrated(model, ("nvfp4",), data=token)
    seen = []
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten())
    )
    forward_logits(model, token[0])
    hook.remove()
    for expert in range(4):
        found = table[f"model.layers.0.mlp.experts.{expert}.gate_up_proj", "nvfp4"]
        torch.testing.assert_close(found.importance, seen[0].square(), rtol=1e-5, atol=0)


@torch.no_grad()
def test_folded_into_the_norm_the_model_computes_the_same():
    model = hard_llama()
    expected = forward_logits(model, batches()[0])
    slots = discover(model).slots
    folded = set()
    for (name, _), entry in calibrated(model, ("nvfp4",)).items():
        if entry.pre_quant_scale is None:
            continue
        slot_weight(model, slots[name]).div_(entry.pre_quant_scale)
        if entry.folds_into not in folded:
            model.get_submodule(entry.folds_into).weight.mul_(entry.pre_quant_scale)
            folded.add(entry.folds_into)
    assert len(folded) == 4
    # Powers of two are exact; the order of sums inside a norm's kernel is all that may change.
    torch.testing.assert_close(forward_logits(model, batches()[0]), expected, rtol=1e-5, atol=1e-5)


def calibrated_layers(model, width, formats=QUANTIZED):
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(0))
    return calibrate(
        model,
        discover(model),
        formats,
        [x],
        model,
        run_small=lambda: model(x),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("shape", "formats"),
    [
        ((20, 6), {"fp8"}),
        ((48, 6), {"fp8", "nvfp4"}),
        ((128, 5), {"fp8", "nvfp4"}),  # INT4 packs two rows per byte
        ((128, 6), {"fp8", "nvfp4", "w4a8_awq"}),
    ],
)
def test_formats_that_a_shape_cannot_take_are_absent(shape, formats):
    table = calibrated_layers(nn.Sequential(nn.Linear(*shape)), shape[0])
    assert {fmt for _, fmt in table} == formats


def test_what_one_member_cannot_take_the_group_cannot():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(128, 6), nn.Linear(128, 5)
            self.o_proj = nn.Linear(128, 6)

        def forward(self, x):
            return torch.cat([self.q_proj(x), self.k_proj(x), self.o_proj(x)], dim=-1)

    table = calibrated_layers(Attention(), 128)
    assert {slot for slot, fmt in table if fmt == "w4a8_awq"} == {"o_proj"}


def test_layers_that_share_a_matrix_have_no_scales_of_their_own():
    model = hard_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    table = calibrated(model)
    for layer in (0, 1):
        slot = f"model.layers.{layer}.mlp.down_proj"
        assert table[slot, "w4a8_awq"].pre_quant_scale is None
    amax = {table[f"model.layers.{layer}.mlp.down_proj", "fp8"].weight_amax for layer in (0, 1)}
    assert amax == {float(first.down_proj.weight.detach().abs().max())}


def test_one_pass_serves_all_formats_and_none_needs_nothing():
    model = make_tiny_model("llama", dtype=torch.float32)
    data = batches()
    runs, done = [], []
    arguments = {
        "run_small": lambda: forward_logits(model, data[0][:1]),
        "container": Container.MODELOPT,
        "scale_dtype": torch.bfloat16,
        "after_batch": lambda: done.append(1),
    }

    def run(ids):
        runs.append(ids)
        forward_logits(model, ids)

    calibrate(model, discover(model), QUANTIZED, data, run, **arguments)
    assert [id(ids) for ids in runs] == [id(ids) for ids in data]
    assert len(done) == len(data)
    assert calibrate(model, discover(model), ("none",), data, run, **arguments) == {}


def test_nothing_changes_in_the_model_and_the_result_repeats_itself():
    model = hard_llama()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    first, second = calibrated(model), calibrated(model)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert first.keys() == second.keys()
    for key, one in first.items():
        other = second[key]
        assert (one.weight_amax, one.input_amax) == (other.weight_amax, other.input_amax)
        assert (one.pre_quant_scale is None) == (other.pre_quant_scale is None)
        if one.pre_quant_scale is not None:
            assert torch.equal(one.pre_quant_scale, other.pre_quant_scale)


def test_other_formats_change_no_format():
    model = hard_llama()
    together = calibrated(model)
    for fmt in QUANTIZED:
        for (slot, name), alone in calibrated(model, (fmt,)).items():
            found = together[slot, name]
            assert (found.weight_amax, found.input_amax) == (alone.weight_amax, alone.input_amax)


def test_broken_activations_name_the_layer():
    model = make_tiny_model("llama", dtype=torch.float32)
    model.model.layers[1].input_layernorm.weight.data[0] = torch.nan
    text = r"input of model\.layers\.1\.self_attn\.q_proj holds NaN or Inf"
    with pytest.raises(ModelError, match=text):
        calibrated(model)
