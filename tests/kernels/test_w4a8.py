"""Two-level INT4 and its products: reference by hand, fast paths against it."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from autoq.errors import InputError
from autoq.kernels import fp8, int4, w4a8
from autoq.kernels._reference import int4 as reference_int4
from autoq.kernels._reference import w4a8 as reference

FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _fast_values(codes: torch.Tensor, scale: torch.Tensor, tensor_scale: torch.Tensor):
    packed = int4.pack(codes, scale)
    return w4a8.dequantize(w4a8.W4A8Tensor(packed.codes, scale, tensor_scale))


both_values = pytest.mark.parametrize("values", [_fast_values, reference.values])


def _weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[6, 256]: groups of every magnitude, zero groups, zeros of both signs."""
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(7))
    weight[1] *= 1e-4
    weight[2] *= 1e3
    weight[4, :128] = 0.0
    weight[5, ::2] = -0.0
    return weight.to(dtype)


@both_values
def test_second_level_by_hand(values):
    codes = torch.tensor([[7, 5, -8, 0, 1, -1]], dtype=torch.int8)
    actual = values(codes, torch.tensor([[16.0]]), torch.tensor(1.75))
    rate = 9.140625  # fp16(16 / 1.75)
    assert [7 * rate, 5 * rate, -8 * rate] == [63.984375, 45.703125, -73.125]
    # Of E4M3's neighbours 64, 44 and 48, -72 and -80 the nearest; 9 and 10 beside 9.14.
    expected = [64 * 1.75, 44 * 1.75, -72 * 1.75, 0.0, 9 * 1.75, -9 * 1.75]
    assert actual.tolist() == [expected]
    assert not actual.signbit()[0, 3]


@both_values
def test_second_level_rounds_the_rate_to_float16_twice(values):
    def value(scale: float, tensor_scale: float) -> float:
        divisor = torch.tensor(tensor_scale)
        ones = torch.ones(1, 2, dtype=torch.int8)
        return (values(ones, torch.tensor([[scale]]), divisor) / divisor)[0, 0].item()

    # The group scale: 2**-25 is half of the smallest float16, a tie that goes to zero.
    assert value(2.0**-25, 2.0**-25) == 0.0
    assert value(2.0**-24, 2.0**-24) == 1.0
    # The quotient: 136 is the tie between 128 and 144 in E4M3; what lies above it by less than
    # half a float16 step goes to the even neighbour all the same.
    assert value(1.0, 1 / 136.05) == 128.0
    assert value(1.0, 1 / 136.10) == 144.0


@pytest.mark.parametrize("amax", [1.0, 1e-3, 1e-6, 1e-12, 1e-30])
@both_values
def test_an_empty_group_stays_zero_beside_tiny_weights(values, amax):
    """The engine's float16 rate of an empty group once overflowed, and made NaN of its zeros."""
    weight = torch.tensor([[0.0, 0.0, amax, -amax]])
    scale = int4.group_scale(weight, 2, storage_dtype=torch.bfloat16)
    codes = reference_int4.codes(weight, scale)
    actual = values(codes, scale, fp8.tensor_scale(amax))
    assert actual[0, :2].tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(actual).all())


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("storage_dtype", DTYPES)
@pytest.mark.parametrize("group_size", [2, 64, 128])
def test_fast_paths_equal_reference(weight_dtype, storage_dtype, group_size, assert_same_bits):
    weight = _weight(weight_dtype)
    scale = reference_int4.group_scale(weight, group_size, storage_dtype)
    codes = reference_int4.codes(weight, scale)
    tensor_scale = fp8.tensor_scale(reference_int4.values(codes, scale).abs().max())
    packed = w4a8.quantize(weight, group_size=group_size, storage_dtype=storage_dtype)
    assert_same_bits(packed.codes, reference_int4.pack(codes, group_size))
    assert_same_bits(packed.group_scale, scale)
    assert_same_bits(packed.tensor_scale, tensor_scale)
    assert (packed.shape, packed.group_size) == ((6, 256), group_size)
    values = reference.values(codes, scale, tensor_scale, weight_dtype)
    assert_same_bits(w4a8.dequantize(packed, weight_dtype), values)
    assert_same_bits(w4a8.fake_quantize(weight, scale, tensor_scale), values)
    left_out = w4a8.fake_quantize(weight, group_size=group_size, storage_dtype=storage_dtype)
    assert_same_bits(left_out, values)


def test_strided_operands_in_many_pieces(assert_same_bits):
    weight = torch.randn(1024, 1152, generator=torch.Generator().manual_seed(1))
    tensor_scale = torch.tensor(0.01)
    for operand in (weight, weight.t(), weight.bfloat16().t()):
        scale = int4.group_scale(operand, storage_dtype=torch.bfloat16)
        packed = w4a8.quantize(operand, scale, tensor_scale)
        stored = w4a8.dequantize(packed, operand.dtype)
        assert_same_bits(w4a8.fake_quantize(operand, scale, tensor_scale), stored)


def test_the_second_level_of_zeros_is_one():
    packed = w4a8.quantize(torch.zeros(2, 128))
    assert packed.tensor_scale.item() == 1.0
    assert torch.equal(w4a8.dequantize(packed), torch.zeros(2, 128))


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("static", [False, True], ids=["per_row", "static"])
@pytest.mark.parametrize("rows", [(), (2, 5), (0,)], ids=str)
def test_linear_is_the_product_of_what_is_left(x_dtype, levels, static, rows, assert_same_bits):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*rows, 256, generator=generator).to(x_dtype)
    two_level = w4a8.quantize(torch.randn(24, 256, generator=generator))
    bias = torch.randn(24, generator=generator)
    input_scale = torch.tensor(0.02) if static else None
    if static:
        kept = fp8.fake_quantize(x, input_scale)
    else:
        kept = fp8.fake_quantize(x, scaling=fp8.Scaling.ROW)
    packed = two_level if levels == 2 else two_level.int4
    dequantize = w4a8.dequantize if levels == 2 else int4.dequantize
    expected = functional.linear(kept, dequantize(packed, x_dtype), bias.to(x_dtype))
    actual = w4a8.linear(x, packed, bias, input_scale=input_scale)
    assert_same_bits(actual, expected)
    wide = w4a8.linear(x, packed, bias, input_scale=input_scale, out_dtype=torch.float32)
    assert_same_bits(wide, expected.float())


weights = st.lists(st.floats(-1e4, 1e4, width=32), min_size=16, max_size=16)


@FEW
@given(weights, st.floats(1.0, 2.0**20, width=32))
def test_any_weight_equals_reference(values, headroom):
    weight = torch.tensor(values).reshape(2, 8)
    tensor_scale = fp8.tensor_scale(weight.abs().max()) * headroom
    scale = int4.group_scale(weight, 4, storage_dtype=torch.float16)
    codes = reference_int4.codes(weight, scale)
    expected = reference.values(codes, scale, tensor_scale)
    actual = w4a8.fake_quantize(weight, scale, tensor_scale)
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


@FEW
@given(weights)
def test_sign_symmetry(values):
    weight = torch.tensor(values).reshape(2, 8)
    assert torch.equal(
        w4a8.fake_quantize(-weight, group_size=4), -w4a8.fake_quantize(weight, group_size=4)
    )


def _packed(tensor_scale: torch.Tensor) -> w4a8.W4A8Tensor:
    return w4a8.W4A8Tensor(torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1), tensor_scale)


REFUSED = [
    pytest.param(
        lambda: w4a8.fake_quantize(torch.ones(2, 8), torch.ones(2, 1), torch.zeros(())),
        "tensor_scale must be finite and at least 2.* got 0.0",
        id="zero_scale",
    ),
    pytest.param(
        lambda: w4a8.quantize(torch.ones(2, 8), torch.ones(2, 1), torch.ones(1)),
        r"tensor_scale must have shape \(\), got \(1,\)",
        id="scale_shape",
    ),
    pytest.param(
        lambda: w4a8.dequantize(_packed(torch.ones(()).half())),
        "tensor_scale must be float32, got float16",
        id="scale_dtype",
    ),
    pytest.param(
        lambda: w4a8.dequantize(_packed(torch.ones(())), torch.float64),
        "the result must be .* got float64",
        id="result_dtype",
    ),
    pytest.param(
        lambda: w4a8.linear(torch.ones(3, 7), _packed(torch.ones(()))),
        r"x must have the weight's 8 columns, got shape \(3, 7\)",
        id="columns_of_x",
    ),
    pytest.param(
        lambda: w4a8.linear(
            torch.ones(3, 8), _packed(torch.ones(())), input_scale=torch.tensor(-1.0)
        ),
        "scale must be finite and at least 2.* got -1.0",
        id="input_scale",
    ),
    pytest.param(
        lambda: w4a8.linear(torch.ones(3, 8), _packed(torch.tensor(math.inf))),
        "tensor_scale must be finite and at least 2.* got inf",
        id="infinite_scale",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_say_rule_and_value(call, message):
    with pytest.raises(InputError, match=message):
        call()
