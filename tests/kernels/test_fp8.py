"""FP8 E4M3: the reference against hand-computed values, the fast path against the reference."""

import math
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from autoq.errors import InputError
from autoq.kernels import fp8
from autoq.kernels._reference import fp8 as reference
from autoq.kernels._torch.chunks import map_rows
from autoq.kernels._torch.fp8 import round_e4m3_

ONE = torch.tensor(1.0)
Scaling = fp8.Scaling

# Relative to the result; sums of 200 products in float32.
FLOAT32_SUM_TOLERANCE = 1e-4
FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

# value -> byte, worked out by hand: ties go to the even code, above 448 saturates.
ENCODED = [
    (448.0, 0x7E),
    (464.0, 0x7E),
    (500.0, 0x7E),
    (3.4e38, 0x7E),
    (math.inf, 0x7E),
    (-math.inf, 0xFE),
    (432.0, 0x7E),  # tie between 416 and 448
    (400.0, 0x7C),  # tie between 384 and 416
    (2.0**-9, 0x01),
    (2.0**-10, 0x00),  # tie
    (1.5 * 2.0**-10, 0x01),
    (1.5 * 2.0**-9, 0x02),  # tie
    (2.5 * 2.0**-9, 0x02),  # tie
    (2.0**-149, 0x00),
    (0.015625, 0x08),
    (0.0, 0x00),
    (-0.0, 0x80),
    (-(2.0**-11), 0x80),
    (1.0, 0x38),
    (1.0625, 0x38),  # tie
    (1.125, 0x39),
    (1.1875, 0x3A),  # tie
    (-0.3, 0xAA),
    (17.0, 0x58),  # tie
]


def _codes(x: torch.Tensor, scale: torch.Tensor = ONE) -> torch.Tensor:
    """Codes as bytes, under a scale of the whole tensor."""
    return fp8.quantize(x, scale).codes.view(torch.uint8)


def _packed(codes: torch.Tensor, scale: torch.Tensor = ONE) -> fp8.FP8Tensor:
    return fp8.FP8Tensor(codes, scale, Scaling.TENSOR)


def _hostile_values(dtype: torch.dtype) -> torch.Tensor:
    """[8, 96]: every scale of magnitude, ties, zeros of both signs, saturation."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 96, generator=generator)
    x[1] *= 1e-3
    x[2] *= 1e3
    x[3] = torch.arange(96) * 2.0**-10
    x[4] = -torch.arange(96) * 0.0625 - 1
    x[5] = 0.0
    x[6, ::2] = -0.0
    x[7] *= torch.exp2(torch.arange(96) / 4 - 16)
    return x.to(dtype)


@pytest.mark.parametrize(("value", "code"), ENCODED, ids=[str(value) for value, _ in ENCODED])
def test_reference_and_fast_path_encode_by_hand_values(value, code):
    assert reference.encode_value(value) == code
    assert _codes(torch.tensor([value])).item() == code


def test_reference_decodes_landmarks():
    landmarks = {0x00: 0.0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1.0, 0x7E: 448.0}
    assert {code: reference.decode_byte(code) for code in landmarks} == landmarks
    assert reference.decode_byte(0xAA) == -0.3125
    assert math.copysign(1, reference.decode_byte(0x80)) == -1
    assert math.isnan(reference.decode_byte(0x7F)) and math.isnan(reference.decode_byte(0xFF))


def test_every_code_decodes_as_in_the_reference_and_encodes_back(assert_same_bits):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)
    values = fp8.dequantize(_packed(codes))
    assert len(codes) == 254
    assert_same_bits(values, reference.dequantize(codes, ONE))
    assert_same_bits(fp8.quantize(values, ONE).codes, codes)
    assert_same_bits(fp8.fake_quantize(values, ONE), values)


def test_every_midpoint_between_codes_goes_to_the_even_one():
    magnitudes = torch.tensor([reference.decode_byte(code) for code in range(0x7F)])
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    codes = _codes(midpoints)
    assert (codes % 2 == 0).all()
    assert torch.equal(fp8.fake_quantize(midpoints, ONE), magnitudes[codes.long()])


def test_rounding_in_place_equals_the_cast_for_every_bfloat16(assert_same_bits):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[~values.isnan()]
    cast = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert_same_bits(round_e4m3_(values.clone(), torch.empty_like(values)), cast)


def test_nan_stays_nan():
    x = torch.tensor([math.nan, 1.0])
    assert _codes(x).tolist() == [0x7F, 0x38]
    assert fp8.fake_quantize(x, ONE).isnan().tolist() == [True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scaling", list(Scaling))
def test_what_shares_a_computed_scale_with_nan_or_infinity_becomes_nan(scaling, bad):
    x = torch.ones(130, 200)
    x[1, 3] = bad
    spoiled = torch.zeros_like(x, dtype=torch.bool)
    rows = 130 if scaling is Scaling.TENSOR else 128 if scaling is Scaling.BLOCK_128X128 else 2
    columns = 200 if scaling in (Scaling.TENSOR, Scaling.ROW) else 128
    spoiled[1 if rows == 2 else 0 : rows, :columns] = True
    assert torch.equal(fp8.fake_quantize(x, scaling=scaling).isnan(), spoiled)
    assert torch.equal(fp8.dequantize(fp8.quantize(x, scaling=scaling)).isnan(), spoiled)
    assert not fp8.scales(x, scaling).isfinite().all()


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(448.0, 1.0), (0.0, 1.0), (3.5, 2.0**-7), (1e-45, 2.0**-100), (448 * 2.0**-100, 2.0**-100)],
)
def test_tensor_scale(amax, scale):
    for given_amax in (amax, torch.tensor(amax), torch.tensor([amax])):
        result = fp8.tensor_scale(given_amax)
        assert (result.item(), result.dtype, result.shape) == (scale, torch.float32, ())
    assert reference.tensor_scale(amax).item() == scale


def test_tensor_scale_divides_in_float32():
    # A double division rounded to float32 gives the neighbour for some of these.
    for amax in torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist():
        expected = (torch.tensor(amax) / torch.tensor(448.0)).item()
        assert fp8.tensor_scale(amax).item() == expected


@pytest.mark.parametrize("amax", [-1.0, math.nan, math.inf])
def test_tensor_scale_refuses(amax):
    message = f"amax must be finite and not negative, got {amax}"
    with pytest.raises(InputError, match=message):
        fp8.tensor_scale(amax)


def test_tensor_scale_refuses_several_numbers():
    with pytest.raises(InputError, match=r"amax must be one number, got shape \(2,\)"):
        fp8.tensor_scale(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("amax", [0.37, 448.0, 3e-5, 1e6], ids=str)
def test_fast_path_equals_reference(dtype, amax, assert_same_bits):
    x, scale = _hostile_values(dtype), fp8.tensor_scale(amax)
    codes = reference.quantize(x, scale)
    packed = fp8.quantize(x, scale)
    assert_same_bits(packed.codes, codes)
    assert_same_bits(fp8.dequantize(packed, dtype), reference.dequantize(codes, scale, dtype))
    assert_same_bits(fp8.fake_quantize(x, scale), reference.fake_quantize(x, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 96), (3, 256)], ids=str)
@pytest.mark.parametrize("scaling", list(Scaling))
def test_computed_scales_equal_reference(scaling, shape, dtype, assert_same_bits):
    x = _hostile_values(dtype).view(-1)[: math.prod(shape)].view(shape)
    scale = reference.scales(x, scaling)
    codes = reference.quantize(x, scale, scaling)
    packed = fp8.quantize(x, scaling=scaling)
    assert_same_bits(fp8.scales(x, scaling), scale)
    assert_same_bits(packed.scale, scale)
    assert_same_bits(packed.codes, codes)
    values = reference.dequantize(codes, scale, dtype, scaling)
    assert_same_bits(fp8.dequantize(packed, dtype), values)
    assert_same_bits(fp8.fake_quantize(x, scaling=scaling), values)
    assert_same_bits(fp8.fake_quantize(x, scale, scaling=scaling), values)


@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("rows", [1, 127, 129])
@pytest.mark.parametrize("scaling", list(Scaling))
def test_blocks_at_the_edge_hold_what_is_left(scaling, rows, columns):
    """The scale of each element, written out by hand."""
    x = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows)) + 0.1
    packed = fp8.quantize(x, scaling=scaling)
    height = {Scaling.TENSOR: rows, Scaling.BLOCK_128X128: 128}.get(scaling, 1)
    width = columns if scaling in (Scaling.TENSOR, Scaling.ROW) else 128
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            block = x[top : top + height, left : left + width]
            scale = fp8.tensor_scale(block.max())
            codes = packed.codes[top : top + height, left : left + width]
            assert torch.equal(fp8.dequantize(_packed(codes, scale)), fp8.fake_quantize(block))
            if packed.scale.ndim:
                assert packed.scale[top // height, left // width] == scale


def test_leading_dimensions_are_rows():
    x = torch.randn(2, 3, 5, 200, generator=torch.Generator().manual_seed(0))
    for scaling, columns in ((Scaling.ROW, 1), (Scaling.BLOCK_1X128, 2)):
        packed = fp8.quantize(x, scaling=scaling)
        flat = fp8.quantize(x.view(30, 200), scaling=scaling)
        assert packed.scale.shape == (2, 3, 5, columns)
        assert torch.equal(packed.scale.view(30, columns), flat.scale)
        assert torch.equal(fp8.dequantize(packed).view(30, 200), fp8.dequantize(flat))


@pytest.mark.parametrize("magnitude", [1e-37, 1e-30, 1e30, 3e38], ids=str)
def test_tiny_and_huge_values_stay_finite_and_close(magnitude, assert_same_bits):
    x = torch.tensor([[1.0, -0.5, 0.0, 0.25]]) * magnitude
    scale = fp8.tensor_scale(x.abs().max())
    result = fp8.fake_quantize(x, scale)
    assert_same_bits(result, reference.fake_quantize(x, scale))
    assert result.isfinite().all()
    if magnitude >= 448 * 2.0**-100:
        torch.testing.assert_close(result, x, rtol=2**-4, atol=0)


def test_row_scales_keep_rows_apart():
    x = torch.tensor([[448.0, 1.0], [0.448, 0.001], [0.0, 0.0]])
    assert torch.equal(fp8.fake_quantize(x, scaling=Scaling.ROW), x)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 3, 5), (0, 7), (4, 0), (1, 1, 1)], ids=str)
def test_odd_shapes(shape):
    x = torch.ones(shape)
    assert torch.equal(fp8.fake_quantize(x, ONE), x)
    for scaling in Scaling:
        if scaling is Scaling.BLOCK_128X128 and len(shape) != 2:
            continue
        packed = fp8.quantize(x, scaling=scaling)
        assert torch.equal(fp8.fake_quantize(x, scaling=scaling), x)
        assert torch.equal(fp8.dequantize(packed), x)
        assert packed.scale.shape == scaling.scale_shape(shape)


def test_strided_operands_in_many_pieces(assert_same_bits):
    x = torch.randn(130, 4099, generator=torch.Generator().manual_seed(1))
    scale = fp8.tensor_scale(2.0)
    naive = fp8.dequantize(fp8.quantize(x, scale))
    assert_same_bits(fp8.fake_quantize(x, scale), naive)
    assert_same_bits(fp8.fake_quantize(x.t(), scale), naive.t())
    assert_same_bits(
        fp8.fake_quantize(x.bfloat16()[:, ::3], scale),
        fp8.fake_quantize(x.bfloat16(), scale)[:, ::3],
    )


def test_pieces_cover_every_row_once():
    seen = []

    def body(source, values, scratch, rows):
        seen.append((rows.start, rows.stop))
        values.copy_(source)

    x = torch.rand(5, 2**17, 2).bfloat16()
    assert torch.equal(map_rows(x, 2**16, body), x)
    assert [start for start, _ in seen] == [0, *(stop for _, stop in seen[:-1])]
    assert len(seen) > 1 and seen[-1][1] == 20


def test_fake_quantize_leaves_its_operand_and_the_graph_alone():
    x = torch.randn(4, 8, requires_grad=True)
    before = x.detach().clone()
    assert not fp8.fake_quantize(x, ONE).requires_grad
    assert not fp8.quantize(x, ONE).codes.requires_grad
    for scaling in Scaling:
        assert not fp8.fake_quantize(x, scaling=scaling).requires_grad
        assert not any(t.requires_grad for t in fp8.quantize(x, scaling=scaling).tensors().values())
    assert torch.equal(x, before)


def _weight(scaling: Scaling) -> fp8.FP8Tensor:
    weight = torch.randn(140, 200, generator=torch.Generator().manual_seed(4))
    return fp8.quantize(weight, scaling=scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_scaling", list(Scaling))
def test_linear_is_that_of_fake_quantised_operands(weight_scaling, dtype, assert_same_bits):
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(5)).to(dtype)
    bias = torch.randn(140, generator=torch.Generator().manual_seed(6))
    weight = _weight(weight_scaling)
    dynamic = Scaling.BLOCK_1X128 if "128" in weight_scaling else Scaling.ROW
    values, matrix = fp8.fake_quantize(x, scaling=dynamic), fp8.dequantize(weight, dtype)
    expected = functional.linear(values, matrix, bias.to(dtype))
    assert_same_bits(fp8.linear(x, weight, bias), expected)
    assert_same_bits(fp8.linear(x, weight), functional.linear(values, matrix))


def test_linear_with_a_static_input_scale(assert_same_bits):
    x, weight = (
        torch.randn(3, 200, generator=torch.Generator().manual_seed(5)),
        _weight(Scaling.ROW),
    )
    scale = fp8.tensor_scale(2.0)
    expected = functional.linear(fp8.fake_quantize(x, scale), fp8.dequantize(weight))
    assert_same_bits(fp8.linear(x, weight, input_scale=scale), expected)


def test_another_result_dtype_is_rounded_once(assert_same_bits):
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(5)).bfloat16()
    weight = _weight(Scaling.ROW)
    values = fp8.fake_quantize(x, scaling=Scaling.ROW).float()
    expected = functional.linear(values, fp8.dequantize(weight))
    assert_same_bits(fp8.linear(x, weight, out_dtype=torch.float32), expected)
    assert_same_bits(fp8.linear(x, weight, out_dtype=torch.float16), expected.half())


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Scaling.TENSOR, Scaling.ROW),
        (Scaling.ROW, Scaling.TENSOR),
        (Scaling.BLOCK_1X128, Scaling.BLOCK_128X128),
        (Scaling.BLOCK_1X128, Scaling.BLOCK_1X128),
    ],
)
def test_matmul_multiplies_the_values(left, right):
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(5))
    a, b = fp8.quantize(x, scaling=left), _weight(right)
    bias = torch.randn(140, generator=torch.Generator().manual_seed(6)).half()
    expected = fp8.dequantize(a).double() @ fp8.dequantize(b).double().T + bias.double()
    for dtype in (torch.float32, torch.bfloat16):
        out = fp8.matmul(a, b, bias, out_dtype=dtype)
        tolerance = max(torch.finfo(dtype).eps / 2, FLOAT32_SUM_TOLERANCE)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("scaling", [Scaling.ROW, Scaling.BLOCK_128X128])
def test_empty_products(scaling, shape):
    m, n, k = shape
    weight = fp8.quantize(torch.ones(n, k), scaling=scaling)
    assert torch.equal(fp8.linear(torch.ones(m, k), weight, torch.ones(n)), torch.ones(m, n))


def test_packed_tensors_move_together():
    packed = _weight(Scaling.ROW)
    moved = packed.to("meta")
    assert (moved.codes.device.type, moved.scale.device.type) == ("meta", "meta")
    assert moved.scaling is Scaling.ROW and packed.nbytes == 140 * 200 + 4 * 140


REFUSED = [
    pytest.param(
        lambda: fp8.linear(torch.ones(2, 199), _weight(Scaling.ROW)),
        r"weight must have as many columns as its input, got shapes \(140, 200\) and \(2, 199\)",
        id="columns",
    ),
    pytest.param(
        lambda: fp8.linear(torch.ones(2, 200), _weight(Scaling.ROW), torch.ones(139)),
        r"bias must have shape \(140,\), got \(139,\)",
        id="bias_shape",
    ),
    pytest.param(
        lambda: fp8.linear(torch.ones(2, 200), _weight(Scaling.ROW), torch.ones(140).int()),
        "bias must be .* got int32",
        id="bias_dtype",
    ),
    pytest.param(
        lambda: fp8.linear(
            torch.ones(2, 200), _weight(Scaling.BLOCK_128X128), input_scale=torch.tensor(1.0)
        ),
        "input_scale must be left out where the weight is 128x128, got one",
        id="static_blocks",
    ),
    pytest.param(
        lambda: fp8.linear(torch.ones(2, 200), _weight(Scaling.ROW).to("meta")),
        "operands must be on one device, got cpu and meta",
        id="devices",
    ),
    pytest.param(
        lambda: fp8.linear(torch.ones(2, 200), _weight(Scaling.ROW), out_dtype=torch.int8),
        "the result must be .* got int8",
        id="out_dtype",
    ),
    pytest.param(
        lambda: fp8.matmul(
            _weight(Scaling.ROW), _weight(Scaling.BLOCK_128X128), out_dtype=torch.float32
        ),
        "a must be 1x128 where b is 128x128, got row",
        id="row_by_blocks",
    ),
    pytest.param(
        lambda: fp8.matmul(
            _weight(Scaling.BLOCK_1X128), _weight(Scaling.ROW), out_dtype=torch.float32
        ),
        "a must be tensor or row where b is row, got 1x128",
        id="blocks_by_row",
    ),
    pytest.param(
        lambda: fp8.quantize(torch.ones(2, 3, 4), scaling=Scaling.BLOCK_128X128),
        r"x must be a matrix, got shape \(2, 3, 4\)",
        id="squares_of_three_dimensions",
    ),
    pytest.param(
        lambda: fp8.quantize(torch.ones(2, 300), torch.ones(2, 2), scaling=Scaling.BLOCK_1X128),
        r"scale must have shape \(2, 3\), got \(2, 2\)",
        id="block_scale_shape",
    ),
    pytest.param(
        lambda: fp8.quantize(torch.ones(2, 3), torch.tensor([[1.0], [0.0]]), scaling=Scaling.ROW),
        r"scale must be at least 2\*\*-100, got 0.0",
        id="row_scale_zero",
    ),
    pytest.param(
        lambda: fp8.dequantize(fp8.FP8Tensor(_weight(Scaling.ROW).codes, ONE, Scaling.ROW)),
        r"the scale of packed must have shape \(140, 1\), got \(\)",
        id="packed_scale_shape",
    ),
    pytest.param(
        lambda: fp8.quantize(torch.ones(2, dtype=torch.float64), ONE),
        "x must be float32 or bfloat16 or float16, got float64",
        id="float64",
    ),
    pytest.param(
        lambda: fp8.fake_quantize(torch.ones(2, dtype=torch.int8), ONE),
        "x must be .* got int8",
        id="integers",
    ),
    pytest.param(
        lambda: fp8.fake_quantize(torch.tensor(1.0), scaling=Scaling.ROW),
        "x must have at least one dimension",
        id="scalar",
    ),
    pytest.param(
        lambda: fp8.quantize(torch.ones(2), torch.ones(2)),
        r"scale must have shape \(\), got \(2,\)",
        id="vector_scale",
    ),
    pytest.param(
        lambda: fp8.quantize(torch.ones(2), ONE.bfloat16()),
        "scale must be float32, got bfloat16",
        id="scale_dtype",
    ),
    *(
        pytest.param(
            lambda value=value: fp8.fake_quantize(torch.ones(2), torch.tensor(value)),
            "scale must be finite and at least 2",
            id=f"scale_{value}",
        )
        for value in (0.0, -1.0, math.nan, math.inf, 2.0**-101)
    ),
    pytest.param(
        lambda: fp8.dequantize(_packed(torch.ones(2))),
        "the codes of packed must be float8_e4m3fn, got float32",
        id="codes_dtype",
    ),
    pytest.param(
        lambda: fp8.dequantize(_packed(torch.ones(2).to(torch.float8_e4m3fn)), torch.int32),
        "the result must be .* got int32",
        id="result_dtype",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals_say_rule_and_value(call, message):
    with pytest.raises(InputError, match=message):
        call()


def _float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


any_finite = st.integers(0, 2**32 - 1).map(_float32).filter(math.isfinite)
some_scale = st.floats(2.0**-99, 2.0**60, width=32)


@FEW
@given(st.lists(any_finite, min_size=1, max_size=24), some_scale)
def test_any_float32_equals_reference(values, scale):
    x, scale = torch.tensor(values), torch.tensor(scale)
    assert torch.equal(
        fp8.fake_quantize(x, scale).view(torch.int32),
        reference.fake_quantize(x, scale).view(torch.int32),
    )


@FEW
@given(st.lists(any_finite, min_size=1, max_size=24), some_scale)
def test_sign_symmetry_and_idempotence(values, scale):
    x, scale = torch.tensor(values), torch.tensor(scale)
    once = fp8.fake_quantize(x, scale)
    assert torch.equal(fp8.fake_quantize(-x, scale), -once)
    assert torch.equal(fp8.fake_quantize(once, scale), once)


small_matrices = st.lists(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=4
)


@FEW
@given(small_matrices, st.sampled_from(list(Scaling)))
def test_any_matrix_equals_reference_under_its_own_scales(rows, scaling):
    x = torch.tensor(rows)
    packed = fp8.quantize(x, scaling=scaling)
    scale = reference.scales(x, scaling)
    assert torch.equal(packed.scale, scale)
    expected = reference.quantize(x, scale, scaling)
    assert torch.equal(packed.codes.view(torch.uint8), expected.view(torch.uint8))


@FEW
@given(small_matrices, st.integers(-20, 20), st.sampled_from(list(Scaling)))
def test_a_power_of_two_goes_to_the_scale(rows, exponent, scaling):
    x = torch.tensor(rows)
    x = torch.where(x.abs() < 1e-3, 0.0, x)  # no scale may reach its lower bound
    once, again = (fp8.quantize(t, scaling=scaling) for t in (x, x * 2.0**exponent))
    assert torch.equal(once.codes.view(torch.uint8), again.codes.view(torch.uint8))
    empty = once.scale == 1
    assert torch.equal(again.scale[~empty], once.scale[~empty] * 2.0**exponent)


@FEW
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2), some_scale)
def test_larger_numbers_never_round_to_smaller_ones(values, scale):
    x = torch.tensor(sorted(values))
    assert (fp8.fake_quantize(x, torch.tensor(scale)).diff() >= 0).all()


@FEW
@given(small_matrices, st.sampled_from(list(Scaling)))
def test_the_largest_magnitude_sets_the_scale_and_is_kept_closely(rows, scaling):
    x = torch.tensor(rows)
    error = (fp8.fake_quantize(x, scaling=scaling) - x).abs()
    amax = x.abs().amax() if scaling is Scaling.TENSOR else x.abs().amax(-1, keepdim=True)
    if scaling is Scaling.BLOCK_128X128:
        amax = x.abs().amax()
    # Half a step at the top is 16 of 448; below the smallest normal number half of 2**-9 steps.
    assert (error <= amax * (16 / 448) * 1.0001 + 1e-30).all()
