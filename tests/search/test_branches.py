"""Scores of layers with a branch of low rank are those of what the layers compute."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from autoq.calibration import calibrate
from autoq.errors import InputError
from autoq.formats import FORMATS, CalibrationMethod
from autoq.layers import Container, LayerCalibration, fake_quantize_input, fake_quantize_weight
from autoq.layers.quantize import branch_product
from autoq.layers.taps import MatrixCall
from autoq.models import ModelMap, discover, forward_logits, slot_weight
from autoq.search._branches import surplus_outputs, surplus_projections
from autoq.search._projections import WeightErrors, seen_inputs
from autoq.search.estimators.factored import score_new_format
from autoq.search.estimators.quantized_point import _ProductAtPoint
from autoq.testing.tiny_models import make_tiny_model

NAME = "nvfp4_svdquant"
ATTENTION = tuple(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv")
ALONE = ("model.layers.1.mlp.down_proj",)


@cache
def calibrated() -> tuple[nn.Module, ModelMap, dict]:
    model = make_tiny_model("llama", dtype=torch.float32).requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight[7] *= 40  # so that an input scale is worth it
    ids = torch.randint(4, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    model_map = discover(model)
    table = calibrate(
        model,
        model_map,
        (NAME,),
        [ids],
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, ids[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        method=CalibrationMethod.MAX,
    )
    return model, model_map, table


def drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def computed(weight: Tensor, entry: LayerCalibration, x: Tensor) -> Tensor:
    """What the layer gives, by its definition."""
    coded = fake_quantize_weight(weight, FORMATS[NAME], entry, scale_dtype=torch.bfloat16)
    branch = branch_product(x, entry)
    assert branch is not None
    return fake_quantize_input(x, FORMATS[NAME], entry) @ coded.t() + branch


@pytest.mark.parametrize("names", [ATTENTION, ALONE], ids=["fused", "alone"])
def test_projections_are_those_of_the_layers_error(names: tuple[str, ...]) -> None:
    model, model_map, table = calibrated()
    slots = tuple(model_map.slots[name] for name in names)
    weights = [slot_weight(model, slot) for slot in slots]
    x = drawn(17, slots[0].in_features, seed=1)
    gradients = [drawn(17, slot.out_features, seed=2 + i) for i, slot in enumerate(slots)]
    expected = sum(
        (g * (computed(w, table[n, NAME], x) - x @ w.t())).sum(dim=1)
        for g, w, n in zip(gradients, weights, names, strict=True)
    )
    errors = WeightErrors(model, table, Container.MODELOPT, torch.bfloat16, torch.float32)
    entry = table[names[0], NAME]
    changed = seen_inputs(x, NAME, entry, Container.MODELOPT)
    input_gradient = sum(g @ w for g, w in zip(gradients, weights, strict=True))
    gradient = torch.cat(gradients, dim=1)
    found = errors.project(slots, NAME, gradient, changed, x, input_gradient)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    # What is subtracted for the branch is no detail.
    surplus = surplus_projections([table[n, NAME] for n in names], gradient, changed, x)
    assert surplus.abs().mean() > 0.05 * expected.abs().mean()


def test_surplus_is_the_branchs_product_with_the_inputs_error() -> None:
    _, _, table = calibrated()
    entry = table[ALONE[0], NAME]
    assert entry.pre_quant_scale is not None
    x = drawn(5, len(entry.pre_quant_scale), seed=3)
    changed = x + drawn(*x.shape, seed=4)
    effective = entry.low_rank.values() * entry.pre_quant_scale
    found = surplus_outputs(entry, changed, x)
    torch.testing.assert_close(found, (changed - x) @ effective.t(), rtol=1e-4, atol=1e-4)
    plain = LayerCalibration(weight_amax=1.0, input_amax=1.0)
    assert surplus_outputs(plain, changed, x) is None
    assert surplus_projections([plain], found, changed, x) is None


def test_operating_point_computes_what_the_layer_does() -> None:
    model, model_map, table = calibrated()
    slot, entry = model_map.slots[ALONE[0]], table[ALONE[0], NAME]
    weight, x = slot_weight(model, slot), drawn(5, model_map.slots[ALONE[0]].in_features, seed=3)
    errors = WeightErrors(model, table, Container.MODELOPT, torch.bfloat16, torch.float32)
    product = _ProductAtPoint(
        MatrixCall(slot, weight, None),
        lambda call: call.weight + errors.get(slot, NAME),
        lambda _, inputs: seen_inputs(inputs, NAME, entry, Container.MODELOPT),
        entry,
    )
    found = product.compute_detached(x[None])[0]
    torch.testing.assert_close(found, computed(weight, entry, x), rtol=1e-4, atol=1e-3)


def test_factors_alone_cannot_score_a_branch() -> None:
    model, model_map, table = calibrated()
    with pytest.raises(InputError, match=r"no branch of low rank, got nvfp4_svdquant; search with"):
        score_new_format(
            NAME,
            {},
            model,
            model_map,
            table,
            container=Container.MODELOPT,
            scale_dtype=torch.bfloat16,
        )
