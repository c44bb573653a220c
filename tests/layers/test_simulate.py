"""Simulation: the numbers of the checkpoint, in the model's place, and the way back."""

import copy

import pytest
import torch
from torch import nn

from autoq.formats import FORMATS
from autoq.layers import (
    Container,
    LayerCalibration,
    dequantize_weight,
    fake_quantize_input,
    quantize_weight,
)
from autoq.layers.simulate import SimulatedModel, slot_formats_of
from autoq.models import SlotKind, discover, forward_logits, slot_weight
from autoq.testing.tiny_models import make_tiny_model

QUANTIZED = ("fp8", "nvfp4", "w4a8_awq")
KINDS = {"llama": SlotKind.LINEAR, "gpt2": SlotKind.CONV1D, "mixtral": SlotKind.EXPERT}
every_kind = pytest.mark.parametrize("name", KINDS)


def token_ids():
    return torch.randint(4, 260, (2, 6), generator=torch.Generator().manual_seed(0))


def calibration_of(model, model_map):
    """Plausible scales, and for INT4 an input scale of mixed powers of two."""
    table = {}
    for index, slot in enumerate(model_map.slots.values()):
        amax = float(slot_weight(model, slot).abs().max())
        exponents = torch.arange(slot.in_features) % 3 - 1
        for name in QUANTIZED:
            scaled = name == "w4a8_awq"
            table[slot.name, name] = LayerCalibration(
                weight_amax=amax,
                input_amax=2.0 + index / 8,
                pre_quant_scale=torch.exp2(exponents.float()) if scaled else None,
            )
    return table


def spread(model_map, shift=0):
    """Every format in turn over the groups, `none` too."""
    names = (*QUANTIZED, "none")
    return {
        slot: names[(index + shift) % len(names)]
        for index, group in enumerate(model_map.groups)
        for slot in group.slots
    }


def simulate(model, formats, container=Container.MODELOPT, **options):
    model_map = discover(model)
    return SimulatedModel(
        model,
        model_map.slots,
        formats,
        calibration_of(model, model_map),
        container=container,
        scale_dtype=torch.bfloat16,
        **options,
    )


def state(model):
    return {name: values.clone() for name, values in model.state_dict().items()}


def same_state(model, expected):
    return all(torch.equal(values, expected[name]) for name, values in model.state_dict().items())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("container", list(Container))
@torch.no_grad()
def test_weights_are_those_of_the_checkpoint(name, dtype, container):
    model = make_tiny_model(name, dtype=dtype)
    model_map = discover(model)
    assert KINDS[name] in {slot.kind for slot in model_map.slots.values()}
    calibration = calibration_of(model, model_map)
    original = copy.deepcopy(model)
    formats = spread(model_map)
    simulate(model, formats, container)
    changed = 0
    for slot in model_map.slots.values():
        before, after = slot_weight(original, slot), slot_weight(model, slot)
        assert after.dtype is dtype
        if formats[slot.name] == "none":
            assert torch.equal(after, before)
            continue
        fmt = FORMATS[formats[slot.name]]
        stored = quantize_weight(
            before, fmt, calibration[slot.name, fmt.name], scale_dtype=torch.bfloat16
        )
        assert torch.equal(after, dequantize_weight(stored, container=container, dtype=dtype))
        changed += 1
    assert changed


@pytest.mark.parametrize("fmt", [*QUANTIZED, "fp8_pc_pt", "fp8_block", "mxfp8", "mxfp4"])
@pytest.mark.parametrize("container", list(Container))
@torch.no_grad()
def test_one_linear_computes_quantised_input_times_quantised_weight(fmt, container):
    torch.manual_seed(0)
    layer = nn.Linear(128, 16)
    model = nn.Sequential(layer)
    weight, bias = layer.weight.clone(), layer.bias.clone()
    inputs = 3 * torch.randn(2, 5, 128)
    exact = model(inputs)
    calibration = LayerCalibration(weight_amax=float(weight.abs().max()), input_amax=2.0)
    slots = discover(model).slots
    SimulatedModel(
        model,
        slots,
        {"0": fmt},
        {("0", fmt): calibration},
        container=container,
        scale_dtype=torch.bfloat16,
    )
    stored = quantize_weight(weight, FORMATS[fmt], calibration, scale_dtype=torch.bfloat16)
    seen = fake_quantize_input(inputs, FORMATS[fmt], calibration, container=container)
    expected = seen @ dequantize_weight(stored, container=container).t() + bias
    found = model(inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(seen, inputs)
    weight_only = inputs @ dequantize_weight(stored, container=container).t() + bias
    assert (found - expected).abs().max() < 1e-2 * (found - weight_only).abs().max()
    assert (found - exact).abs().max() > 0


@every_kind
@torch.no_grad()
def test_restore_and_paused_give_the_original_back_to_the_bit(name):
    model = make_tiny_model(name, dtype=torch.bfloat16)
    model_map = discover(model)
    before, expected = state(model), forward_logits(model, token_ids())
    simulated = simulate(model, spread(model_map))
    quantised = forward_logits(model, token_ids())
    assert not torch.equal(quantised, expected)
    with simulated.paused():
        assert same_state(model, before)
        assert torch.equal(forward_logits(model, token_ids()), expected)
    assert torch.equal(forward_logits(model, token_ids()), quantised)
    with pytest.raises(RuntimeError, match="inside"), simulated.paused():
        raise RuntimeError("inside")
    assert torch.equal(forward_logits(model, token_ids()), quantised)
    simulated.restore()
    assert same_state(model, before)
    assert torch.equal(forward_logits(model, token_ids()), expected)
    assert not any("forward" in vars(module) for module in model.modules())


@every_kind
@torch.no_grad()
def test_another_assignment_equals_a_fresh_simulation_of_it(name):
    model = make_tiny_model(name, dtype=torch.bfloat16)
    model_map = discover(model)
    simulated = simulate(model, spread(model_map))
    for shift in (1, 2, 3, 0):
        simulated.apply(spread(model_map, shift))
        fresh = make_tiny_model(name, dtype=torch.bfloat16)
        simulate(fresh, spread(model_map, shift))
        assert same_state(model, state(fresh))
        assert torch.equal(forward_logits(model, token_ids()), forward_logits(fresh, token_ids()))


@torch.no_grad()
def test_slots_without_a_format_are_left_alone():
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map = discover(model)
    before = state(model)
    name = model_map.groups[0].slots[0]
    simulated = simulate(model, {name: "nvfp4"})
    assert [
        n for n, values in model.state_dict().items() if not torch.equal(values, before[n])
    ] == [f"{name}.weight"]
    simulated.apply({})
    assert same_state(model, before)


@torch.no_grad()
def test_given_weights_are_used_as_they_are():
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map = discover(model)
    name, other = model_map.groups[0].slots[:2]
    given = torch.randn_like(slot_weight(model, model_map.slots[name]))
    before = state(model)
    simulated = simulate(model, {name: "fp8", other: "fp8"}, weights={name: given})
    assert torch.equal(slot_weight(model, model_map.slots[name]), given)
    assert not torch.equal(slot_weight(model, model_map.slots[other]), before[f"{other}.weight"])
    simulated.restore()
    assert same_state(model, before)


@torch.no_grad()
def test_without_originals_the_assignment_is_final():
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map = discover(model)
    reference = make_tiny_model("llama", dtype=torch.float32)
    simulate(reference, spread(model_map))
    expected = forward_logits(reference, token_ids())
    simulated = simulate(model, spread(model_map), keep_originals=False)
    assert torch.equal(forward_logits(model, token_ids()), expected)
    simulated.apply(spread(model_map))  # no change
    with pytest.raises(RuntimeError, match="original weights were not kept"):
        simulated.restore()
    with (
        pytest.raises(RuntimeError, match="original weights were not kept"),
        simulated.paused(),
    ):
        pass
    # What was refused changed nothing.
    assert torch.equal(forward_logits(model, token_ids()), expected)


@torch.no_grad()
def test_a_matrix_that_two_layers_share_is_quantised_once_and_comes_back():
    model = make_tiny_model("llama", dtype=torch.float32)
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    model_map = discover(model)
    group = next(g for g in model_map.groups if "model.layers.1.mlp.down_proj" in g.slots)
    assert len(group.slots) == 2
    before, expected = state(model), forward_logits(model, token_ids())
    weight = first.down_proj.weight.clone()
    formats = dict.fromkeys(group.slots, "nvfp4")
    simulated = simulate(model, formats)
    calibration = LayerCalibration(weight_amax=float(weight.abs().max()), input_amax=1.0)
    stored = quantize_weight(weight, FORMATS["nvfp4"], calibration, scale_dtype=torch.bfloat16)
    assert torch.equal(first.down_proj.weight, dequantize_weight(stored))
    for layer in (first, second):
        assert "forward" in vars(layer.down_proj)  # both quantise their inputs
    quantised = forward_logits(model, token_ids())
    with simulated.paused():
        assert same_state(model, before)
    assert torch.equal(forward_logits(model, token_ids()), quantised)
    simulated.apply(dict.fromkeys(group.slots, "fp8"))
    simulated.restore()
    assert same_state(model, before)
    assert torch.equal(forward_logits(model, token_ids()), expected)


def test_slot_formats_follow_the_groups():
    model_map = discover(make_tiny_model("llama", dtype=torch.float32))
    assignment = {group.name: "none" for group in model_map.groups}
    assignment[model_map.groups[0].name] = "fp8"
    formats = slot_formats_of(model_map, assignment)
    assert set(formats) == set(model_map.slots)
    assert {name for name, fmt in formats.items() if fmt == "fp8"} == set(model_map.groups[0].slots)


@every_kind
def test_cached_weights_are_those_that_quantising_again_gives(name):
    from autoq.layers.weight_cache import WeightCache

    model = make_tiny_model(name, dtype=torch.float32)
    model_map = discover(model)
    cache = WeightCache(1 << 26)
    with torch.no_grad():
        simulated = simulate(model, spread(model_map), cache=cache)
        for shift in (1, 2, 0, 1):
            simulated.apply(spread(model_map, shift))
            found = forward_logits(model, token_ids())
            alone = make_tiny_model(name, dtype=torch.float32)
            simulate(alone, spread(model_map, shift))
            assert torch.equal(found, forward_logits(alone, token_ids()))
        assert cache.bytes_held > 0
        simulated.restore()
        own = make_tiny_model(name, dtype=torch.float32)
        assert torch.equal(forward_logits(model, token_ids()), forward_logits(own, token_ids()))
