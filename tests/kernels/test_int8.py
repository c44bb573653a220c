"""INT8: the reference against hand-computed values, the fast path against the reference."""

import math
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from autoq.errors import InputError
from autoq.kernels import int8
from autoq.kernels._reference import int8 as reference
from autoq.kernels.int8 import INT8Tensor

FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# value -> code under scale 1, worked out by hand: ties go to the even code, above 127 saturates.
ENCODED = [
    (0.0, 0),
    (-0.0, 0),
    (0.5, 0),
    (0.50000006, 1),
    (-0.5, 0),
    (-0.50000006, -1),
    (1.5, 2),
    (2.5, 2),
    (-3.5, -4),
    (125.5, 126),
    (126.5, 126),
    (126.50001, 127),
    (127.0, 127),
    (127.5, 127),
    (128.0, 127),
    (-128.0, -127),
    (3.4e38, 127),
    (math.inf, 127),
    (-math.inf, -127),
    (2.0**-149, 0),
]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _hostile_values(dtype: torch.dtype) -> torch.Tensor:
    """[8, 96]: every scale of magnitude, ties, zeros of both signs."""
    x = _random(8, 96, seed=3)
    x[1] *= 1e-3
    x[2] *= 1e3
    x[3] = torch.arange(96) / 2 - 24
    x[3, 0] = 127.0
    x[4] = -torch.arange(96) * 0.0625 - 1
    x[5] = 0.0
    x[6, ::2] = -0.0
    x[7] *= torch.exp2(torch.arange(96) / 4 - 16)
    return x.to(dtype)


def _codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)


def _scales(rows: int, seed: int = 0) -> torch.Tensor:
    return _random(rows, 1, seed=seed).abs() + 0.01


@pytest.mark.parametrize(("value", "code"), ENCODED, ids=[str(value) for value, _ in ENCODED])
def test_reference_and_fast_path_encode_by_hand_values(value, code):
    one = torch.ones(1)
    assert reference.encode_value(value) == code
    assert int8.quantize(torch.tensor([value]), one).codes.item() == code
    fake = int8.fake_quantize(torch.tensor([value]), one).item()
    assert (fake, math.copysign(1, fake)) == (code, -1 if code < 0 else 1)


def test_every_code_decodes_and_encodes_back():
    codes = torch.arange(-127, 128).to(torch.int8)
    packed = INT8Tensor(codes, torch.tensor([0.25]))
    values = int8.dequantize(packed)
    assert values.tolist() == [code / 4 for code in range(-127, 128)]
    assert torch.equal(int8.quantize(values).codes, codes)
    assert torch.equal(int8.quantize(values).scale, packed.scale)


def test_every_midpoint_between_codes_goes_to_the_even_one():
    midpoints = torch.arange(-127, 127) + 0.5
    codes = int8.quantize(midpoints, torch.ones(1)).codes
    assert (codes % 2 == 0).all()
    assert ((codes - midpoints).abs() == 0.5).all()


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(127.0, 1.0), (0.0, 1.0), (254.0, 2.0), (1e-45, 2.0**-100), (127 * 2.0**-100, 2.0**-100)],
)
def test_scale_of_a_row(amax, scale):
    assert reference.row_scale(amax).item() == scale
    assert int8.quantize(torch.tensor([[0.0, -amax]])).scale.tolist() == [[scale]]


def test_scale_divides_in_float32():
    # A double division rounded to float32 gives the neighbour for some of these.
    amax = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(int8.quantize(amax).scale, amax / torch.tensor(127.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fast_path_equals_reference(dtype, assert_same_bits):
    x = _hostile_values(dtype)
    for scale in (None, torch.logspace(-3, 3, 8)[:, None]):
        codes, scales = reference.quantize(x, scale)
        packed = int8.quantize(x, scale)
        assert_same_bits(packed.codes.view(torch.uint8), codes.view(torch.uint8))
        assert_same_bits(packed.scale, scales)
        values = reference.dequantize(codes, scales, dtype)
        assert_same_bits(int8.dequantize(packed, dtype), values)
        assert_same_bits(int8.fake_quantize(x, scale), values)
        assert_same_bits(values, reference.fake_quantize(x, scale))


@pytest.mark.parametrize("magnitude", [1e-37, 1e-29, 1e30, 3e38], ids=str)
def test_tiny_and_huge_values_stay_finite_and_close(magnitude, assert_same_bits):
    x = torch.tensor([[1.0, -0.5, 0.0, 0.25]]) * magnitude
    result = int8.fake_quantize(x)
    assert_same_bits(result, reference.fake_quantize(x))
    assert result.isfinite().all()
    if magnitude >= 127 * 2.0**-100:
        torch.testing.assert_close(result, x, rtol=0, atol=magnitude / 253.9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_row_that_is_not_finite_has_a_scale_that_says_so(value):
    x = torch.tensor([[1.0, value, 2.0], [1.0, 2.0, 3.0]])
    packed = int8.quantize(x)
    assert packed.codes[0].tolist() == [0, 0, 0]
    assert packed.scale.isfinite().tolist() == [[False], [True]]
    assert int8.fake_quantize(x)[0].isnan().all() and int8.dequantize(packed)[0].isnan().all()
    assert torch.equal(int8.fake_quantize(x)[1:], int8.fake_quantize(x[1:]))


def test_given_scales_saturate_infinity_and_keep_nan():
    x = torch.tensor([[1.0, math.inf, -math.inf], [1.0, math.nan, math.inf]])
    scale = torch.ones(2, 1)
    packed = int8.quantize(x, scale)
    assert packed.codes.tolist() == [[1, 127, -127], [0, 0, 0]]
    assert packed.scale.isnan().tolist() == [[False], [True]]
    assert int8.fake_quantize(x, scale).isnan().tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 5), (0, 7), (4, 0), (1, 1, 1)], ids=str)
def test_odd_shapes(shape):
    x = torch.ones(shape)
    packed = int8.quantize(x)
    assert packed.scale.shape == (*shape[:-1], 1)
    assert torch.equal(int8.dequantize(packed), int8.fake_quantize(x))
    torch.testing.assert_close(int8.fake_quantize(x), x, rtol=2**-23, atol=0)


def test_strided_operands_in_many_pieces(assert_same_bits):
    x = _random(130, 4099, seed=1)
    naive = int8.dequantize(int8.quantize(x))
    assert_same_bits(int8.fake_quantize(x), naive)
    assert_same_bits(int8.fake_quantize(x.t()), int8.dequantize(int8.quantize(x.t().contiguous())))
    half = x.bfloat16()[:, ::3]
    assert_same_bits(int8.fake_quantize(half), int8.fake_quantize(half.contiguous()))
    scale = _scales(130)
    assert_same_bits(int8.fake_quantize(x, scale), int8.dequantize(int8.quantize(x, scale)))


def test_operands_and_the_graph_are_left_alone():
    x = torch.randn(4, 8, requires_grad=True)
    before = x.detach().clone()
    packed = int8.quantize(x)
    assert not any(tensor.requires_grad for tensor in packed.tensors().values())
    assert not int8.fake_quantize(x).requires_grad
    assert not int8.linear(x, packed, torch.ones(4, requires_grad=True)).requires_grad
    assert torch.equal(x, before)


def test_reference_product_by_hand():
    a, b = torch.tensor([[1, -2, 3]], dtype=torch.int8), torch.tensor([[4, 5, 6]] * 2).char()
    a_scale, b_scale = torch.tensor([[0.5]]), torch.tensor([[2.0], [0.25]])
    out = reference.matmul(a, a_scale, b, b_scale, torch.tensor([1.0, 0.0]), torch.float32)
    assert out.tolist() == [[13.0, 1.5]]  # 4 - 10 + 18 = 12


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 9, 130)], ids=str)
def test_product_has_the_bits_of_the_reference(shape, bias, out_dtype, assert_same_bits):
    m, n, k = shape
    a, b = INT8Tensor(_codes(m, k), _scales(m)), INT8Tensor(_codes(n, k, seed=1), _scales(n, 1))
    offset = _random(n) if bias else None
    expected = reference.matmul(a.codes, a.scale, b.codes, b.scale, offset, out_dtype)
    assert_same_bits(int8.matmul(a, b, offset, out_dtype=out_dtype), expected)


@pytest.mark.parametrize("code", [127, -127, -128])
def test_the_longest_rows_of_the_largest_codes_sum_exactly(code):
    row = INT8Tensor(torch.full((1, int8.LARGEST_K), code, dtype=torch.int8), torch.ones(1, 1))
    total = int8.LARGEST_K * code**2
    assert int8.LARGEST_K == 131_071 and total < 2**31
    result = int8.matmul(row, row, out_dtype=torch.float32)
    assert result.item() == torch.tensor(total).float().item()


def test_leading_dimensions_are_rows(assert_same_bits):
    x, weight = _random(2, 3, 5, 24), int8.quantize(_random(7, 24, seed=1))
    packed, flat = int8.quantize(x), int8.quantize(x.view(30, 24))
    product = int8.matmul(packed, weight, out_dtype=torch.float32)
    assert product.shape == (2, 3, 5, 7)
    assert_same_bits(product.view(30, 7), int8.matmul(flat, weight, out_dtype=torch.float32))
    assert_same_bits(int8.linear(x, weight).view(30, 7), int8.linear(x.view(30, 24), weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_is_what_simulation_computes(bias, dtype, assert_same_bits):
    x, weight = _random(5, 40).to(dtype), int8.quantize(_random(6, 40, seed=1))
    offset = _random(6) if bias else None
    simulated = functional.linear(
        int8.fake_quantize(x),
        int8.dequantize(weight, dtype),
        None if offset is None else offset.to(dtype),
    )
    assert_same_bits(int8.linear(x, weight, offset), simulated)
    assert_same_bits(
        int8.linear(x, weight, offset, out_dtype=torch.float32), simulated.to(torch.float32)
    )


def test_linear_is_close_to_the_exact_product_of_codes():
    x, weight = _random(5, 300), int8.quantize(_random(6, 300, seed=1))
    exact = int8.matmul(int8.quantize(x), weight, out_dtype=torch.float32)
    # Float32 sums of 300 products of rounded values.
    torch.testing.assert_close(int8.linear(x, weight), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)], ids=str)
def test_empty_products(shape):
    m, n, k = shape
    x, weight, bias = torch.ones(m, k), int8.quantize(torch.ones(n, k)), torch.arange(n).float()
    expected = bias.expand(m, n) + k
    assert torch.equal(int8.linear(x, weight, bias).round(), expected)
    product = int8.matmul(int8.quantize(x), weight, bias, out_dtype=torch.float32)
    assert torch.equal(product.round(), expected)


PACKED = int8.quantize(torch.ones(2, 4))

REFUSED = [
    pytest.param(
        lambda: int8.quantize(torch.ones(2, dtype=torch.float64)),
        "x must be float32 or bfloat16 or float16, got float64",
        id="float64",
    ),
    pytest.param(
        lambda: int8.fake_quantize(torch.tensor(1.0)),
        "x must have at least one dimension",
        id="scalar",
    ),
    pytest.param(
        lambda: int8.quantize(torch.ones(2, 4), torch.ones(())),
        r"scale must have shape \(2, 1\), got \(\)",
        id="scalar_scale",
    ),
    pytest.param(
        lambda: int8.quantize(torch.ones(2, 4), torch.ones(2, 1).bfloat16()),
        "scale must be float32, got bfloat16",
        id="scale_dtype",
    ),
    *(
        pytest.param(
            lambda value=value: int8.fake_quantize(torch.ones(2, 4), torch.full((2, 1), value)),
            "scale must be at least 2",
            id=f"scale_{value}",
        )
        for value in (0.0, -1.0, 2.0**-101)
    ),
    pytest.param(
        lambda: int8.dequantize(INT8Tensor(torch.ones(2, 4), torch.ones(2, 1))),
        "packed's codes must be int8, got float32",
        id="codes_dtype",
    ),
    pytest.param(
        lambda: int8.dequantize(INT8Tensor(torch.ones((), dtype=torch.int8), torch.ones(1))),
        "packed must have at least one dimension",
        id="scalar_codes",
    ),
    pytest.param(
        lambda: int8.dequantize(PACKED, torch.int32),
        "the result must be .* got int32",
        id="result_dtype",
    ),
    pytest.param(
        lambda: int8.linear(torch.ones(3, 5), PACKED),
        "x must have 4 columns as the right operand has, got 5",
        id="columns",
    ),
    pytest.param(
        lambda: int8.linear(torch.ones(3, 4), int8.quantize(torch.ones(4))),
        "the right operand must be a matrix",
        id="vector_weight",
    ),
    pytest.param(
        lambda: int8.linear(torch.ones(3, 4), PACKED, torch.ones(3)),
        r"bias must have shape \(2,\), got \(3,\)",
        id="bias",
    ),
    pytest.param(
        lambda: int8.matmul(PACKED, PACKED, out_dtype=torch.int32),
        "the result must be .* got int32",
        id="out_dtype",
    ),
    pytest.param(
        lambda: int8.linear(torch.ones(1, 2**17), int8.quantize(torch.ones(1, 2**17))),
        "x must have at most 131071 columns, so that sums fit int32, got 131072",
        id="too_long",
    ),
    pytest.param(
        lambda: int8.linear(torch.ones(3, 4, device="meta"), PACKED),
        "operands must be on one device, got cpu and meta",
        id="devices",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_say_rule_and_value(call, message):
    with pytest.raises(InputError, match=message):
        call()


def _float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


any_finite = st.integers(0, 2**32 - 1).map(_float32).filter(math.isfinite)
any_row = st.lists(any_finite, min_size=1, max_size=24)
some_scale = st.floats(2.0**-99, 2.0**60, width=32)


@FEW
@given(any_row, st.none() | some_scale)
def test_any_float32_equals_reference(values, scale):
    x, scale = torch.tensor([values]), None if scale is None else torch.tensor([[scale]])
    expected, scales = reference.quantize(x, scale)
    packed = int8.quantize(x, scale)
    assert torch.equal(packed.codes, expected) and torch.equal(packed.scale, scales)
    assert torch.equal(
        int8.fake_quantize(x, scale).view(torch.int32),
        reference.fake_quantize(x, scale).view(torch.int32),
    )


@FEW
@given(any_row)
def test_sign_symmetry_and_order(values):
    x = torch.tensor(values).sort().values
    codes = int8.quantize(x).codes.int()
    assert torch.equal(int8.quantize(-x).codes.int(), -codes)
    assert (codes.diff() >= 0).all()


@FEW
@given(any_row, some_scale)
def test_a_second_time_changes_nothing(values, scale):
    x, scale = torch.tensor([values]), torch.tensor([[scale]])
    once = int8.fake_quantize(x, scale)
    assert torch.equal(int8.fake_quantize(once, scale), once)


@FEW
@given(st.integers(1, 200), st.floats(2.0**-60, 2.0**60, width=32))
def test_the_largest_of_a_row_keeps_its_place_at_the_end_of_the_codes(columns, magnitude):
    x = _random(1, columns, seed=columns) * magnitude
    codes = int8.quantize(x).codes.int()
    assert codes.abs().max() == 127
    assert codes.abs().flatten()[x.abs().argmax()] == 127
