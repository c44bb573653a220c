"""Rounding with error feedback, and the second moments of inputs that it needs."""

import itertools
from functools import partial

import pytest
import torch

from autoq.calibration import calibrate
from autoq.calibration.gptq import ErrorFeedback
from autoq.calibration.moments import (
    ROWS_PER_CHANNEL,
    MomentCollector,
    collect_moments,
    moment_owners,
    parts_in_memory,
)
from autoq.formats import FORMATS, CalibrationMethod, FeedbackOptions
from autoq.layers import Container
from autoq.layers.quantize import fake_quantize_weight
from autoq.models import discover, forward_logits, slot_weight
from autoq.testing.tiny_models import make_tiny_model

WHOLE_NUMBERS = torch.arange(-8.0, 8.0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(rows, columns, seed=0):
    """Inputs that a few directions explain, as layers' are."""
    mixing = normal(4, columns, seed=seed + 1)
    return normal(rows, 4, seed=seed) @ mixing + 0.3 * normal(rows, columns, seed=seed + 2)


def output_error(values, weight, moment):
    error = (values - weight).double()
    return float(((error @ moment.double()) * error).sum())


def test_two_columns_by_hand():
    # M = [[4, 2], [2, 4]]: column 0 is rounded first, 0.4 -> 0. The outputs are made good best by
    # adding 0.4 * 2 / (4 + damping) to column 1: 0.35 + 0.198 = 0.548 -> 1, and not 0.
    moment = torch.tensor([[4.0, 2.0], [2.0, 4.0]])
    weight = torch.tensor([[0.4, 0.35]])
    found = ErrorFeedback.of(moment).round(weight, torch.ones(1, 2), WHOLE_NUMBERS)
    assert WHOLE_NUMBERS[found.int()].tolist() == [[0.0, 1.0]]
    # 4 * .16 + 2 * 2 * -.4 * .65 + 4 * .4225 = 1.29 against 4 * .16 + 2 * 2 * .14 + 4 * .1225 = 1.69
    assert output_error(torch.tensor([[0.0, 1.0]]), weight, moment) == pytest.approx(1.29)
    assert output_error(torch.zeros(1, 2), weight, moment) == pytest.approx(1.69)


def test_the_channel_of_most_power_is_rounded_first():
    # In the order of the columns 0.45 -> 0 would be made good in column 1; the stronger column 1 is
    # rounded to 2 first, and column 0 takes 0.45 - 0.2 * 2 / 1 = 0.05 -> 0.
    moment = torch.tensor([[1.0, 2.0], [2.0, 5.0]])
    weight = torch.tensor([[0.45, 1.8]])
    found = ErrorFeedback.of(moment).round(weight, torch.ones(1, 2), WHOLE_NUMBERS)
    assert WHOLE_NUMBERS[found.int()].tolist() == [[0.0, 2.0]]


def test_uncorrelated_inputs_leave_the_nearest_levels():
    weight = 3 * normal(5, 300)
    moment = torch.diag(normal(300, seed=1).square() + 0.1)
    found = ErrorFeedback.of(moment).round(weight, torch.ones_like(weight), WHOLE_NUMBERS)
    assert torch.equal(WHOLE_NUMBERS[found.int()], weight.round().clamp(-8, 7))


def test_over_blocks_of_columns_it_is_the_column_by_column_method():
    """Against the textbook: no blocks, the inverse taken anew for the columns that are left."""
    columns = 150  # more than one block of 128
    inputs = correlated_inputs(2000, columns)
    moment = inputs.t() @ inputs / len(inputs)
    weight, step = 2 * normal(3, columns, seed=5), 0.5 + normal(3, columns, seed=6).square()
    damped = (
        moment.double()
        + FeedbackOptions().damping * moment.double().diagonal().mean() * torch.eye(columns)
    )
    left, values = weight.double().clone(), torch.zeros(3, columns).double()
    order = torch.argsort(moment.diagonal(), descending=True).tolist()
    for position, column in enumerate(order):
        rest = order[position:]
        inverse = torch.linalg.inv(damped[rest][:, rest])
        unit = step[:, column].double()
        values[:, column] = (left[:, column] / unit).round().clamp(-8, 7) * unit
        error = (left[:, column] - values[:, column]) / inverse[0, 0]
        left[:, rest] -= torch.outer(error, inverse[0])
    found = ErrorFeedback.of(moment).round(weight, step, WHOLE_NUMBERS)
    same = (WHOLE_NUMBERS[found.int()] * step - values).abs() < 1e-6
    # float32 may tip a value that lies between two levels, and then all that follow it in its row.
    assert same.all(dim=1).sum() >= 2


@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_nearer_than_with_the_nearest_levels(seed):
    inputs = correlated_inputs(500, 48, seed=10 * seed)
    moment = inputs.t() @ inputs / len(inputs)
    weight = 2 * normal(7, 48, seed=seed + 100)
    found = ErrorFeedback.of(moment).round(weight, torch.ones_like(weight), WHOLE_NUMBERS)
    nearest = weight.round().clamp(-8, 7)
    fed_back = output_error(WHOLE_NUMBERS[found.int()], weight, moment)
    assert fed_back < 0.7 * output_error(nearest, weight, moment)


def test_without_inputs_the_nearest_levels_are_taken():
    weight = 3 * normal(4, 6)
    found = ErrorFeedback.of(torch.zeros(6, 6)).round(weight, torch.ones(4, 6), WHOLE_NUMBERS)
    assert torch.equal(WHOLE_NUMBERS[found.int()], weight.round().clamp(-8, 7))


# Second moments


def llama_batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4, 260, (2, 7), generator=generator) for _ in range(count)]


def moments_by_hooks(model, names, batches):
    totals = dict.fromkeys(names, 0.0)

    def hook(name, _, arguments):
        rows = arguments[0].flatten(0, -2)
        totals[name] = totals[name] + rows.t() @ rows

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names
    ]
    with torch.no_grad():
        for ids in batches:
            forward_logits(model, ids)
    for handle in handles:
        handle.remove()
    return totals


def test_moments_are_sums_over_inputs_and_fused_layers_share_one():
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map, batches = discover(model), llama_batches()
    found = collect_moments(
        model,
        model_map,
        model_map.groups,
        batches,
        partial(forward_logits, model),
        batch_count=len(batches),
    )
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    expected = moments_by_hooks(model, names, batches)
    for name in names:
        torch.testing.assert_close(found[name].total, expected[name])
        assert found[name].rows == 3 * 2 * 7
    assert "model.layers.0.self_attn.k_proj" not in found
    assert len(found) == 4 * len(model.model.layers)


def test_experts_that_read_one_tensor_pool_their_rows():
    model = make_tiny_model("qwen3_moe", dtype=torch.float32)
    model_map, batches = discover(model), llama_batches()
    found = collect_moments(
        model,
        model_map,
        model_map.groups,
        batches,
        partial(forward_logits, model),
        batch_count=len(batches),
    )
    owners = moment_owners(model_map.groups)
    pooled = [group.input_sets[0] for group in model_map.groups if group.input_sets]
    assert pooled
    tokens_per_layer = 3 * 2 * 7 * model.config.num_experts_per_tok
    for names in pooled:
        owner = owners[names[0]]
        assert {owners[name] for name in names if name in owners} == {owner}
        assert found[owner].rows == tokens_per_layer


def test_correlations_of_few_rows_are_shrunk_and_powers_are_not():
    rows = correlated_inputs(6, 6)
    collector = MomentCollector(
        discover(make_tiny_model("llama", dtype=torch.float32)).groups[:1], 1
    )
    name = next(iter(collector.slots))
    collector.record(name, rows)
    mean = collector.moments[name].mean()
    plain = rows.t() @ rows / 6
    torch.testing.assert_close(mean.diagonal(), plain.diagonal())
    torch.testing.assert_close(mean.triu(1), 0.5 * plain.triu(1))


def test_more_rows_than_are_worth_it_are_left_out():
    groups = discover(make_tiny_model("llama", dtype=torch.float32)).groups[:1]
    collector = MomentCollector(groups, batch_count=4)
    name = next(iter(collector.slots))
    for seed in range(4):
        collector.record(name, normal(1000, 4, seed=seed))
    assert collector.moments[name].rows == ROWS_PER_CHANNEL * 4


def test_parts_fit_in_memory_and_hold_every_group_once():
    model_map = discover(make_tiny_model("llama", dtype=torch.float32))
    width, inner = 64, model_map.slots["model.layers.0.mlp.down_proj"].in_features
    largest = 4 * max(width, inner) ** 2
    for bound in (0, largest, 2 * largest, 10**9):
        parts = list(parts_in_memory(model_map, model_map.groups, bound))
        assert list(itertools.chain(*parts)) == list(model_map.groups)
        for part in parts:
            taken = sum(
                4 * model_map.slots[owner].in_features ** 2
                for owner in set(moment_owners(part).values())
            )
            assert taken <= bound or len(part) == 1
    assert len(list(parts_in_memory(model_map, model_map.groups, 0))) == len(model_map.groups)


# In calibration


def calibrated(model, formats, batches, **options):
    return calibrate(
        model,
        discover(model),
        formats,
        batches,
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, batches[0][:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        **options,
    )


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_codes_are_the_same_in_however_many_parts(name):
    model = make_tiny_model(name, dtype=torch.float32)
    whole = calibrated(model, ("nvfp4", "w4a8_awq"), llama_batches())
    parts = calibrated(model, ("nvfp4", "w4a8_awq"), llama_batches(), moment_bytes=0)
    assert whole.keys() == parts.keys()
    with_codes = 0
    for key, entry in whole.items():
        if entry.codes is not None:
            with_codes += 1
            assert torch.equal(entry.codes, parts[key].codes)
        assert entry.weight_amax == parts[key].weight_amax
    assert with_codes > len(whole) / 2


@pytest.mark.parametrize("fmt", ["nvfp4", "w4a8_awq", "mxfp4"])
def test_a_layers_outputs_are_nearer_with_codes_than_with_scales_alone(fmt):
    model = make_tiny_model("llama", dtype=torch.float32)
    batches = llama_batches(40)
    tables = {
        method: calibrated(model, (fmt,), batches, method=method)
        for method in (CalibrationMethod.SCALES, CalibrationMethod.BEST)
    }
    name = "model.layers.1.mlp.down_proj"
    moment = moments_by_hooks(model, [name], batches)[name]
    weight = slot_weight(model, discover(model).slots[name]).float()
    errors = {}
    for method, table in tables.items():
        entry = table[name, fmt]
        assert (entry.codes is None) == (method is CalibrationMethod.SCALES)
        values = fake_quantize_weight(weight, FORMATS[fmt], entry, scale_dtype=torch.bfloat16)
        if entry.pre_quant_scale is not None:
            values = values * entry.pre_quant_scale
        errors[method] = output_error(values, weight, moment)
    assert errors[CalibrationMethod.BEST] < errors[CalibrationMethod.SCALES]
