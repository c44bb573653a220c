"""Weights that are zero or broken, and experts that no token reached: scales are numbers, or are refused."""

from functools import partial

import pytest
import torch

from autoq.api.stages import note_unseen_slots
from autoq.calibration import calibrate
from autoq.errors import ModelError
from autoq.formats import FORMATS, NONE, parse_calibration
from autoq.layers import Container, dequantize_weight, quantize_weight
from autoq.models import SlotKind, discover, forward_logits, slot_weight
from autoq.testing.tiny_models import make_tiny_model

ALL = tuple(name for name in FORMATS if name != NONE)
ZERO = "model.layers.0.mlp.down_proj"


def calibrated(model, formats, text, *, container=Container.COMPRESSED_TENSORS, tokens=8):
    data = [torch.randint(4, 260, (1, tokens), generator=torch.Generator().manual_seed(0))]
    return calibrate(
        model,
        discover(model),
        formats,
        data,
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, data[0]),
        container=container,
        scale_dtype=torch.bfloat16,
        method=parse_calibration(text),
    )


def llama_with_zeros():
    """A matrix, a member of a fused set, rows, and whole blocks of columns of zeros."""
    model = make_tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule(ZERO).weight.zero_()
        model.model.layers[0].self_attn.v_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight[:3] = 0
        model.model.layers[1].mlp.gate_proj.weight[:, :32] = 0
    return model


@pytest.mark.parametrize("text", ["best", "rtn", "awq_lite+smoothquant:0.5", "mse+gptq"])
def test_zero_weights_have_scales_that_are_numbers_and_stay_zero(text):
    model = llama_with_zeros()
    slots = discover(model).slots
    for (name, fmt), entry in calibrated(model, ALL, text).items():
        scale = entry.pre_quant_scale
        assert scale is None or bool((torch.isfinite(scale) & (scale > 0)).all())
        quantized = quantize_weight(
            slot_weight(model, slots[name]), FORMATS[fmt], entry, scale_dtype=torch.bfloat16
        )
        for tensor in quantized.tensors.values():
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
        values = dequantize_weight(quantized, container=Container.COMPRESSED_TENSORS)
        assert bool(torch.isfinite(values).all()), (name, fmt)
        if name == ZERO:
            assert not values.any(), fmt


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", ["fp8", "nvfp4", "int4_awq", "int8_sq", "mxfp4"])
def test_broken_weights_name_their_layer(fmt, broken):
    model = make_tiny_model("llama", dtype=torch.float32)
    weight = model.model.layers[1].mlp.down_proj.weight  # the last: no layer's input shows it
    with torch.no_grad():
        weight[3, 5] = broken
    with pytest.raises(ModelError, match=r"and model\.layers\.1\.mlp\.down_proj has NaN"):
        calibrated(model, (fmt,), "best")


@pytest.mark.parametrize("largest", [1e-30, 1e30])
def test_input_scales_are_finite_at_the_ends_of_float32(largest):
    model = make_tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:, ::2] *= largest
    formats = ("nvfp4", "int8_sq")
    for text in ("awq_lite+smoothquant", "smoothquant:0", "smoothquant:1"):
        for entry in calibrated(model, formats, text).values():
            scale = entry.pre_quant_scale
            assert scale is None or bool((torch.isfinite(scale) & (scale > 0)).all())


class Notes:
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


def test_experts_that_no_token_reached_are_named_and_scaled_from_their_weights():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    model_map = discover(model)
    table = calibrated(model, ("fp8", "nvfp4"), "best", tokens=1)
    unseen = {slot for (slot, _), entry in table.items() if entry.input_rows == 0}
    assert unseen and all(model_map.slots[slot].kind is SlotKind.EXPERT for slot in unseen)
    for slot in unseen:
        weight = slot_weight(model, model_map.slots[slot])
        assert table[slot, "fp8"].weight_amax == float(weight.abs().max())
        assert 0 < table[slot, "fp8"].input_amax < 1e4
        values = dequantize_weight(
            quantize_weight(
                weight, FORMATS["nvfp4"], table[slot, "nvfp4"], scale_dtype=torch.bfloat16
            )
        )
        # E2M1 in blocks leaves less than a tenth of the power as error.
        assert float((values - weight).square().sum()) < 0.1 * float(weight.square().sum())
    notes = Notes()
    note_unseen_slots(table, notes)
    first = next(slot for (slot, _), entry in table.items() if entry.input_rows == 0)
    assert f"no calibration token reached {first}, " in notes.texts[0]
    assert f"and {len(unseen) - 6} more: scales follow from the weights there" in notes.texts[0]


def test_nothing_is_said_where_every_matrix_was_reached():
    notes = Notes()
    note_unseen_slots(calibrated(make_tiny_model("llama"), ("fp8",), "best"), notes)
    assert not notes.texts
