"""INT4 groups: the reference against hand-computed values, fast paths and packers against it."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoq.errors import InputError
from autoq.kernels import fp8, int4
from autoq.kernels._reference import int4 as reference

FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

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


@pytest.mark.parametrize("implementation", [int4, reference], ids=["fast", "reference"])
def test_golden_codes_and_bytes(implementation):
    weight = torch.tensor(GOLDEN_ROWS)
    scale = implementation.group_scale(weight, 8, storage_dtype=torch.float32)
    torch.testing.assert_close(scale, torch.full((2, 1), 0.1))
    codes = implementation.quantize(weight, scale)
    assert codes.tolist() == GOLDEN_CODES
    assert bytes(implementation.pack_rows(codes).flatten().tolist()).hex() == "0719e430cf52a27a"
    words = implementation.pack_columns(codes).flatten().tolist()
    assert [word & 0xFFFFFFFF for word in words] == [0x2AA78C1F, 0xF2D4B698]


@pytest.mark.parametrize("implementation", [int4, reference], ids=["fast", "reference"])
def test_ties_go_to_even_and_codes_saturate(implementation):
    quotients = [0.5, 1.5, -0.5, -1.5, 6.5, -7.5, 7.5, 100.0, -100.0, 0.0, -0.0, -0.2]
    codes = implementation.quantize(torch.tensor([quotients]), torch.tensor([[1.0]]))
    assert codes.tolist() == [[0, 2, 0, -2, 6, -8, 7, 7, -8, 0, 0, 0]]


@pytest.mark.parametrize("implementation", [int4, reference], ids=["fast", "reference"])
def test_group_scale_is_rounded_to_the_dtype_it_is_stored_in(implementation):
    weight = torch.tensor([[0.3, -1.0], [0.0, 0.0], [7e-8, 0.0], [7e5, 0.0]])

    def scales(dtype: torch.dtype) -> list[float]:
        return implementation.group_scale(weight, 2, storage_dtype=dtype).flatten().tolist()

    exact, empty = (torch.tensor(1.0) / torch.tensor(7.0)).item(), 2.0**-24
    assert scales(torch.float32)[:2] == [exact, empty]
    assert scales(torch.bfloat16)[:2] == [0.142578125, empty]
    assert scales(torch.float16) == [0.142822265625, empty, empty, 65504.0]


@pytest.mark.parametrize("implementation", [int4, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("amax", [1.0, 1e-3, 1e-6, 1e-12, 1e-30])
def test_an_empty_group_stays_zero_beside_tiny_weights(implementation, amax):
    """The engine's float16 rate of an empty group once overflowed, and made NaN of its zeros."""
    weight = torch.tensor([[0.0, 0.0, amax, -amax]])
    scale = implementation.group_scale(weight, 2, storage_dtype=torch.bfloat16)
    codes = implementation.quantize(weight, scale)
    values = implementation.dequantize_two_level(codes, scale, fp8.tensor_scale(torch.tensor(amax)))
    assert values[0, :2].tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize("implementation", [int4, reference], ids=["fast", "reference"])
def test_second_level_by_hand(implementation):
    # 7 * 16 / 1.75 = 64 is representable, 5 * 9.14 = 45.7 rounds to 44 or 48.
    codes, scale = _codes([[7, 5, -8, 0, 1]]), torch.tensor([[16.0]])
    values = implementation.dequantize_two_level(codes, scale, torch.tensor(1.75))
    rate = 9.140625  # fp16(16 / 1.75)
    assert [7 * rate, 5 * rate, -8 * rate] == [63.984375, 45.703125, -73.125]
    assert values.tolist() == [[64 * 1.75, 44 * 1.75, -72 * 1.75, 0.0, 9 * 1.75]]
    assert not values.signbit()[0, 3]


@pytest.mark.parametrize("implementation", [int4, reference], ids=["fast", "reference"])
def test_second_level_rounds_the_rate_to_float16_twice(implementation):
    def value(scale: float, tensor_scale: float) -> float:
        divisor = torch.tensor(tensor_scale)
        operands = _codes([[1]]), torch.tensor([[scale]]), divisor
        return (implementation.dequantize_two_level(*operands) / divisor).item()

    # The group scale: 2**-25 is half of the smallest float16, a tie that goes to zero.
    assert value(2.0**-25, 2.0**-25) == 0.0
    assert value(2.0**-24, 2.0**-24) == 1.0
    # The quotient: 136 is the tie between 128 and 144 in E4M3; what lies above it by less than
    # half a float16 step goes to the even neighbour all the same.
    assert value(1.0, 1 / 136.05) == 128.0
    assert value(1.0, 1 / 136.10) == 144.0


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fast_paths_equal_reference(weight_dtype, storage_dtype, assert_same_bits):
    weight = _hostile_weight(weight_dtype)
    scale = reference.group_scale(weight, 128, storage_dtype)
    assert_same_bits(int4.group_scale(weight, storage_dtype=storage_dtype), scale)
    codes = reference.quantize(weight, scale)
    assert_same_bits(int4.quantize(weight, scale), codes)
    values = reference.dequantize(codes, scale, weight_dtype)
    assert_same_bits(int4.dequantize(codes, scale, weight_dtype), values)
    assert_same_bits(int4.fake_quantize(weight, scale), values)
    tensor_scale = fp8.tensor_scale(values.abs().max())
    two_level = reference.dequantize_two_level(codes, scale, tensor_scale, weight_dtype)
    actual = int4.dequantize_two_level(codes, scale, tensor_scale, weight_dtype)
    assert_same_bits(actual, two_level)
    assert_same_bits(int4.fake_quantize_two_level(weight, scale, tensor_scale), two_level)


def test_strided_operands_in_many_pieces(assert_same_bits):
    weight = torch.randn(1024, 1152, generator=torch.Generator().manual_seed(1))
    tensor_scale = torch.tensor(0.01)
    for operand in (weight, weight.t(), weight.bfloat16().t()):
        scale = int4.group_scale(operand, storage_dtype=torch.bfloat16)
        codes = int4.quantize(operand, scale)
        stored = int4.dequantize(codes, scale, operand.dtype)
        assert_same_bits(int4.fake_quantize(operand, scale), stored)
        two_level = int4.dequantize_two_level(codes, scale, tensor_scale, operand.dtype)
        actual = int4.fake_quantize_two_level(operand, scale, tensor_scale)
        assert_same_bits(actual, two_level)


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
        codes = int4.quantize(weight, int4.group_scale(weight, storage_dtype=dtype))
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
    scale = int4.group_scale(weight, storage_dtype=torch.float32)
    codes = int4.quantize(weight, scale)
    args = arguments.QuantizationArgs(num_bits=4, strategy="group", group_size=128)
    theirs = lifecycle.dequantize(codes, scale, args=args)
    assert torch.equal(int4.dequantize(codes, scale), theirs)


@pytest.mark.parametrize(("rows", "columns"), [(2, 1), (2, 7), (6, 8), (0, 8), (4, 0)])
def test_row_packing_round_trips(rows, columns):
    codes = torch.randint(-8, 8, (rows, columns)).to(torch.int8)
    packed = int4.pack_rows(codes)
    assert packed.shape == (rows // 2, columns)
    assert torch.equal(packed, reference.pack_rows(codes))
    assert torch.equal(int4.unpack_rows(packed), codes)


@FEW
@given(st.lists(st.integers(-8, 7), min_size=16, max_size=16), st.sampled_from([(2, 8), (1, 16)]))
def test_column_packing_round_trips(values, shape):
    codes = torch.tensor(values, dtype=torch.int8).reshape(shape)
    packed = int4.pack_columns(codes)
    assert torch.equal(packed, reference.pack_columns(codes))
    assert torch.equal(int4.unpack_columns(packed), codes)


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
@given(weights, st.floats(1.0, 2.0**20, width=32))
def test_any_weight_equals_reference(values, headroom):
    weight = torch.tensor(values).reshape(2, 8)
    tensor_scale = fp8.tensor_scale(weight.abs().max()) * headroom
    scale = int4.group_scale(weight, 4, storage_dtype=torch.float16)
    codes = reference.quantize(weight, scale)
    assert torch.equal(int4.quantize(weight, scale), codes)
    expected = reference.dequantize_two_level(codes, scale, tensor_scale)
    actual = int4.fake_quantize_two_level(weight, scale, tensor_scale)
    assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))


REFUSED = [
    pytest.param(
        lambda: int4.group_scale(torch.ones(2, 130), storage_dtype=torch.float32),
        "in_features must be a multiple of 128, got 130",
        id="ragged_group",
    ),
    pytest.param(
        lambda: int4.group_scale(torch.ones(2, 128), storage_dtype=torch.int8),
        "the stored scale must be .* got int8",
        id="storage_dtype",
    ),
    pytest.param(
        lambda: int4.group_scale(torch.ones(128), storage_dtype=torch.float32),
        r"weight must be a matrix, got shape \(128,\)",
        id="vector",
    ),
    pytest.param(
        lambda: int4.quantize(torch.ones(2, 8), torch.ones(3, 1)),
        r"group_scale must be \[2, a divisor of 8\], got shape \(3, 1\)",
        id="rows",
    ),
    pytest.param(
        lambda: int4.quantize(torch.ones(2, 8), torch.ones(2, 3)),
        r"group_scale must be \[2, a divisor of 8\], got shape \(2, 3\)",
        id="groups",
    ),
    pytest.param(
        lambda: int4.quantize(torch.ones(2, 8), torch.ones(2, 1).bfloat16()),
        "group_scale must be float32, got bfloat16",
        id="scale_dtype",
    ),
    pytest.param(
        lambda: int4.dequantize(torch.ones(2, 8), torch.ones(2, 1)),
        "codes must be int8, got float32",
        id="codes_dtype",
    ),
    pytest.param(
        lambda: int4.fake_quantize_two_level(torch.ones(2, 8), torch.ones(2, 1), torch.zeros(())),
        "tensor_scale must be finite and at least 2.* got 0.0",
        id="tensor_scale",
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
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_say_rule_and_value(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_nan_is_not_hidden():
    weight = torch.ones(1, 8)
    weight[0, 2] = math.nan
    scale = int4.group_scale(weight, 8, storage_dtype=torch.float32)
    assert scale.isnan().all()
    assert int4.fake_quantize(weight, scale).isnan().all()
