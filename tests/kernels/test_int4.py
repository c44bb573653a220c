"""INT4 groups: the reference against hand-computed values, fast paths and packers against it."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from autoq.errors import InputError
from autoq.kernels import int4
from autoq.kernels._reference import int4 as reference

FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ALL_CODES = list(range(-8, 8))

GOLDEN_ROWS = [
    [0.7, -0.7, 0.35, 0.05, -0.1, 0.15, 0.25, -0.65],
    [0.0, 0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7],
]
GOLDEN_CODES = [[7, -7, 4, 0, -1, 2, 2, -6], [0, 1, -2, 3, -4, 5, -6, 7]]


def _codes(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int8)


def _hostile_weight(dtype: torch.dtype) -> torch.Tensor:
    """[6, 256]: groups of every magnitude, ties, zero groups, zeros of both signs."""
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(7))
    weight[1] *= 1e-4
    weight[2] *= 1e3
    weight[3] = (torch.arange(256) % 29 - 14) * 0.5
    weight[3, ::128] = 7.0
    weight[4, :128] = 0.0
    weight[5, ::2] = -0.0
    return weight.to(dtype)


def _fast_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return int4.unpack(int4.quantize(weight, scale))


both_codes = pytest.mark.parametrize("codes", [_fast_codes, reference.codes])


@pytest.mark.parametrize("group_scale", [int4.group_scale, reference.group_scale])
def test_group_scale_is_rounded_to_the_dtype_it_is_stored_in(group_scale):
    weight = torch.tensor([[0.3, -1.0], [0.0, 0.0], [7e-8, 0.0], [7e5, 0.0]])

    def scales(dtype: torch.dtype) -> list[float]:
        return group_scale(weight, 2, storage_dtype=dtype).flatten().tolist()

    exact, empty = (torch.tensor(1.0) / torch.tensor(7.0)).item(), 2.0**-24
    assert scales(torch.float32)[:2] == [exact, empty]
    assert scales(torch.bfloat16)[:2] == [0.142578125, empty]
    assert scales(torch.float16) == [0.142822265625, empty, empty, 65504.0]


@both_codes
def test_golden_codes(codes):
    weight = torch.tensor(GOLDEN_ROWS)
    scale = int4.group_scale(weight, 8)
    torch.testing.assert_close(scale, torch.full((2, 1), 0.1))
    assert codes(weight, scale).tolist() == GOLDEN_CODES


@both_codes
def test_ties_go_to_even_and_codes_saturate(codes):
    quotients = [0.5, 1.5, -0.5, -1.5, 6.5, -7.5, 7.5, 100.0, -100.0, 0.0, -0.0, -0.2]
    expected = [0, 2, 0, -2, 6, -8, 7, 7, -8, 0, 0, 0]
    assert codes(torch.tensor([quotients]), torch.tensor([[1.0]])).tolist() == [expected]


@pytest.mark.parametrize(
    "pack", [lambda codes: int4.pack(codes, torch.ones(2, 1)).codes, lambda c: reference.pack(c, 8)]
)
def test_halves_packing_by_hand(pack):
    """Columns j and j + 4 of a group of 8 share byte j, the first in the low nibble."""
    packed = pack(_codes(GOLDEN_CODES))
    assert packed.tolist() == [[0xF7, 0x29, 0x24, 0xA0], [0xC0, 0x51, 0xAE, 0x73]]


def test_halves_are_those_of_each_group():
    codes = _codes([[1, 2, 3, 4, -1, -2, -3, -4]])
    packed = int4.pack(codes, torch.ones(1, 2))
    assert packed.codes.tolist() == [[0x31, 0x42, 0xDF, 0xCE]]
    assert (packed.shape, packed.group_size, packed.nbytes) == ((1, 8), 4, 12)


def test_every_code_is_a_multiple_of_its_scale():
    codes = _codes([ALL_CODES, ALL_CODES[::-1]])
    packed = int4.pack(codes, torch.tensor([[2.0, 0.5], [3.0, 1.0]]))
    expected = [[2.0 * c for c in range(-8, 0)] + [0.5 * c for c in range(8)]]
    expected += [[3.0 * c for c in range(7, -1, -1)] + [1.0 * c for c in range(-1, -9, -1)]]
    assert int4.dequantize(packed).tolist() == expected
    assert reference.values(codes, packed.group_scale).tolist() == expected


@pytest.mark.parametrize("implementation", [int4, reference], ids=["fast", "reference"])
def test_container_packings_by_hand(implementation):
    golden = _codes(GOLDEN_CODES)
    rows = implementation.pack_rows(golden)
    assert bytes(rows.flatten().tolist()).hex() == "0719e430cf52a27a"
    assert _unsigned(implementation.pack_columns(golden)) == [[0x2AA78C1F], [0xF2D4B698]]
    assert _unsigned(implementation.pack_gptq(golden)) == [[0x2AA78C1F, 0xF2D4B698]]
    # One column of eight output features -4..3, that is 4..11 with the offset: even ones first.
    column = torch.arange(-4, 4, dtype=torch.int8)[:, None]
    assert _unsigned(implementation.pack_awq(column)) == [[0xB975A864]]


def _unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in words.tolist()]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [2, 32, 128, 256])
def test_fast_paths_equal_reference(weight_dtype, storage_dtype, group_size, assert_same_bits):
    weight = _hostile_weight(weight_dtype)
    scale = reference.group_scale(weight, group_size, storage_dtype)
    assert_same_bits(int4.group_scale(weight, group_size, storage_dtype=storage_dtype), scale)
    codes = reference.codes(weight, scale)
    packed = int4.quantize(weight, scale)
    assert_same_bits(packed.codes, reference.pack(codes, group_size))
    assert_same_bits(int4.pack(codes, scale).codes, packed.codes)
    assert_same_bits(int4.unpack(packed), codes)
    values = reference.values(codes, scale, weight_dtype)
    assert_same_bits(int4.dequantize(packed, weight_dtype), values)
    assert_same_bits(int4.fake_quantize(weight, scale), values)


def test_scales_that_are_left_out_are_computed(assert_same_bits):
    weight = _hostile_weight(torch.bfloat16)
    scale = int4.group_scale(weight, 64, storage_dtype=torch.float16)
    packed = int4.quantize(weight, group_size=64, storage_dtype=torch.float16)
    assert_same_bits(packed.group_scale, scale)
    assert_same_bits(packed.codes, int4.quantize(weight, scale).codes)
    fake = int4.fake_quantize(weight, group_size=64, storage_dtype=torch.float16)
    assert_same_bits(fake, int4.fake_quantize(weight, scale))
    assert int4.quantize(weight).group_size == int4.GROUP_SIZE


def test_strided_operands_in_many_pieces(assert_same_bits):
    weight = torch.randn(1024, 1152, generator=torch.Generator().manual_seed(1))
    for operand in (weight, weight.t(), weight.bfloat16().t()):
        scale = int4.group_scale(operand, storage_dtype=torch.bfloat16)
        stored = int4.dequantize(int4.quantize(operand, scale), operand.dtype)
        assert_same_bits(int4.fake_quantize(operand, scale), stored)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("rows", [(), (3,), (2, 5), (0,)], ids=str)
def test_linear_is_the_product_with_the_dequantised_weight(x_dtype, bias, rows, assert_same_bits):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*rows, 256, generator=generator).to(x_dtype)
    packed = int4.quantize(torch.randn(24, 256, generator=generator))
    offset = torch.randn(24, generator=generator) if bias else None
    expected = functional.linear(
        x, int4.dequantize(packed, x_dtype), offset if offset is None else offset.to(x_dtype)
    )
    assert_same_bits(int4.linear(x, packed, offset), expected)
    wide = int4.linear(x, packed, offset, out_dtype=torch.float32)
    assert_same_bits(wide, expected.float())


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e30, 1e37], ids=str)
def test_tiny_and_huge_weights_stay_finite(magnitude, assert_same_bits):
    weight = torch.tensor([[1.0, -0.5, 0.0, 0.25] * 2]) * magnitude
    for storage_dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale = int4.group_scale(weight, 8, storage_dtype=storage_dtype)
        assert_same_bits(scale, reference.group_scale(weight, 8, storage_dtype))
        assert scale.isfinite().all() and (scale > 0).all()
        assert int4.fake_quantize(weight, scale).isfinite().all()


def test_the_code_minus_eight_does_not_occur():
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codes = int4.unpack(int4.quantize(weight, storage_dtype=dtype))
        assert codes.min() == -7 and codes.max() == 7


def test_packing_agrees_with_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-8, 8, (6, 40), generator=torch.Generator().manual_seed(2))
    codes = codes.to(torch.int8)
    packed = int4.pack_columns(codes)
    assert torch.equal(packed, helpers.pack_to_int32(codes, 4))
    assert torch.equal(helpers.unpack_from_int32(packed, 4, codes.shape), codes)


def test_dequantized_values_agree_with_compressed_tensors():
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    arguments = pytest.importorskip("compressed_tensors.quantization")
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(6))
    scale = int4.group_scale(weight)
    packed = int4.quantize(weight, scale)
    args = arguments.QuantizationArgs(num_bits=4, strategy="group", group_size=128)
    theirs = lifecycle.dequantize(int4.unpack(packed), scale, args=args)
    assert torch.equal(int4.dequantize(packed), theirs)


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (2, 7), (6, 8), (0, 8), (4, 0)])
def test_row_packing_round_trips(rows, columns):
    codes = torch.randint(-8, 8, (rows, columns)).to(torch.int8)
    packed = int4.pack_rows(codes)
    assert packed.shape == (rows // 2, columns)
    assert torch.equal(packed, reference.pack_rows(codes))
    assert torch.equal(int4.unpack_rows(packed), codes)


PACKINGS = {
    "columns": (int4.pack_columns, reference.pack_columns, int4.unpack_columns),
    "gptq": (int4.pack_gptq, reference.pack_gptq, int4.unpack_gptq),
    "awq": (int4.pack_awq, reference.pack_awq, int4.unpack_awq),
}


@pytest.mark.parametrize("name", PACKINGS)
@FEW
@given(
    st.lists(st.integers(-8, 7), min_size=128, max_size=128),
    st.sampled_from([(8, 16), (16, 8)]),
)
def test_word_packings_round_trip(name, values, shape):
    pack, reference_pack, unpack = PACKINGS[name]
    codes = torch.tensor(values, dtype=torch.int8).reshape(shape)
    packed = pack(codes)
    assert packed.is_contiguous() and packed.dtype == torch.int32
    assert torch.equal(packed, reference_pack(codes))
    assert torch.equal(unpack(packed), codes)


weights = st.lists(st.floats(-1e4, 1e4, width=32), min_size=16, max_size=16)


@FEW
@given(weights)
def test_sign_symmetry_and_idempotence(values):
    weight = torch.tensor(values).reshape(2, 8)
    scale = int4.group_scale(weight, 4, storage_dtype=torch.bfloat16)
    assert torch.equal(int4.group_scale(-weight, 4, storage_dtype=torch.bfloat16), scale)
    once = int4.fake_quantize(weight, scale)
    assert torch.equal(int4.fake_quantize(-weight, scale), -once)
    assert torch.equal(int4.fake_quantize(once, scale), once)


@FEW
@given(weights, st.floats(1.0, 1e4, width=32))
def test_scales_grow_with_the_weight(values, factor):
    weight = torch.tensor(values).reshape(2, 8)
    scale = int4.group_scale(weight, 4, storage_dtype=torch.bfloat16)
    larger = int4.group_scale(weight * factor, 4, storage_dtype=torch.bfloat16)
    assert bool((larger >= scale).all())


@FEW
@given(weights)
def test_any_weight_equals_reference(values):
    weight = torch.tensor(values).reshape(2, 8)
    scale = int4.group_scale(weight, 4, storage_dtype=torch.float16)
    assert torch.equal(_fast_codes(weight, scale), reference.codes(weight, scale))


def _packed(codes: torch.Tensor, scale: torch.Tensor) -> int4.INT4Tensor:
    return int4.INT4Tensor(codes=codes, group_scale=scale)


BYTES = torch.zeros(2, 4, dtype=torch.uint8)

REFUSED = [
    pytest.param(
        lambda: int4.group_scale(torch.ones(2, 130)),
        "in_features must be a multiple of 128, got 130",
        id="ragged_group",
    ),
    pytest.param(
        lambda: int4.group_scale(torch.ones(2, 9), 3),
        "group_size must be even and at least 2, got 3",
        id="odd_group",
    ),
    pytest.param(
        lambda: int4.group_scale(torch.ones(2, 128), storage_dtype=torch.int8),
        "the stored scale must be .* got int8",
        id="storage_dtype",
    ),
    pytest.param(
        lambda: int4.group_scale(torch.ones(128)),
        r"weight must be a matrix, got shape \(128,\)",
        id="vector",
    ),
    pytest.param(
        lambda: int4.quantize(torch.ones(2, 8), torch.ones(3, 1)),
        r"group_scale must be \[2, a divisor of 8 / 2\], got shape \(3, 1\)",
        id="rows",
    ),
    pytest.param(
        lambda: int4.quantize(torch.ones(2, 8), torch.ones(2, 8)),
        r"group_scale must be \[2, a divisor of 8 / 2\], got shape \(2, 8\)",
        id="groups_of_one",
    ),
    pytest.param(
        lambda: int4.quantize(torch.ones(2, 8), torch.ones(2, 1).bfloat16()),
        "group_scale must be float32, got bfloat16",
        id="scale_dtype",
    ),
    pytest.param(
        lambda: int4.quantize(torch.ones(2, 8), torch.ones(2, 1, device="meta")),
        "operands must be on one device, got cpu and meta",
        id="device",
    ),
    pytest.param(
        lambda: int4.dequantize(_packed(BYTES.char(), torch.ones(2, 1))),
        "codes must be uint8, got int8",
        id="codes_dtype",
    ),
    pytest.param(
        lambda: int4.unpack(_packed(BYTES, torch.ones(2, 3))),
        r"group_scale must be \[2, a divisor of 4\] for \(2, 4\) bytes .* got shape \(2, 3\)",
        id="packed_groups",
    ),
    pytest.param(
        lambda: int4.dequantize(_packed(BYTES, torch.ones(2, 1)), torch.int8),
        "the result must be .* got int8",
        id="result_dtype",
    ),
    pytest.param(
        lambda: int4.linear(torch.ones(3, 4), _packed(BYTES, torch.ones(2, 1))),
        r"x must have the weight's 8 columns, got shape \(3, 4\)",
        id="columns_of_x",
    ),
    pytest.param(
        lambda: int4.linear(torch.ones(3, 8), _packed(BYTES, torch.ones(2, 1)), torch.ones(3)),
        r"bias must have shape \(2,\), got \(3,\)",
        id="bias",
    ),
    pytest.param(
        lambda: int4.pack(_codes([[1, 2]]), torch.ones(1, 2)),
        r"group_scale must be \[1, a divisor of 2 / 2\], got shape \(1, 2\)",
        id="pack_groups",
    ),
    pytest.param(
        lambda: int4.pack(_codes([[8, 0]]), torch.ones(1, 1)),
        r"codes must lie in -8..7, got 0..8",
        id="pack_range",
    ),
    pytest.param(
        lambda: int4.pack_rows(_codes([[1], [2], [3]])),
        "out_features must be a multiple of 2, got 3",
        id="odd_rows",
    ),
    pytest.param(
        lambda: int4.pack_columns(_codes([[1] * 9])),
        "in_features must be a multiple of 8, got 9",
        id="columns",
    ),
    pytest.param(
        lambda: int4.pack_gptq(_codes([[1] * 9])),
        "in_features must be a multiple of 8, got 9",
        id="gptq_columns",
    ),
    pytest.param(
        lambda: int4.pack_awq(_codes([[1]] * 9)),
        "out_features must be a multiple of 8, got 9",
        id="awq_rows",
    ),
    pytest.param(
        lambda: int4.pack_rows(_codes([[8], [0]])), r"codes must lie in -8..7, got 0..8", id="range"
    ),
    pytest.param(
        lambda: int4.pack_columns(_codes([[-9] + [0] * 7])),
        r"codes must lie in -8..7, got -9..0",
        id="range_below",
    ),
    pytest.param(
        lambda: int4.unpack_rows(_codes([[1]])), "packed must be uint8, got int8", id="unpack_rows"
    ),
    pytest.param(
        lambda: int4.unpack_columns(_codes([[1]])), "packed must be int32", id="unpack_columns"
    ),
    pytest.param(lambda: int4.unpack_gptq(_codes([[1]])), "packed must be int32", id="unpack_gptq"),
    pytest.param(lambda: int4.unpack_awq(_codes([[1]])), "packed must be int32", id="unpack_awq"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_say_rule_and_value(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_nan_is_not_hidden():
    weight = torch.ones(1, 8)
    weight[0, 2] = math.nan
    scale = int4.group_scale(weight, 8)
    assert scale.isnan().all()
    assert int4.fake_quantize(weight, scale).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_codes_are_those_of_the_packed_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(70, 256, generator=generator).to(dtype)
    scale = int4.group_scale(weight, 128, storage_dtype=torch.bfloat16)

    plain = int4.quantize_plain(weight, scale)

    assert torch.equal(plain, int4.unpack(int4.quantize(weight, scale)))
    quotient = weight.double() / scale.double().repeat_interleave(128, dim=1)
    assert float((plain.double() - quotient.clamp(-8, 7)).abs().max()) <= 0.5 + 1e-6
    with pytest.raises(InputError, match="group_scale"):
        int4.quantize_plain(weight, scale[1:])
