"""Scoring kernels: values with the torch body's bits, sums as close to the reference as promised."""

import math

import pytest
import torch

from autoq.kernels import scoring
from autoq.kernels._launch import scoring as launch
from autoq.kernels._reference import scoring as reference
from autoq.kernels._scheme import Scheme
from autoq.kernels._torch import scoring as body
from autoq.kernels.targets import TARGETS

TARGET = TARGETS["sm_90"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The second target rounds to E4M3 by integer arithmetic and has other tiles.
DTYPES_AND_TARGETS = [
    (torch.float32, "sm_90"),
    (torch.bfloat16, "sm_90"),
    (torch.bfloat16, "sm_80"),
    (torch.float16, "sm_80"),
]

FLOAT32_ROUNDING = 2.0**-24
"""Of one operation, relative; a sum of n terms is off by at most n of it times their magnitudes."""

# A part of one tile; several tiles of channels and several programs and steps of rows.
SHAPES = [(1, 1), (7, 130), (37, 16), (520, 144)]


def _random(device, *shape, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype)


def _scale_for(x, scheme):
    if scheme is Scheme.FP8_ROW:
        return None
    return x.float().abs().max() / (448.0 if scheme is Scheme.FP8_TENSOR else 2688.0)


def _operands(device, tokens, outputs, inputs, dtype=torch.float32):
    """(g, dW, x', x, g W)."""
    exact = _random(device, tokens, inputs)
    return (
        _random(device, tokens, outputs, seed=1, dtype=dtype),
        _random(device, outputs, inputs, seed=2, dtype=dtype) * 0.01,
        exact + 0.01 * _random(device, tokens, inputs, seed=3),
        exact,
        _random(device, tokens, inputs, seed=4, dtype=dtype),
    )


def _assert_projection(result, operands):
    gradient, error, changed, exact, input_gradient = (tensor.double() for tensor in operands)
    products = (gradient.abs() @ error.abs()) * changed.abs()
    magnitudes = products + (changed - exact).abs() * input_gradient.abs()
    # Three products in TF32 are as exact as four roundings of one in float32.
    allowed = FLOAT32_ROUNDING * (error.shape[0] + error.shape[1] + 12) * magnitudes.sum(1)
    assert result.dtype is torch.float32
    assert ((result.double() - reference.project(*operands)).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_statistics(shape, dtype, device, assert_same_bits):
    x = _random(device, *shape, dtype=dtype)
    amax, absolute_sum = launch.input_statistics(x, target=TARGET)
    expected_amax, sums = reference.statistics(x.cpu(), x.cpu())
    assert_same_bits(amax.cpu(), expected_amax)
    # 256 rows of a program: 16 turns, then a tree of 16.
    torch.testing.assert_close(absolute_sum.cpu(), sums[0], rtol=20 * FLOAT32_ROUNDING, atol=0)


@pytest.mark.parametrize(("dtype", "name"), DTYPES_AND_TARGETS)
@pytest.mark.parametrize("scheme", list(Scheme))
def test_values_and_statistics(scheme, dtype, name, device, assert_same_bits):
    x = _random(device, 37, 272, dtype=dtype)
    x[2], x[:, 3], x[1, 5] = 0.0, 0.0, 40.0
    scale = _scale_for(x, scheme)
    values, amax, sums = launch.fake_quantize_with_statistics(
        x, scheme, scale, target=TARGETS[name]
    )
    assert_same_bits(values, body.fake_quantize(x, scheme, scale))
    expected_amax, expected = reference.statistics(x.cpu(), values.cpu())
    assert_same_bits(amax.cpu(), expected_amax)
    torch.testing.assert_close(sums.cpu(), expected, rtol=20 * FLOAT32_ROUNDING, atol=0)


def test_statistics_of_many_rows_by_few_programs(device, monkeypatch, assert_same_bits):
    monkeypatch.setattr(launch, "_WANTED_PROGRAMS", 2)
    x = _random(device, 300, 144)
    values, amax, sums = launch.fake_quantize_with_statistics(
        x, Scheme.FP8_ROW, None, target=TARGET
    )
    assert_same_bits(values, body.fake_quantize(x, Scheme.FP8_ROW, None))
    expected_amax, expected = reference.statistics(x.cpu(), values.cpu())
    assert_same_bits(amax.cpu(), expected_amax)
    torch.testing.assert_close(sums.cpu(), expected, rtol=20 * FLOAT32_ROUNDING, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_shows_in_its_channel(value, device):
    x = torch.ones(40, 3, device=device)
    x[33, 1] = value
    amax, _ = launch.input_statistics(x, target=TARGET)
    assert amax.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_statistics_of_nothing_are_zero(shape, device):
    x = torch.ones(shape, device=device)
    one = torch.ones((), device=device)
    values, amax, sums = launch.fake_quantize_with_statistics(
        x, Scheme.FP8_TENSOR, one, target=TARGET
    )
    assert values.shape == shape
    assert torch.equal(amax, torch.zeros(shape[1], device=device))
    assert torch.equal(sums, torch.zeros(3, shape[1], dtype=torch.float64, device=device))


@pytest.mark.parametrize(("dtype", "name"), DTYPES_AND_TARGETS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 70, 130), (200, 40, 144)], ids=str)
def test_projections(shape, dtype, name, device):
    operands = _operands(device, *shape, dtype=dtype)
    _assert_projection(launch.project(*operands, target=TARGETS[name]), operands)


@pytest.mark.parametrize(("dtype", "name"), DTYPES_AND_TARGETS)
@pytest.mark.parametrize("scheme", [Scheme.FP8_TENSOR, Scheme.NVFP4])
def test_projections_of_a_weight(scheme, dtype, name, device, assert_same_bits):
    gradient, weight, *inputs = _operands(device, 70, 40, 144, dtype=dtype)
    scale = _scale_for(weight, scheme)
    error = reference.weight_error(weight.cpu(), scheme, scale.cpu(), dtype).to(device)
    target = TARGETS[name]
    result = launch.project_weight(gradient, weight, scheme, scale, *inputs, target=target)
    _assert_projection(result, (gradient, error, *inputs))


def test_projections_are_repeatable_and_of_each_token_alone(device, assert_same_bits):
    gradient, error, *inputs = _operands(device, 70, 40, 272)
    whole = launch.project(gradient, error, *inputs, target=TARGET)
    assert_same_bits(launch.project(gradient, error, *inputs, target=TARGET), whole)
    gradient[3] = math.inf
    other = launch.project(gradient, error, *inputs, target=TARGET)
    assert other[3].isnan() or other[3].isinf()
    assert_same_bits(torch.cat([other[:3], other[4:]]), torch.cat([whole[:3], whole[4:]]))


def test_infinity_outside_the_channels_is_not_multiplied(device):
    gradient, error, changed, exact, input_gradient = _operands(device, 3, 4, 5)
    gradient[:] = math.inf
    error[:] = 1.0
    result = launch.project(gradient, error, changed.abs(), exact, input_gradient, target=TARGET)
    assert (result == math.inf).all()


def test_operands_with_strides(device, assert_same_bits):
    operands = _operands(device, 20, 24, 48)
    strided = tuple(tensor.t().contiguous().t() for tensor in operands)
    assert_same_bits(
        launch.project(*strided, target=TARGET), launch.project(*operands, target=TARGET)
    )
    for found, expected in zip(
        launch.input_statistics(strided[2], target=TARGET),
        launch.input_statistics(operands[2], target=TARGET),
        strict=True,
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)], ids=str)
def test_empty_projections(shape, device):
    operands = _operands(device, *shape)
    _assert_projection(launch.project(*operands, target=TARGET), operands)


def test_the_public_functions_launch_these_kernels(device, monkeypatch):
    gradient, weight, *inputs = _operands(device, 5, 24, 48)
    scale = _scale_for(weight, Scheme.NVFP4)
    error = reference.weight_error(weight.cpu(), Scheme.NVFP4, scale.cpu(), torch.float32)
    for name in ("fake_quantize_with_statistics", "input_statistics", "project", "project_weight"):
        monkeypatch.setattr(body, name, None)
    monkeypatch.setattr(scoring, "triton_target", lambda _: TARGET)
    operands = (gradient, error.to(device), *inputs)
    _assert_projection(scoring.project(*operands), operands)
    result = scoring.project_weight(gradient, weight, Scheme.NVFP4, scale, *inputs)
    _assert_projection(result, operands)
    values, statistics = scoring.fake_quantize_with_statistics(weight, Scheme.NVFP4, scale)
    amax, sums = reference.statistics(weight.cpu(), values.cpu())
    assert torch.equal((values - weight).cpu(), error)
    assert torch.equal(statistics.amax.cpu(), amax)
    found = (statistics.absolute_sum, statistics.square_sum, statistics.error_square_sum)
    torch.testing.assert_close(torch.stack(found).cpu(), sums, rtol=20 * FLOAT32_ROUNDING, atol=0)
    assert torch.equal(scoring.input_statistics(weight)[0].cpu(), amax)
