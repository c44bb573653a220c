"""Scoring's sums: the reference against hand-computed values, the fast path against the reference."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoq.errors import InputError
from autoq.kernels import fp8, nvfp4, scoring
from autoq.kernels._reference import scoring as reference
from autoq.kernels._torch import scoring as body
from autoq.kernels.scoring import Scheme

FEW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE = torch.tensor(1.0)

FLOAT32_ROUNDING = 2.0**-24
"""Of one operation, relative; a sum of n terms is off by at most n of it times their magnitudes."""

# CPUs round sums of products to the dtype of the operands.
PRODUCT_ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _scale_for(x, scheme):
    if scheme is Scheme.FP8_ROW:
        return None
    amax = x.float().abs().max() if x.numel() else 0.0
    return (fp8.tensor_scale if scheme is Scheme.FP8_TENSOR else nvfp4.global_scale)(amax)


def _operands(tokens, outputs, inputs, dtype=torch.float32, seed=0):
    """(g, dW, x', x, g W)."""
    exact = _random(tokens, inputs, seed=seed)
    return (
        _random(tokens, outputs, seed=seed + 1, dtype=dtype),
        _random(outputs, inputs, seed=seed + 2, dtype=dtype) * 0.01,
        exact + 0.01 * _random(tokens, inputs, seed=seed + 3),
        exact,
        _random(tokens, inputs, seed=seed + 4, dtype=dtype),
    )


def _assert_projection(result, operands, product_rounding):
    gradient, error, changed, exact, input_gradient = (tensor.double() for tensor in operands)
    products = (gradient.abs() @ error.abs()) * changed.abs()
    magnitudes = products + (changed - exact).abs() * input_gradient.abs()
    allowed = FLOAT32_ROUNDING * (error.shape[0] + error.shape[1] + 8) * magnitudes.sum(1)
    allowed += product_rounding * ((gradient @ error) * changed).abs().sum(1)
    assert result.dtype is torch.float32
    assert ((result.double() - reference.project(*operands)).abs() <= allowed).all()


def test_reference_projection_by_hand():
    gradient, error = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.5, -1.0]])
    changed, exact = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 5.0]])
    input_gradient = torch.tensor([[10.0, 1.0]])
    operands = (gradient, error, changed, exact, input_gradient)
    # g dW = [2, -2]; (2 * 3 + 1 * 10) + (-2 * 4 - 1 * 1)
    assert reference.project(*operands).tolist() == [7.0]
    assert scoring.project(*operands).tolist() == [7.0]


def test_reference_statistics_by_hand():
    x, values = torch.tensor([[1.0, -3.0], [-2.0, 0.0]]), torch.tensor([[1.5, -3.0], [-2.0, 1.0]])
    amax, sums = reference.statistics(x, values)
    assert amax.tolist() == [2.0, 3.0]
    assert sums.tolist() == [[3.0, 3.0], [5.0, 9.0], [0.25, 1.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", list(Scheme))
def test_values_and_statistics_equal_reference(scheme, dtype, assert_same_bits):
    x = _random(7, 48, dtype=dtype)
    x[2], x[:, 3], x[1, 5] = 0.0, 0.0, 40.0
    scale = _scale_for(x, scheme)
    values, statistics = scoring.fake_quantize_with_statistics(x, scheme, scale)
    assert_same_bits(values, reference.fake_quantize(x, scheme, scale))
    amax, sums = reference.statistics(x, values)
    assert_same_bits(statistics.amax, amax)
    found = torch.stack(
        [statistics.absolute_sum, statistics.square_sum, statistics.error_square_sum]
    )
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, sums, rtol=8 * FLOAT32_ROUNDING, atol=0)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_values_are_those_of_the_family(scheme, assert_same_bits):
    x = _random(300, 4096)
    scale = _scale_for(x, scheme)
    values, _ = scoring.fake_quantize_with_statistics(x, scheme, scale)
    expected = {
        Scheme.FP8_TENSOR: lambda: fp8.fake_quantize(x, scale),
        Scheme.FP8_ROW: lambda: fp8.fake_quantize(x, scaling=fp8.Scaling.ROW),
        Scheme.NVFP4: lambda: nvfp4.fake_quantize(x, scale),
    }[scheme]()
    assert_same_bits(values, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2100, 517), (16, 70000)], ids=str)
def test_input_statistics_in_one_piece_and_in_several(shape, dtype, assert_same_bits):
    x = _random(*shape, dtype=dtype)
    amax, absolute_sum = scoring.input_statistics(x)
    expected_amax, sums = reference.statistics(x, x)
    assert_same_bits(amax, expected_amax)
    # Sums along a dimension go by several partial sums, so that roundings do not add up.
    torch.testing.assert_close(absolute_sum, sums[0], rtol=64 * FLOAT32_ROUNDING, atol=0)


def test_input_statistics_of_strided_operands(assert_same_bits):
    x = _random(40, 60).bfloat16()
    for view in (x.t(), x[:, ::3], x[::2]):
        for found, expected in zip(
            scoring.input_statistics(view), scoring.input_statistics(view.contiguous()), strict=True
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_statistics_of_nothing_are_zero(shape):
    amax, absolute_sum = scoring.input_statistics(torch.ones(shape))
    assert torch.equal(amax, torch.zeros(shape[1]))
    assert torch.equal(absolute_sum, torch.zeros(shape[1], dtype=torch.float64))
    values, statistics = scoring.fake_quantize_with_statistics(
        torch.ones(shape), Scheme.FP8_TENSOR, ONE
    )
    assert values.shape == shape and not statistics.error_square_sum.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_shows_in_its_channel(value):
    x = torch.ones(5, 3)
    x[2, 1] = value
    amax, _ = scoring.input_statistics(x)
    assert amax.isfinite().tolist() == [True, False, True]
    _, statistics = scoring.fake_quantize_with_statistics(x, Scheme.FP8_TENSOR, ONE)
    assert statistics.amax.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (33, 64, 130), (2, 300, 2000)], ids=str)
def test_projection_equals_reference(shape, dtype):
    operands = _operands(*shape, dtype=dtype)
    _assert_projection(scoring.project(*operands), operands, PRODUCT_ROUNDING[dtype])


def test_projection_of_narrow_inputs():
    operands = tuple(tensor.bfloat16() for tensor in _operands(9, 20, 40))
    _assert_projection(scoring.project(*operands), operands, PRODUCT_ROUNDING[torch.bfloat16])


def test_projection_in_pieces(monkeypatch):
    monkeypatch.setattr(body, "_NARROWEST", 32)
    monkeypatch.setattr(body, "_PRODUCT_ELEMENTS", 1)
    operands = _operands(9, 20, 100)
    _assert_projection(scoring.project(*operands), operands, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [Scheme.FP8_TENSOR, Scheme.NVFP4])
def test_projection_of_a_weight_has_the_bits_of_its_error(scheme, dtype, assert_same_bits):
    gradient, weight, *inputs = _operands(9, 48, 160, dtype=dtype)
    scale = _scale_for(weight, scheme)
    error = reference.weight_error(weight, scheme, scale, dtype)
    assert error.any()
    assert_same_bits(
        scoring.project_weight(gradient, weight, scheme, scale, *inputs),
        scoring.project(gradient, error, *inputs),
    )


def test_projection_of_a_weight_in_pieces(monkeypatch, assert_same_bits):
    monkeypatch.setattr(body, "_NARROWEST", 32)
    monkeypatch.setattr(body, "_PRODUCT_ELEMENTS", 1)
    gradient, weight, *inputs = _operands(9, 48, 112)
    for scheme in (Scheme.FP8_TENSOR, Scheme.NVFP4):
        scale = _scale_for(weight, scheme)
        error = reference.weight_error(weight, scheme, scale, torch.float32)
        result = scoring.project_weight(gradient, weight, scheme, scale, *inputs)
        _assert_projection(result, (gradient, error, *inputs), 0.0)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)], ids=str)
def test_empty_projections(shape):
    tokens, outputs, inputs = shape
    gradient, error = torch.ones(tokens, outputs), torch.ones(outputs, inputs)
    changed, exact = torch.full((tokens, inputs), 2.0), torch.ones(tokens, inputs)
    # Without outputs, what the changed inputs do to the loss is left.
    expected = torch.full((tokens,), 3.0 * inputs)
    result = scoring.project(gradient, error, changed, exact, 3 * exact)
    assert torch.equal(result, expected if not outputs else torch.zeros(tokens))


def test_no_gradient_flows_and_operands_stay(assert_same_bits):
    operands = _operands(4, 16, 32)
    before = [tensor.clone() for tensor in operands]
    leaves = [tensor.requires_grad_() for tensor in operands]
    assert not scoring.project(*leaves).requires_grad
    assert not scoring.project_weight(*leaves[:2], Scheme.NVFP4, ONE, *leaves[2:]).requires_grad
    values, statistics = scoring.fake_quantize_with_statistics(leaves[0], Scheme.FP8_ROW)
    assert not values.requires_grad and not statistics.absolute_sum.requires_grad
    assert not scoring.input_statistics(leaves[0])[1].requires_grad
    for tensor, was in zip(operands, before, strict=True):
        assert torch.equal(tensor, was)


@FEW
@given(st.integers(1, 6), st.integers(1, 20), st.integers(1, 40), st.integers(0, 10**6))
def test_projections_are_linear_in_the_gradients(tokens, outputs, inputs, seed):
    gradient, error, changed, exact, input_gradient = _operands(tokens, outputs, inputs, seed=seed)
    once = scoring.project(gradient, error, changed, exact, input_gradient)
    # A power of two scales every rounding with it.
    twice = scoring.project(2 * gradient, error, changed, exact, 2 * input_gradient)
    assert torch.equal(twice, 2 * once)
    opposite = scoring.project(-gradient, error, changed, exact, -input_gradient)
    assert torch.equal(opposite, -once)


@FEW
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from(list(Scheme)))
def test_no_error_where_nothing_is_lost(tokens, blocks, seed, scheme):
    x = _random(tokens, 16 * blocks, seed=seed)
    scale = _scale_for(x, scheme)
    values, statistics = scoring.fake_quantize_with_statistics(x, scheme, scale)
    assert (statistics.error_square_sum >= 0).all()
    assert (statistics.error_square_sum > 0).equal((values != x).any(0))
    if scheme is Scheme.FP8_TENSOR:
        _, again = scoring.fake_quantize_with_statistics(values, scheme, scale)
        assert not again.error_square_sum.any()


GRADIENT, MATRIX = torch.ones(3, 4), torch.ones(4, 16)
INPUTS = (torch.ones(3, 16),) * 3

REFUSED = [
    pytest.param(
        lambda: scoring.input_statistics(torch.ones(2, 2, dtype=torch.float64)),
        "x must be float32 or bfloat16 or float16, got float64",
        id="float64",
    ),
    pytest.param(
        lambda: scoring.input_statistics(torch.ones(2, 2, 2)),
        r"x must be a matrix, got shape \(2, 2, 2\)",
        id="three_dimensions",
    ),
    pytest.param(
        lambda: scoring.fake_quantize_with_statistics(torch.ones(2, 8), Scheme.NVFP4, ONE),
        "the last dimension of x must be a multiple of 16, got 8",
        id="blocks",
    ),
    pytest.param(
        lambda: scoring.fake_quantize_with_statistics(torch.ones(2, 8), Scheme.FP8_TENSOR),
        "scale must be given for fp8_tensor, got None",
        id="no_scale",
    ),
    pytest.param(
        lambda: scoring.fake_quantize_with_statistics(torch.ones(2, 8), Scheme.FP8_ROW, ONE),
        "scale must be left out for fp8_row",
        id="row_scale",
    ),
    pytest.param(
        lambda: scoring.fake_quantize_with_statistics(torch.ones(2, 8), Scheme.FP8_TENSOR, 0 * ONE),
        "scale must be finite and at least 2",
        id="zero_scale",
    ),
    pytest.param(
        lambda: scoring.project(GRADIENT, torch.ones(5, 16), *INPUTS),
        "weight_error must have as many rows as output_gradient has columns, got 5 and 4",
        id="rows",
    ),
    pytest.param(
        lambda: scoring.project(GRADIENT, MATRIX.bfloat16(), *INPUTS),
        "weight_error must be float32, got bfloat16",
        id="error_dtype",
    ),
    pytest.param(
        lambda: scoring.project(GRADIENT, MATRIX, torch.ones(2, 16), *INPUTS[1:]),
        r"changed must have shape \(3, 16\), got \(2, 16\)",
        id="changed_shape",
    ),
    pytest.param(
        lambda: scoring.project(GRADIENT, MATRIX, *INPUTS[:2], INPUTS[2].int()),
        "input_gradient must be .* got int32",
        id="input_gradient_dtype",
    ),
    pytest.param(
        lambda: scoring.project(GRADIENT, MATRIX, *INPUTS[:2], INPUTS[2].to("meta")),
        "operands must be on one device, got cpu and meta",
        id="devices",
    ),
    pytest.param(
        lambda: scoring.project_weight(GRADIENT, MATRIX, Scheme.FP8_ROW, ONE, *INPUTS),
        "scheme must be fp8_tensor or nvfp4 for weights, got fp8_row",
        id="row_weights",
    ),
    pytest.param(
        lambda: scoring.project_weight(
            GRADIENT, torch.ones(4, 8), Scheme.NVFP4, ONE, *(x[:, :8] for x in INPUTS)
        ),
        "the last dimension of weight must be a multiple of 16, got 8",
        id="weight_blocks",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_say_rule_and_value(call, message):
    with pytest.raises(InputError, match=message):
        call()
