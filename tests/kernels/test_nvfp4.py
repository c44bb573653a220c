"""NVFP4: the reference against hand-computed values, the fast path against the reference."""

import math
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from autoq.errors import InputError
from autoq.kernels import nvfp4
from autoq.kernels._reference import nvfp4 as reference

ONE = torch.tensor(1.0)
FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# magnitude -> (code, value): every code, every tie, both neighbours of every tie.
ROUNDED = [
    (0.0, 0, 0.0),
    (0.1, 0, 0.0),
    (0.25, 0, 0.0),
    (0.2500001, 1, 0.5),
    (0.5, 1, 0.5),
    (0.7499999, 1, 0.5),
    (0.75, 2, 1.0),
    (1.0, 2, 1.0),
    (1.25, 2, 1.0),
    (1.2500001, 3, 1.5),
    (1.5, 3, 1.5),
    (1.7499999, 3, 1.5),
    (1.75, 4, 2.0),
    (2.0, 4, 2.0),
    (2.5, 4, 2.0),
    (2.5000002, 5, 3.0),
    (3.0, 5, 3.0),
    (3.4999998, 5, 3.0),
    (3.5, 6, 4.0),
    (4.0, 6, 4.0),
    (5.0, 6, 4.0),
    (5.0000005, 7, 6.0),
    (6.0, 7, 6.0),
    (7.0, 7, 6.0),
    (9.0, 7, 6.0),
    (1e30, 7, 6.0),
    (math.inf, 7, 6.0),
]


def _codes(packed: nvfp4.NVFP4Tensor) -> list[int]:
    codes = packed.codes
    return torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten().tolist()


def _scale_bytes(packed: nvfp4.NVFP4Tensor) -> list[int]:
    return packed.block_scale.view(torch.uint8).flatten().tolist()


def _packed(codes: torch.Tensor, block_scale: torch.Tensor, scale=ONE) -> nvfp4.NVFP4Tensor:
    return nvfp4.NVFP4Tensor(codes=codes, block_scale=block_scale, global_scale=scale)


def _golden_row() -> torch.Tensor:
    first = [0.5, -0.25, 0.125, 1, -1.5, 0.75, 0, 2, 0.30078125, -0.6015625, 0.8984375, -1.203125]
    first += [1.6015625, -1.8984375, 0.050048828125, -0.010009765625]
    second = [0.01 * i * (-1) ** i for i in range(16)]
    return torch.tensor([first + second], dtype=torch.bfloat16)


def _hostile_values(dtype: torch.dtype) -> torch.Tensor:
    """[8, 96]: blocks of every magnitude, ties, zero blocks, zeros of both signs, subnormals."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(8, 96, generator=generator)
    x[1] *= torch.exp2(-torch.arange(6.0).repeat_interleave(16) * 3)
    x[2] *= 1e3
    x[3] = (torch.arange(96) % 16 - 8) * 0.25
    x[3, ::16] = 6.0
    x[4, :32] = 0.0
    x[5, ::2] = -0.0
    x[6] *= 1e-39
    x[7, 16:32] *= 1e-12
    return x.to(dtype)


@pytest.mark.parametrize(("magnitude", "code", "value"), ROUNDED, ids=[str(r[0]) for r in ROUNDED])
def test_reference_and_fast_paths_round_by_hand_values(magnitude, code, value):
    assert reference.encode_value(magnitude) == code
    assert reference.encode_value(-magnitude) == (code + 8 if magnitude else 0)
    # The 6 in front makes the block scale 1 unless the value is larger still.
    if magnitude <= 6.0:
        block = torch.tensor([6.0, magnitude, -magnitude] + [0.0] * 13)
        packed = nvfp4.quantize(block, ONE)
        assert _scale_bytes(packed) == [0x38]
        assert _codes(packed)[:3] == [7, code, code + 8 if magnitude else 0]
        assert nvfp4.fake_quantize(block, ONE)[:3].tolist() == [6.0, value, -value]


@pytest.mark.parametrize("magnitude", [6.0, 7.0, 9.0, 1e30, math.inf], ids=str)
def test_beyond_the_largest_block_scale_values_saturate(magnitude):
    global_scale = torch.tensor(1 / 512)  # so the block scale, at most 448, cannot reach
    block = torch.tensor([magnitude, -magnitude] + [0.0] * 14)
    packed = nvfp4.quantize(block, global_scale)
    assert _scale_bytes(packed) == [0x7E]
    assert _codes(packed)[:2] == [7, 15]
    assert nvfp4.fake_quantize(block, global_scale)[:2].tolist() == [5.25, -5.25]


def test_every_code_decodes_by_hand():
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    scale = torch.tensor([[2.0]]).to(torch.float8_e4m3fn)
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = nvfp4.dequantize(_packed(codes, scale, torch.tensor(0.25)))
    assert values.tolist() == [[0.5 * m for m in magnitudes] + [-0.5 * m for m in magnitudes]]
    assert values.signbit().tolist() == [[False] * 8 + [True] * 8]


def test_golden_bytes(assert_same_bits):
    row = _golden_row()
    global_scale = nvfp4.global_scale(row.abs().max())
    assert global_scale.view(torch.int32).item() == 0x3A430C31
    codes, block_scale = reference.quantize(row, global_scale)
    for packed in (nvfp4.quantize(row, global_scale), _packed(codes, block_scale)):
        assert _scale_bytes(packed) == [0x7E, 0x60]
        expected = "A3514E70C2E5F68090B2C3D5E5E6F7F7"
        assert bytes(packed.codes.flatten().tolist()).hex().upper() == expected
    assert_same_bits(
        nvfp4.fake_quantize(row, global_scale), reference.fake_quantize(row, global_scale)
    )


def test_negative_zero_becomes_zero_and_small_negatives_negative_zero(assert_same_bits):
    block = torch.tensor([6.0, -0.0, -0.1, 0.1] + [0.0] * 12)
    assert _codes(nvfp4.quantize(block, ONE))[:4] == [7, 0, 8, 0]
    expected = torch.tensor([6.0, 0.0, -0.0, 0.0] + [0.0] * 12)
    assert_same_bits(nvfp4.fake_quantize(block, ONE), expected)


def test_zero_block_and_zero_tensor():
    x = torch.zeros(2, 32)
    global_scale = nvfp4.global_scale(0.0)
    assert global_scale.item() == 1.0
    packed = nvfp4.quantize(x, global_scale)
    assert packed.codes.eq(0).all() and _scale_bytes(packed) == [0x38] * 4
    assert torch.equal(nvfp4.fake_quantize(x, global_scale), x)


def test_block_scale_is_rounded_to_subnormals_and_never_below_the_smallest():
    def scale_byte(amax: float) -> int:
        block = torch.tensor([amax] + [0.0] * 15)
        return _scale_bytes(nvfp4.quantize(block, ONE))[0]

    smallest = 2.0**-9
    assert scale_byte(6 * smallest) == 0x01
    assert scale_byte(6 * smallest * 1.5) == 0x02  # tie to even
    assert scale_byte(6 * smallest * 2.5) == 0x02  # tie to even
    assert scale_byte(6 * smallest * 0.3) == 0x01  # would round to zero
    assert scale_byte(1e-30) == 0x01
    assert scale_byte(0.0) == 0x38


@pytest.mark.parametrize(
    ("amax", "scale"), [(2688.0, 1.0), (0.0, 1.0), (5.25, 2.0**-9), (1e-40, 2.0**-100)]
)
def test_global_scale(amax, scale):
    for given_amax in (amax, torch.tensor(amax)):
        result = nvfp4.global_scale(given_amax)
        assert (result.item(), result.dtype, result.shape) == (scale, torch.float32, ())
    assert reference.global_scale(amax).item() == scale


@pytest.mark.parametrize("amax", [-1.0, math.nan, math.inf])
def test_global_scale_refuses(amax):
    with pytest.raises(InputError, match=f"amax must be finite and not negative, got {amax}"):
        nvfp4.global_scale(amax)


def test_nan_spoils_its_block_only():
    x = torch.ones(2, 32)
    x[0, 3] = math.nan
    result = nvfp4.fake_quantize(x, torch.tensor(0.01))
    spoiled = result.isnan()
    assert spoiled[0, :16].all() and spoiled.sum() == 16
    x[0, 4] = -1.0
    packed = nvfp4.quantize(x, torch.tensor(0.01))
    assert torch.equal(nvfp4.dequantize(packed).isnan(), spoiled)
    assert packed.codes[0, :8].tolist() == [0x77] * 8
    codes, block_scale = reference.quantize(x, torch.tensor(0.01))
    assert torch.equal(packed.codes, codes)
    assert _scale_bytes(packed) == block_scale.view(torch.uint8).flatten().tolist()


def test_a_quotient_that_float32_makes_zero_loses_its_sign():
    block = torch.tensor([12.0, -(2.0**-149), -(2.0**-148)] + [0.0] * 13)  # the scale is 2
    for codes in (nvfp4.quantize(block, ONE).codes, reference.quantize(block, ONE)[0]):
        assert _codes(_packed(codes, _scales(1)))[1:3] == [0, 8]
    assert nvfp4.fake_quantize(block, ONE)[1:3].signbit().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amax", [0.37, 4.0, 2688.0, 3e-5, 1e6, 0.0], ids=str)
def test_fast_paths_equal_reference(dtype, amax, assert_same_bits):
    x, global_scale = _hostile_values(dtype), nvfp4.global_scale(amax)
    codes, block_scale = reference.quantize(x, global_scale)
    packed = nvfp4.quantize(x, global_scale)
    assert_same_bits(packed.codes, codes)
    assert_same_bits(packed.block_scale, block_scale)
    values = reference.dequantize(codes, block_scale, global_scale, dtype)
    assert_same_bits(nvfp4.dequantize(packed, dtype), values)
    assert_same_bits(nvfp4.fake_quantize(x, global_scale), values)


@pytest.mark.parametrize("magnitude", [1e-37, 1e-31, 1e-20, 1e20, 3e38], ids=str)
def test_tiny_and_huge_values_stay_finite_and_close(magnitude, assert_same_bits):
    x = torch.tensor([1.0, -0.5, 0.0, 0.25] * 8) * magnitude
    global_scale = nvfp4.global_scale(x.abs().max())
    result = nvfp4.fake_quantize(x, global_scale)
    assert_same_bits(result, reference.fake_quantize(x, global_scale))
    assert result.isfinite().all()
    if magnitude >= 2688 * 2.0**-100:
        torch.testing.assert_close(result, x, rtol=0.2, atol=0)


@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 3, 48), (0, 32), (5, 0)], ids=str)
def test_odd_shapes(shape):
    x = torch.full(shape, 1.5)
    packed = nvfp4.quantize(x, ONE)
    assert packed.shape == shape
    assert packed.codes.shape == (*shape[:-1], shape[-1] // 2)
    assert packed.block_scale.shape == (*shape[:-1], shape[-1] // 16)
    assert torch.equal(nvfp4.dequantize(packed), x)
    assert torch.equal(nvfp4.fake_quantize(x, ONE), x)


def test_strided_operands_in_many_pieces(assert_same_bits):
    x = torch.randn(1056, 1040, generator=torch.Generator().manual_seed(1))
    global_scale = nvfp4.global_scale(3.0)
    for operand in (x, x.t(), x.bfloat16(), x.bfloat16().t()):
        stored = nvfp4.dequantize(nvfp4.quantize(operand, global_scale), operand.dtype)
        assert_same_bits(nvfp4.fake_quantize(operand, global_scale), stored)


def test_fake_quantize_leaves_its_operand_and_the_graph_alone():
    x = torch.randn(4, 32, requires_grad=True)
    before = x.detach().clone()
    assert not nvfp4.fake_quantize(x, ONE).requires_grad
    assert torch.equal(x, before)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def _scales(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


def _weight(*shape: int) -> nvfp4.NVFP4Tensor:
    return nvfp4.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(3)))


REFUSED = [
    pytest.param(
        lambda: nvfp4.quantize(torch.ones(2, 24), ONE),
        "the last dimension of x must be a multiple of 16, got 24",
        id="ragged_block",
    ),
    pytest.param(
        lambda: nvfp4.fake_quantize(torch.ones(2, 8), ONE),
        "the last dimension of x must be a multiple of 16, got 8",
        id="half_a_block",
    ),
    pytest.param(
        lambda: nvfp4.fake_quantize(torch.ones(16, dtype=torch.float64), ONE),
        "x must be .* got float64",
        id="float64",
    ),
    pytest.param(
        lambda: nvfp4.fake_quantize(torch.ones(16), torch.tensor(0.0)),
        "global_scale must be finite and at least 2.*got 0.0",
        id="zero_scale",
    ),
    pytest.param(
        lambda: nvfp4.dequantize(_packed(_zeros(2, 8), _scales(2, 2))),
        r"block_scale must have shape \(2, 1\), got \(2, 2\)",
        id="scale_shape",
    ),
    pytest.param(
        lambda: nvfp4.dequantize(_packed(_zeros(2, 8), torch.ones(2, 1))),
        "block_scale must be float8_e4m3fn, got float32",
        id="scale_dtype",
    ),
    pytest.param(
        lambda: nvfp4.dequantize(_packed(torch.ones(2, 8), _scales(2, 1))),
        "codes must be uint8, got float32",
        id="packed_dtype",
    ),
    pytest.param(
        lambda: nvfp4.dequantize(_packed(_zeros(2, 7), _scales(2, 1))),
        "the last dimension of codes must be a multiple of 8, got 7",
        id="packed_shape",
    ),
    pytest.param(
        lambda: nvfp4.dequantize(_packed(_zeros(2, 8), _scales(2, 1), torch.tensor([1.0]))),
        r"global_scale must have shape \(\), got \(1,\)",
        id="global_scale_shape",
    ),
    pytest.param(
        lambda: nvfp4.dequantize(_packed(_zeros(), _scales(1))),
        "codes must have at least one dimension, got a scalar",
        id="scalar_codes",
    ),
    pytest.param(
        lambda: nvfp4.quantize(torch.tensor([1.0, math.nan] * 8)),
        "amax must be finite and not negative, got nan",
        id="nan_without_scale",
    ),
    pytest.param(
        lambda: nvfp4.fake_quantize(torch.tensor([1.0, -math.inf] * 8)),
        "amax must be finite and not negative, got inf",
        id="infinity_without_scale",
    ),
    pytest.param(
        lambda: nvfp4.linear(torch.ones(3, 32), _weight(4, 16)),
        "both operands must have as many columns, got 32 and 16",
        id="columns",
    ),
    pytest.param(
        lambda: nvfp4.linear(torch.ones(3, 16), _weight(4, 16), torch.ones(3)),
        r"bias must have shape \(4,\), got \(3,\)",
        id="bias_shape",
    ),
    pytest.param(
        lambda: nvfp4.linear(torch.ones(3, 16).long(), _weight(4, 16)),
        "x must be float32 or bfloat16 or float16, got int64",
        id="linear_dtype",
    ),
    pytest.param(
        lambda: nvfp4.linear(torch.ones(3, 16), _weight(4, 16), input_scale=torch.tensor(0.0)),
        "input_scale must be finite and at least 2.*got 0.0",
        id="input_scale",
    ),
    pytest.param(
        lambda: nvfp4.linear(torch.ones(3, 16), _weight(4, 16), out_dtype=torch.int8),
        "the result must be float32 or bfloat16 or float16, got int8",
        id="out_dtype",
    ),
    pytest.param(
        lambda: nvfp4.linear(torch.ones(3, 16), _weight(2, 4, 16)),
        r"codes of the right-hand operand must be a matrix, got shape \(2, 4, 8\)",
        id="stacked_weights",
    ),
    pytest.param(
        lambda: nvfp4.linear(torch.ones(3, 16), _weight(4, 16).to("meta")),
        "operands must be on one device, got cpu and meta",
        id="devices",
    ),
    pytest.param(
        lambda: nvfp4.matmul(
            _packed(_zeros(2, 8), _scales(2, 2)), _weight(4, 16), out_dtype=torch.float32
        ),
        r"the left operand's block_scale must have shape \(2, 1\), got \(2, 2\)",
        id="left_operand",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_say_rule_and_value(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_packing_agrees_with_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    global_scale = nvfp4.global_scale(x.abs().max())
    packed = nvfp4.quantize(x, global_scale)
    step = (packed.block_scale.float() * global_scale).repeat_interleave(16, dim=1)
    elements = nvfp4.dequantize(_packed(packed.codes, torch.ones_like(packed.block_scale)))
    assert torch.equal(helpers.pack_fp4_to_uint8(elements), packed.codes)
    unpacked = helpers.unpack_fp4_from_uint8(packed.codes, 8, 64, dtype=torch.float32)
    assert torch.equal(unpacked * step, nvfp4.dequantize(packed))


def _float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


any_finite = st.integers(0, 2**32 - 1).map(_float32).filter(math.isfinite)
near_one = st.floats(-8.0, 8.0, width=32)
blocks = st.lists(st.one_of(any_finite, near_one), min_size=16, max_size=16)
some_scale = st.floats(2.0**-99, 2.0**60, width=32)


@FEW
@given(blocks, some_scale)
def test_any_float32_block_equals_reference(block, scale):
    x, scale = torch.tensor(block), torch.tensor(scale)
    packed = nvfp4.quantize(x, scale)
    expected_codes, expected_scale = reference.quantize(x, scale)
    assert torch.equal(packed.codes, expected_codes)
    assert _scale_bytes(packed) == expected_scale.view(torch.uint8).tolist()
    assert torch.equal(
        nvfp4.fake_quantize(x, scale).view(torch.int32),
        reference.fake_quantize(x, scale).view(torch.int32),
    )


@FEW
@given(st.lists(near_one, min_size=32, max_size=32), st.floats(2.0**-12, 1.0, width=32))
def test_sign_symmetry(values, scale):
    x, scale = torch.tensor(values), torch.tensor(scale)
    assert torch.equal(nvfp4.fake_quantize(-x, scale), -nvfp4.fake_quantize(x, scale))


@FEW
@given(st.binary(min_size=16, max_size=16))
def test_packed_bytes_survive_a_round_trip(data):
    # Every block holds a 6, so that quantising finds the scale 1 again; code 8, -0.0, becomes 0.
    codes = torch.tensor(list(data), dtype=torch.uint8).reshape(2, 8)
    codes[:, 0] = 0x7F
    packed = _packed(codes, _scales(2, 1))
    again = nvfp4.quantize(nvfp4.dequantize(packed), ONE)
    assert _scale_bytes(again) == [0x38, 0x38]
    assert _codes(again) == [0 if code == 8 else code for code in _codes(packed)]


@FEW
@given(st.lists(any_finite, min_size=32, max_size=32))
def test_the_global_scale_left_out_is_that_of_the_largest_magnitude(values):
    x = torch.tensor(values)
    scale = nvfp4.global_scale(x.abs().max())
    packed, expected = nvfp4.quantize(x), nvfp4.quantize(x, scale)
    for name, tensor in expected.tensors().items():
        assert torch.equal(packed.tensors()[name].float(), tensor.float())
    fake = nvfp4.fake_quantize(x)
    assert torch.equal(fake.view(torch.int32), nvfp4.fake_quantize(x, scale).view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_scale", [None, torch.tensor(0.002)], ids=["weight_only", "both"])
def test_linear_is_the_product_of_what_was_quantised(dtype, input_scale, assert_same_bits):
    x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(7)).to(dtype)
    weight, bias = _weight(5, 48), torch.randn(5)
    seen = x if input_scale is None else nvfp4.fake_quantize(x, input_scale)
    expected = functional.linear(seen, nvfp4.dequantize(weight, dtype), bias.to(dtype))
    assert_same_bits(nvfp4.linear(x, weight, bias, input_scale=input_scale), expected)
    result = nvfp4.linear(x, weight, bias, input_scale=input_scale, out_dtype=torch.float32)
    assert_same_bits(result, expected.float())


def test_matmul_is_the_product_of_the_values(assert_same_bits):
    a, b, bias = _weight(2, 3, 48), _weight(5, 48), torch.randn(5).bfloat16()
    expected = functional.linear(nvfp4.dequantize(a), nvfp4.dequantize(b), bias.float())
    assert_same_bits(nvfp4.matmul(a, b, bias, out_dtype=torch.float32), expected)
    assert_same_bits(nvfp4.matmul(a, b, bias, out_dtype=torch.float16), expected.half())


@pytest.mark.parametrize(("rows", "columns"), [(0, 32), (3, 0)], ids=["no_rows", "no_columns"])
def test_products_of_nothing(rows, columns):
    weight, bias = nvfp4.quantize(torch.ones(4, columns)), torch.arange(4.0)
    expected = bias.expand(rows, 4)
    assert torch.equal(nvfp4.linear(torch.ones(rows, columns), weight, bias), expected)


def test_a_packed_tensor_knows_its_size_and_moves():
    packed = _weight(4, 32)
    assert packed.nbytes == 4 * 16 + 4 * 2 + 4
    assert packed.to("meta").shape == (4, 32)
