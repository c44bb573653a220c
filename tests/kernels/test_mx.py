"""What MXFP8 and MXFP4 have in common: scales, special values, products, laws."""

import itertools
import math
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoq.errors import InputError
from autoq.kernels import mxfp4, mxfp8
from autoq.kernels._mx import MXTensor, ScaleRule
from autoq.kernels._reference import mx as reference

FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

FAMILIES = {
    "mxfp8": SimpleNamespace(
        family=mxfp8, packed=mxfp8.MXFP8Tensor, element=reference.E4M3, pack=lambda codes: codes
    ),
    "mxfp4": SimpleNamespace(
        family=mxfp4, packed=mxfp4.MXFP4Tensor, element=reference.E2M1, pack=reference.pack
    ),
}


@pytest.fixture(params=FAMILIES)
def mx(request):
    return FAMILIES[request.param]


def _block(*values: float) -> torch.Tensor:
    return torch.tensor([*values, *[0.0] * (32 - len(values))])


def _hostile_values(dtype: torch.dtype) -> torch.Tensor:
    """[10, 96]: blocks of every magnitude, ties, zero blocks, zeros of both signs, subnormals."""
    x = torch.randn(10, 96, generator=torch.Generator().manual_seed(5))
    x[1] *= torch.exp2(-torch.arange(6.0).repeat_interleave(16) * 3)
    x[2] *= 1e3
    x[3] = (torch.arange(96) % 32 - 16) * 0.25
    x[4, :32] = 0.0
    x[5, ::2] = -0.0
    x[6] *= 1e-39
    x[7, 16:32] *= 1e-12
    x[8] *= 1e38
    x[9] *= torch.exp2(-torch.arange(96.0))
    return x.to(dtype)


def test_every_scale_byte_decodes_by_hand(mx, assert_same_bits):
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    one = mx.family.quantize(_block(*[1.0] * 32)).codes.expand(256, -1).contiguous()
    values = mx.family.dequantize(mx.packed(one, bytes_))[:, 0]
    unit = mx.element.decode(reference.unpack(one) if one.dtype == torch.uint8 else one)[0, 0]
    expected = torch.tensor(
        [min(float(unit) * 2.0 ** (byte - 127), math.inf) for byte in range(255)] + [math.nan],
        dtype=torch.float64,
    ).float()
    assert_same_bits(values, expected)
    assert reference.decode_scale(0) == 2.0**-127
    assert reference.decode_scale(127) == 1.0
    assert reference.decode_scale(254) == 2.0**127
    assert math.isnan(reference.decode_scale(255))


@pytest.mark.parametrize("amax", [math.nan, math.inf, -math.inf, -math.nan], ids=str)
@pytest.mark.parametrize("rule", ScaleRule)
def test_nan_and_infinity_spoil_their_block_only(mx, amax, rule):
    x = torch.ones(2, 96)
    x[1, 40] = amax
    packed = mx.family.quantize(x, rule)
    assert packed.block_scale[1, 1] == 255
    per_byte = 32 // packed.element.codes_per_byte
    spoiled_codes = packed.codes.view(torch.uint8)[1, per_byte : 2 * per_byte]
    assert spoiled_codes.eq(0).all()
    for values in (mx.family.dequantize(packed), mx.family.fake_quantize(x, rule)):
        assert values[1, 32:64].isnan().all()
        assert values.isnan().sum() == 32
    codes, scale = reference.quantize(x, mx.element, rule)
    assert torch.equal(packed.block_scale, scale)
    assert torch.equal(packed.codes.view(torch.uint8), mx.pack(codes).view(torch.uint8))


def test_a_block_of_zeros_gets_the_smallest_scale(mx, assert_same_bits):
    for rule in ScaleRule:
        packed = mx.family.quantize(torch.zeros(2, 64), rule)
        assert packed.block_scale.eq(0).all() and packed.codes.view(torch.uint8).eq(0).all()
        assert_same_bits(mx.family.dequantize(packed), torch.zeros(2, 64))
        assert_same_bits(mx.family.fake_quantize(torch.zeros(2, 64), rule), torch.zeros(2, 64))


@pytest.mark.parametrize("rule", ScaleRule)
def test_scales_never_fall_below_the_smallest(mx, rule):
    for amax in (2.0**-149, 2.0**-140, 2.0**-127, 2.0**-126, 1.4 * 2.0**-125):
        packed = mx.family.quantize(_block(amax), rule)
        assert packed.block_scale.item() == 0
        error = abs(mx.family.dequantize(packed)[0].item() - amax)
        step = 2.0**-136 if packed.element.codes_per_byte == 1 else 2.0**-128
        assert error <= max(step / 2, amax / (16 if packed.element.codes_per_byte == 1 else 4))


@pytest.mark.parametrize("rule", ScaleRule)
def test_the_largest_numbers_stay_finite(mx, rule):
    largest = torch.finfo(torch.float32).max
    x = _block(largest, -largest, 1e38, 1.0)
    result = mx.family.fake_quantize(x, rule)
    expected = mx.element.largest * 2.0 ** (127 - mx.element.largest_exponent)
    assert result[:2].tolist() == [expected, -expected]
    assert result.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ScaleRule)
def test_fast_paths_equal_reference(mx, dtype, rule, assert_same_bits):
    x = _hostile_values(dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    codes, scale = reference.quantize(x, mx.element, rule)
    packed = mx.family.quantize(x, rule)
    assert_same_bits(packed.codes.view(torch.uint8), mx.pack(codes).view(torch.uint8))
    assert_same_bits(packed.block_scale, scale)
    values = reference.dequantize(codes, scale, mx.element, dtype)
    assert_same_bits(mx.family.dequantize(packed, dtype), values)
    assert_same_bits(mx.family.fake_quantize(x, rule), values)
    assert_same_bits(reference.fake_quantize(x, mx.element, rule), values)


@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 3, 96), (0, 64), (5, 0)], ids=str)
def test_odd_shapes(mx, shape):
    x = torch.full(shape, 1.5)
    packed = mx.family.quantize(x)
    assert packed.shape == shape
    assert packed.block_scale.shape == (*shape[:-1], shape[-1] // 32)
    assert packed.nbytes == x.numel() // packed.element.codes_per_byte + x.numel() // 32
    assert torch.equal(mx.family.dequantize(packed), x)
    assert torch.equal(mx.family.fake_quantize(x), x)


def test_strided_operands_in_many_pieces(mx, assert_same_bits):
    x = torch.randn(1056, 1056, generator=torch.Generator().manual_seed(1))
    for operand in (x, x.t(), x.bfloat16(), x.bfloat16().t()):
        stored = mx.family.dequantize(mx.family.quantize(operand), operand.dtype)
        assert_same_bits(mx.family.fake_quantize(operand), stored)


def test_operands_and_the_graph_are_left_alone(mx):
    x = torch.randn(4, 32, requires_grad=True)
    before = x.detach().clone()
    weight = mx.family.quantize(torch.randn(8, 32, requires_grad=True))
    assert not mx.family.fake_quantize(x).requires_grad
    assert not mx.family.linear(x, weight, torch.ones(8, requires_grad=True)).requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quantize_input", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_what_the_simulation_computes(
    mx, dtype, quantize_input, with_bias, assert_same_bits
):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 5, 96, generator=generator).to(dtype)
    weight = mx.family.quantize(torch.randn(11, 96, generator=generator))
    bias = torch.randn(11, generator=generator).to(dtype) if with_bias else None
    values = mxfp8.fake_quantize(x, ScaleRule.UP) if quantize_input else x
    expected = torch.nn.functional.linear(values, mx.family.dequantize(weight, dtype), bias)
    actual = mx.family.linear(x, weight, bias, quantize_input=quantize_input, rule=ScaleRule.UP)
    assert_same_bits(actual, expected)
    wide = mx.family.linear(x, weight, bias, quantize_input=quantize_input, out_dtype=torch.float32)
    assert wide.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mxfp4_weights_with_mxfp4_inputs(dtype, assert_same_bits):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(3, 5, 96, generator=generator).to(dtype)
    weight = mxfp4.quantize(torch.randn(11, 96, generator=generator), ScaleRule.HALF)
    values = mxfp4.fake_quantize(x, ScaleRule.HALF)
    expected = torch.nn.functional.linear(values, mxfp4.dequantize(weight, dtype))
    actual = mxfp4.linear(x, weight, input_type=mxfp4.MXFP4Tensor, rule=ScaleRule.HALF)
    assert_same_bits(actual, expected)
    with pytest.raises(InputError, match="input_type must be MXFP8Tensor or MXFP4Tensor"):
        mxfp4.linear(x, weight, input_type=torch.Tensor)


@pytest.mark.parametrize(("a", "b"), [(mxfp8, mxfp8), (mxfp8, mxfp4), (mxfp4, mxfp4)])
def test_matmul_is_the_product_of_the_values(a, b):
    generator = torch.Generator().manual_seed(8)
    left = a.quantize(torch.randn(2, 3, 64, generator=generator))
    right = b.quantize(torch.randn(5, 64, generator=generator))
    bias = torch.randn(5, generator=generator)
    values = a.dequantize(left).double() @ b.dequantize(right).double().T + bias.double()
    actual = b.matmul(left, right, bias, out_dtype=torch.float32)
    # Sums of 64 products in float32: each step rounds by 2**-24 of what it has so far.
    torch.testing.assert_close(actual.double(), values, rtol=1e-6, atol=64 * 2.0**-24 * 64)
    assert b.matmul(left, right, out_dtype=torch.bfloat16).dtype == torch.bfloat16


def _packed(columns: int, scales: int, dtype: torch.dtype = torch.uint8) -> MXTensor:
    scale = torch.zeros(2, scales, dtype=torch.uint8)
    return MXTensor(torch.zeros(2, columns, dtype=dtype), scale)


E4M3 = torch.float8_e4m3fn
REFUSED = [
    pytest.param(
        lambda: mxfp8.quantize(torch.ones(2, 48)),
        "the last dimension of x must be a multiple of 32, got 48",
        id="half_a_block",
    ),
    pytest.param(
        lambda: mxfp4.fake_quantize(torch.ones(32, dtype=torch.float64)),
        "x must be .* got float64",
        id="float64",
    ),
    pytest.param(
        lambda: mxfp4.quantize(torch.ones(())), "x must have at least one dimension", id="scalar"
    ),
    pytest.param(
        lambda: mxfp8.dequantize(_packed(32, 1)),
        "the codes of packed must be float8_e4m3fn, got uint8",
        id="codes_of_the_other_family",
    ),
    pytest.param(
        lambda: mxfp4.dequantize(_packed(32, 1)),
        r"the block scale of packed must have shape \(2, 2\), got \(2, 1\)",
        id="scale_shape",
    ),
    pytest.param(
        lambda: mxfp4.dequantize(_packed(24, 1)),
        "the last dimension of packed must be a multiple of 32, got 48",
        id="ragged_codes",
    ),
    pytest.param(
        lambda: mxfp8.dequantize(MXTensor(torch.zeros(2, 32).to(E4M3), torch.ones(2, 1))),
        "the block scale of packed must be uint8, got float32",
        id="scale_dtype",
    ),
    pytest.param(
        lambda: mxfp8.dequantize(_packed(32, 1, E4M3), torch.float64),
        "the result must be .* got float64",
        id="result_dtype",
    ),
    pytest.param(
        lambda: mxfp8.linear(torch.ones(2, 64), _packed(32, 1, E4M3)),
        "both operands must have as many columns, got 64 and 32",
        id="columns",
    ),
    pytest.param(
        lambda: mxfp4.linear(torch.ones(2, 64), _packed(32, 2), torch.ones(3)),
        r"bias must have shape \(2,\), got \(3,\)",
        id="bias_shape",
    ),
    pytest.param(
        lambda: mxfp8.matmul(_packed(32, 1, E4M3), _packed(32, 2), out_dtype=torch.float32),
        "the codes of b must be float8_e4m3fn, got uint8",
        id="operand_of_the_other_family",
    ),
    pytest.param(
        lambda: mxfp4.linear(torch.ones(2, 64, device="meta"), _packed(32, 2)),
        "operands must be on one device, got cpu and meta",
        id="device",
    ),
    pytest.param(
        lambda: mxfp4.linear(
            torch.ones(2, 64),
            MXTensor(torch.zeros(32, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
        ),
        r"the right operand must be a matrix, got \(64,\)",
        id="vector",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_say_rule_and_value(call, message):
    with pytest.raises(InputError, match=message):
        call()


def _float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


any_finite = st.integers(0, 2**32 - 1).map(_float32).filter(math.isfinite)
near_one = st.floats(-8.0, 8.0, width=32)
blocks = st.lists(st.one_of(any_finite, near_one), min_size=32, max_size=32)
rules = st.sampled_from(list(ScaleRule))


@FEW
@given(blocks, rules)
def test_any_float32_block_equals_reference(mx, assert_same_bits, block, rule):
    x = torch.tensor(block)
    packed = mx.family.quantize(x, rule)
    codes, scale = reference.quantize(x, mx.element, rule)
    assert torch.equal(packed.block_scale, scale)
    assert torch.equal(packed.codes.view(torch.uint8), mx.pack(codes).view(torch.uint8))
    values = reference.dequantize(codes, scale, mx.element)
    assert_same_bits(mx.family.fake_quantize(x, rule), values)
    assert_same_bits(mx.family.dequantize(packed), values)


@FEW
@given(blocks, rules)
def test_sign_symmetry(mx, block, rule):
    x = torch.tensor(block)
    assert torch.equal(mx.family.fake_quantize(-x, rule), -mx.family.fake_quantize(x, rule))


@FEW
@given(st.lists(near_one, min_size=32, max_size=32), st.integers(-60, 60), rules)
def test_powers_of_two_pass_through(mx, block, exponent, rule):
    # Nothing here comes near the ends of the scales, so doubling the values doubles the result.
    x = torch.tensor(block)
    x = torch.where(x.abs() < 2.0**-40, 0.0, x)
    factor = 2.0**exponent
    assert torch.equal(
        mx.family.fake_quantize(x * factor, rule), mx.family.fake_quantize(x, rule) * factor
    )


@FEW
@given(blocks, rules)
def test_quantising_twice_changes_nothing(mx, assert_same_bits, block, rule):
    once = mx.family.fake_quantize(torch.tensor(block), rule)
    # -0.0 is what small negative numbers become, and MXFP4 makes 0.0 of it.
    assert torch.equal(mx.family.fake_quantize(once, rule), once)


@FEW
@given(st.lists(any_finite, min_size=2, max_size=2), rules)
def test_scales_grow_with_the_maximum(mx, maxima, rule):
    smaller, larger = sorted(abs(amax) for amax in maxima)
    of_smaller = mx.family.quantize(_block(smaller), rule).block_scale.item()
    assert of_smaller <= mx.family.quantize(_block(larger), rule).block_scale.item()


@FEW
@given(blocks)
def test_rounding_up_saturates_nothing_and_ocp_by_its_bound(mx, block):
    x = torch.tensor(block).clamp(-1e30, 1e30)
    amax = x.abs().max().item()
    for rule, bound in itertools.product(ScaleRule, [mx.element.largest]):
        scale = reference.decode_scale(mx.family.quantize(x, rule).block_scale.item())
        limit = bound if rule is ScaleRule.UP else 2.0 ** (mx.element.largest_exponent + 1)
        assert amax / scale <= limit


@pytest.mark.parametrize("rule", ["ocp", "up", "nearest"])
def test_a_rule_by_name_is_refused_and_not_taken_for_another(mx, rule):
    x = torch.ones(2, 32)
    weight = mx.family.quantize(x)
    for call in (
        lambda: mx.family.quantize(x, rule),
        lambda: mx.family.fake_quantize(x, rule),
        lambda: mx.family.linear(x, weight, rule=rule),
    ):
        with pytest.raises(
            InputError, match=r"rule must be ScaleRule\.OCP or ScaleRule\.UP or ScaleRule\.HALF"
        ):
            call()
