"""Input scales: powers of two that lower the output error, or none at all."""

import pytest
import torch

from autoq.calibration.awq import search_input_scale
from autoq.calibration.scales import mean_square
from autoq.calibration.statistics import InputStatistics
from autoq.formats import FORMATS
from autoq.layers import (
    Container,
    LayerCalibration,
    dequantize_weight,
    fake_quantize_input,
    quantize_weight,
)

W4A8 = FORMATS["w4a8_awq"]
every_container = pytest.mark.parametrize("container", list(Container))


def statistics_of(rows):
    statistics = InputStatistics.empty(
        rows.shape[1], keep=len(rows), dtype=rows.dtype, device=rows.device
    )
    statistics.record(rows, keep=len(rows))
    return statistics


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outliers(in_features, count=4, seed=3):
    """Factors per channel: a few from 20 to 60, the rest one."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.ones(in_features)
    chosen = torch.randperm(in_features, generator=generator)[:count]
    factors[chosen] = 20 + 40 * torch.rand(count, generator=generator)
    return factors


def search(weights, rows, container=Container.MODELOPT):
    return search_input_scale(
        weights, statistics_of(rows), W4A8, scale_dtype=torch.bfloat16, container=container
    )


def output_error(weights, rows, scale, container):
    """Squared error of the outputs, from codes and scales, with the scales shared as stored."""
    smoothed = [w if scale is None else w / scale for w in weights]
    scaled_rows = rows if scale is None else rows * scale
    unshared = LayerCalibration(weight_amax=1.0, input_amax=1.0, pre_quant_scale=scale)
    values = [
        dequantize_weight(
            quantize_weight(w, W4A8, unshared, scale_dtype=torch.bfloat16),
            container=Container.COMPRESSED_TENSORS,
        )
        for w in weights
    ]
    calibration = LayerCalibration(
        weight_amax=max(float(v.abs().max()) for v in values),
        input_amax=float(scaled_rows.abs().max()),
        pre_quant_scale=scale,
    )
    seen = fake_quantize_input(rows, W4A8, calibration, container=container)
    error = 0.0
    for weight, exact in zip(weights, smoothed, strict=True):
        stored = quantize_weight(weight, W4A8, calibration, scale_dtype=torch.bfloat16)
        values = dequantize_weight(stored, container=container)
        error += float((seen @ values.t() - scaled_rows @ exact.t()).square().sum())
    return error


@every_container
@pytest.mark.parametrize("seed", range(3))
def test_the_scale_is_powers_of_two_and_lowers_the_error(container, seed):
    factors = outliers(256, seed=seed)
    rows = normal(64, 256, seed=seed) * factors
    weights = [normal(32, 256, seed=seed + 10)]
    scale = search(weights, rows, container)
    assert scale.shape == (256,)
    assert scale.dtype is torch.float32
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    assert scale.log2().abs().max() <= 13
    plain = output_error(weights, rows, None, container)
    assert output_error(weights, rows, scale, container) < plain / 2
    large = factors > 1
    assert scale[large].median() < scale[~large].median()


@every_container
@pytest.mark.parametrize("seed", range(4))
def test_the_scale_is_never_worse_than_none(container, seed):
    rows = normal(16, 128, seed=seed)
    weights = [normal(8, 128, seed=seed + 10), 3 * normal(6, 128, seed=seed + 20)]
    scale = search(weights, rows, container)
    plain = output_error(weights, rows, None, container)
    if scale is not None:
        assert output_error(weights, rows, scale, container) < plain


@every_container
def test_weights_of_one_input_share_the_best_scale_for_their_sum(container):
    factors = outliers(128)
    rows = normal(32, 128) * factors
    first, second = normal(16, 128, seed=1) / factors, 50 * normal(8, 128, seed=2) / factors
    together = search([first, second], rows, container)
    errors = [
        output_error([first, second], rows, scale, container)
        for scale in (together, None, search([first], rows, container), search([second], rows))
    ]
    assert errors[0] <= min(errors) * (1 + 1e-6)
    # The larger weight has nearly all of the error.
    assert torch.equal(together, search([second], rows, container))


@every_container
def test_none_where_plain_rounding_is_exact(container):
    # Codes times a power of two, whole-numbered inputs below 16 with the amax at E4M3's 448:
    # nothing is lost without a scale.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-7, 8, (8, 128), generator=generator).float()
    weight[:, 0] = 7
    rows = torch.randint(-15, 16, (4, 128), generator=generator).float()
    rows[:, 0] = 448.0
    assert output_error([weight], rows, None, container) == 0.0
    assert search([weight], rows, container) is None


def test_none_without_rows_to_try_on():
    empty = InputStatistics.empty(128, keep=0, dtype=torch.float32, device=torch.device("cpu"))
    arguments = {"scale_dtype": torch.bfloat16, "container": Container.MODELOPT}
    assert search_input_scale([normal(8, 128)], empty, W4A8, **arguments) is None


def test_silent_channels_and_columns_do_no_harm():
    factors = outliers(128)
    rows, weight = normal(32, 128) * factors, normal(16, 128, seed=1) / factors
    rows[:, 5] = 0
    weight[:, 9] = 0
    scale = search([weight], rows)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()


def test_the_search_repeats_itself_and_changes_nothing():
    factors = outliers(128)
    rows, weight = normal(32, 128) * factors, (normal(16, 128, seed=1) / factors).bfloat16()
    before = weight.clone()
    assert torch.equal(search([weight], rows.bfloat16()), search([weight], rows.bfloat16()))
    assert torch.equal(weight, before)


def weighed_search(weights, rows):
    statistics = statistics_of(rows)
    return search_input_scale(
        weights,
        statistics,
        FORMATS["nvfp4"],
        scale_dtype=torch.bfloat16,
        container=Container.MODELOPT,
        importance=mean_square([statistics]),
    )


def test_with_chosen_block_scales_outliers_still_want_an_input_scale():
    factors = outliers(128)
    scale = weighed_search([normal(16, 128, seed=1) / factors], normal(64, 128) * factors)
    assert scale is not None
    assert scale[factors > 1].max() < scale[factors == 1].median()


@pytest.mark.parametrize("seed", range(3))
def test_with_chosen_block_scales_even_inputs_have_none(seed):
    # Nothing distinguishes the channels, so whatever wins, wins by luck.
    assert weighed_search([normal(64, 128, seed=seed)], normal(256, 128, seed=seed + 10)) is None
