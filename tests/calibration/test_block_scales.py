"""Block scales by the error of outputs: hand-made choices, brute force, and what is stored of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from autoq.calibration import calibrate
from autoq.calibration.block_scales import chosen_scales
from autoq.formats import FORMATS, CalibrationMethod, Container, parse_calibration
from autoq.layers import LayerCalibration
from autoq.layers.quantize import (
    ScaleChoices,
    dequantize_weight,
    fake_quantize_weight,
    quantize_weight,
    scale_choices,
)
from autoq.models import discover, forward_logits
from autoq.models.weights import slot_weight
from autoq.testing.tiny_models import make_tiny_model

LEVELS = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])


def nearest_level(values: Tensor) -> Tensor:
    return LEVELS[(values[..., None] - LEVELS).abs().argmin(-1)]


def choices_of(steps: list[float], rows: int, blocks: int) -> ScaleChoices:
    step = torch.tensor(steps)[:, None, None].expand(-1, rows, blocks).contiguous()
    return ScaleChoices(nearest=nearest_level, stored=step, step=step)


def rounded(weight: Tensor, scale: Tensor) -> Tensor:
    """Nearest levels under a scale per block."""
    step = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    return nearest_level(weight / step) * step


def losses(weight: Tensor, scale: Tensor, moment: Tensor) -> Tensor:
    error = (rounded(weight, scale) - weight).double()
    return ((error @ moment.double()) * error).sum(-1)


def some_moment(width: int, seed: int) -> Tensor:
    rows = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(seed))
    mixed = rows @ torch.randn(width, width, generator=torch.Generator().manual_seed(seed + 1))
    return mixed.t() @ mixed / len(mixed)


def test_a_block_makes_up_for_what_another_does_to_the_output() -> None:
    # Both inputs are always equal, so errors add up. Of 0.75 the steps 0.55, 0.8 and 0.6 leave -0.2, 0.05
    # and -0.15, of 0.6 they leave -0.05, 0.2 and 0: the smallest by themselves are 0.05 and 0.
    weight = torch.tensor([[0.75, 0.6]])
    choices = choices_of([0.55, 0.8, 0.6], 1, 2)
    found = chosen_scales(weight, choices, torch.ones(2, 2))
    assert found.tolist() == [[pytest.approx(0.8), pytest.approx(0.55)]]  # 0.05 - 0.05
    alone = chosen_scales(weight, choices, torch.eye(2))
    assert alone.tolist() == [[pytest.approx(0.8), pytest.approx(0.6)]]


def test_blocks_whose_inputs_are_unrelated_take_the_best_by_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 12, generator=generator)
    steps = [1.0, 0.9, 0.7, 0.5, 0.3]
    moment = torch.zeros(12, 12)
    for start in (0, 4, 8):
        moment[start : start + 4, start : start + 4] = some_moment(4, start)
    found = chosen_scales(weight, choices_of(steps, 7, 3), moment)
    best = torch.stack(
        [
            losses(weight, torch.tensor(scales).expand(7, 3), moment)
            for scales in product(steps, repeat=3)
        ]
    ).amin(0)
    torch.testing.assert_close(losses(weight, found, moment), best)


def test_related_blocks_end_where_no_change_of_the_last_one_helps_and_never_above_the_first() -> (
    None
):
    weight = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    steps = [1.0, 0.9, 0.7, 0.5, 0.3]
    moment = some_moment(12, 5)
    found = chosen_scales(weight, choices_of(steps, 50, 3), moment)
    loss = losses(weight, found, moment)
    first = losses(weight, torch.ones(50, 3), moment)
    assert (loss <= first * (1 + 1e-5)).all()  # float32 sums
    assert loss.sum() < 0.8 * first.sum()
    for step in steps:
        other = found.clone()
        other[:, -1] = step  # the block that was looked at last
        assert (loss <= losses(weight, other, moment) * (1 + 1e-5)).all()


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "int4_awq", "w4a8_awq"])
def test_the_first_choices_are_what_would_be_taken_and_a_chosen_one_is_taken(fmt: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 256, generator=generator)
    plain = LayerCalibration(
        weight_amax=float(weight.abs().max()),
        input_amax=1.0,
        importance=torch.rand(256, generator=generator),
    )
    options = {"scale_dtype": torch.bfloat16}
    choices = scale_choices(weight, FORMATS[fmt], plain, **options)
    assert choices is not None
    name = "group_scale" if fmt in ("int4_awq", "w4a8_awq") else "block_scale"
    taken = quantize_weight(weight, FORMATS[fmt], plain, **options).tensors[name]
    assert torch.equal(taken.float(), choices.stored[0].float())
    for number in range(1, len(choices.stored)):
        entry = replace(plain, block_scale=choices.stored[number])
        quantized = quantize_weight(weight, FORMATS[fmt], entry, **options)
        assert torch.equal(quantized.tensors[name].float(), choices.stored[number].float())
        values = fake_quantize_weight(weight, FORMATS[fmt], entry, **options)
        assert torch.equal(values, dequantize_weight(quantized))


@pytest.mark.parametrize(
    ("fmt", "share"), [("nvfp4", 0.95), ("mxfp4", 0.99), ("int4_awq", 0.95), ("w4a8_awq", 0.95)]
)
def test_outputs_of_every_layer_are_nearer_than_with_scales_by_importance(
    fmt: str, share: float
) -> None:
    """MXFP4's scales are powers of two, of which there are three to choose from."""
    model = make_tiny_model("llama", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    batches = [torch.randint(vocabulary, (4, 64), generator=generator) for _ in range(10)]
    model_map = discover(model)
    table = calibrate(
        model,
        model_map,
        [fmt],
        batches,
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, batches[0][:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.float32,
        method=parse_calibration("mse"),
    )
    inputs: dict[str, list[Tensor]] = {}
    for name in model_map.slots:
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _, given, __, name=name: inputs.setdefault(name, []).append(given[0])
        )
    with torch.no_grad():
        for batch in batches:
            forward_logits(model, batch)
    assert table
    errors: dict[bool, float] = {True: 0.0, False: 0.0}
    for (name, _), entry in table.items():
        assert entry.block_scale is not None
        assert entry.codes is None
        rows = torch.cat([given.flatten(0, -2) for given in inputs[name]])
        weight = slot_weight(model, model_map.slots[name]).float()
        for chosen in (True, False):
            used = entry if chosen else replace(entry, block_scale=None)
            values = fake_quantize_weight(
                weight, FORMATS[fmt], used, scale_dtype=torch.float32
            ).float()
            exact = rows @ weight.t()
            errors[chosen] += float(
                (rows @ values.t() - exact).square().sum() / exact.square().sum()
            )
    assert errors[True] < share * errors[False]


def test_error_feedback_keeps_the_scales_that_importance_leaves() -> None:
    steps = FORMATS["nvfp4"].algorithm(CalibrationMethod.BEST)
    assert steps.feeds_errors_back
    assert steps.needs_second_moments
    assert not FORMATS["nvfp4"].algorithm(parse_calibration("awq_lite")).needs_second_moments
