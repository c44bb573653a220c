"""Products with one input are projected as one: the same sums, with less work."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from autoq.calibration import calibrate
from autoq.formats import CalibrationMethod
from autoq.layers import LayerCalibration
from autoq.layers.quantize import Container
from autoq.models import discover, forward_logits
from autoq.search._projections import same_tensor
from autoq.search._shared_inputs import SharedInput, formats_with_equal_inputs, shared_by
from autoq.search.estimators import TokenProjection, token_projection
from autoq.search.objectives import own_distribution_loss
from autoq.search.sensitivity import BatchLoss
from autoq.testing.tiny_models import make_tiny_model

FORMATS = ("nvfp4", "fp8", "w4a8_awq")
SEQUENCES, TOKENS = 2, 8
ORDER_OF_SUMS = 1e-4
"""Of some hundred float32 terms of either sign, relative to a mean of squares."""


def calibration_of(model, run, data):
    return calibrate(
        model,
        discover(model),
        FORMATS,
        [data],
        partial(run, model),
        run_small=lambda: run(model, data[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        method=CalibrationMethod.MAX,
    )


def scorer_of(model, calibration, formats=FORMATS, dtype=torch.float32, **options):
    options.setdefault("added_variance", 0.0)  # all tokens
    return TokenProjection(
        model,
        discover(model),
        formats,
        calibration,
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        dtype=dtype,
        **options,
    )


@pytest.fixture(scope="module")
def llama():
    model = make_tiny_model("llama", dtype=torch.float32)
    ids = torch.randint(4, 260, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))

    def loss():
        generator = torch.Generator().manual_seed(0)
        return BatchLoss(own_distribution_loss(forward_logits(model, ids), generator), *ids.shape)

    return model, calibration_of(model, forward_logits, ids), loss


@pytest.mark.parametrize("row_fraction", [1.0, 0.5])
def test_members_together_contribute_what_they_do_one_by_one(llama, row_fraction):
    model, calibration, loss = llama
    together = scorer_of(model, calibration, row_fraction=row_fraction)
    apart = scorer_of(model, calibration, row_fraction=row_fraction)
    assert len(apart._sets) == 2 * (3 + 2)
    apart._sets = {}
    found, expected = together.score_batch(0, loss), apart.score_batch(0, loss)
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=ORDER_OF_SUMS)


def count(monkeypatch, module, name):
    calls, original = [], getattr(module, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_an_input_is_quantised_once_for_all_members_and_all_formats_that_leave_the_same(
    llama, monkeypatch
):
    """FP8 and W4A8 read E4M3 under one scale: two kinds of input, not three."""
    model, calibration, loss = llama
    calibration = {
        cell: replace(scales, pre_quant_scale=None, input_amax=4.0)
        for cell, scales in calibration.items()
    }
    seen = count(monkeypatch, token_projection, "seen_inputs")
    found = scorer_of(model, calibration).score_batch(0, loss)
    inputs_per_block = 4  # of q, k and v; o; gate and up; down
    assert len(seen) == 2 * inputs_per_block * 2
    seen.clear()
    other = {
        (slot, name): replace(scales, input_amax=2 * scales.input_amax)
        if name == "w4a8_awq"
        else scales
        for (slot, name), scales in calibration.items()
    }
    changed = scorer_of(model, other).score_batch(0, loss)
    assert len(seen) == 2 * inputs_per_block * 3
    assert np.array_equal(changed[..., :2], found[..., :2])
    assert not np.array_equal(changed[..., 2], found[..., 2])


class Siblings(nn.Module):
    """Two layers that a fusion set could be of, but that read different inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(128, 64), nn.Linear(128, 32)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x.flip(0))], dim=-1)


def test_inputs_that_differ_are_not_taken_for_one():
    model = Siblings()
    x = torch.randn(SEQUENCES, TOKENS, 128, generator=torch.Generator().manual_seed(0))
    calibration = calibration_of(model, lambda m, data: m(data), x)
    noise = torch.randn(SEQUENCES, TOKENS, 96, generator=torch.Generator().manual_seed(1))

    def score(sets):
        scorer = scorer_of(model, calibration)
        scorer._sets = sets
        return scorer.score_batch(0, lambda: BatchLoss((model(x) * noise).sum(), SEQUENCES, TOKENS))

    names = ("first", "second")
    assert np.array_equal(score(dict.fromkeys(names, names)), score({}))


def test_a_backward_that_failed_leaves_nothing_to_the_next(llama):
    model, calibration, loss = llama
    scorer = scorer_of(model, calibration)

    expected = scorer_of(model, calibration).score_batch(0, loss)
    project = scorer._errors.project
    calls = []

    def fails_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return project(*args)

    scorer._errors.project = fails_at_the_third
    with pytest.raises(MemoryError):
        scorer.score_batch(0, loss)
    assert np.array_equal(scorer.score_batch(0, loss), expected)


def slot_of(name, weights=6):
    return next(iter(discover(nn.ModuleDict({name: nn.Linear(weights // 2, 2)})).slots.values()))


def test_a_shared_input_gathers_one_product_of_each_member():
    """By hand: gradients side by side in the set's order, and gradients at the input added."""
    query, key = slot_of("query"), slot_of("key")
    inputs = torch.ones(1, 3)
    shared = SharedInput((query.name, key.name), inputs, torch.zeros(1, 1), slice(None))
    assert shared.takes(key, inputs.clone())
    assert not shared.takes(key, 2 * inputs)
    assert not shared.takes(slot_of("value"), inputs)
    shared.add(key, torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0, 2.0]]))
    assert not shared.takes(key, inputs)
    assert not shared.is_complete
    shared.add(query, torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0, 0.0]]))
    assert shared.is_complete
    assert shared.slots == (query, key)
    assert shared.output_gradient().tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert shared.input_gradient().tolist() == [[1.5, 1.0, 2.0]]


def test_sets_too_large_for_one_matrix_stay_apart(llama):
    """By hand: gate and up have 2 x 256 x 128 weights, q, k and v 128 x 128 and twice 64 x 128."""
    model_map = discover(llama[0])
    assert len(shared_by(model_map, 65536)) == 10
    assert {name.split(".")[3] for name in shared_by(model_map, 65535)} == {"self_attn"}
    assert len(shared_by(model_map, 32768)) == 6
    assert shared_by(model_map, 32767) == {}


def test_formats_with_equal_inputs():
    def scales(amax, pre_quant_scale=None):
        return LayerCalibration(input_amax=amax, weight_amax=1.0, pre_quant_scale=pre_quant_scale)

    smooth = torch.ones(4)
    calibration = {
        ("a", "fp8"): scales(1.0),
        ("a", "nvfp4"): scales(1.0),
        ("a", "w4a8_awq"): scales(1.0),
        ("b", "fp8"): scales(1.0),
        ("b", "w4a8_awq"): scales(1.0, smooth),
    }

    def of(slot, container=Container.MODELOPT):
        return formats_with_equal_inputs(slot, FORMATS, calibration, container)

    assert of("a") == [["nvfp4"], ["fp8", "w4a8_awq"]]
    # There the inputs of W4A8 have a scale for every token.
    assert of("a", Container.COMPRESSED_TENSORS) == [["nvfp4"], ["fp8"], ["w4a8_awq"]]
    assert of("b") == [["fp8"], ["w4a8_awq"]]


def test_same_tensor_knows_views_of_one_memory_apart():
    values = torch.arange(4.0).reshape(2, 2)
    assert same_tensor(values, values.view(2, 2))
    assert not same_tensor(values, values.t())
    assert same_tensor(values, values.clone())
    assert not same_tensor(values, values.view(torch.int32))
