"""NVFP4 kernels: the bits of the reference, by the launch wrappers, for every kind of target."""

import itertools
import math
import struct
from fractions import Fraction

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoq.kernels import nvfp4
from autoq.kernels._launch import nvfp4 as launch
from autoq.kernels._reference import nvfp4 as reference
from autoq.kernels._torch import nvfp4 as body
from autoq.kernels.targets import TARGETS, target_of

if triton.knobs.runtime.interpret:
    import ptx

    ptx.install()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(16,), (1, 48), (7, 3, 32), (37, 80)]
# 32 threads in a warp, 64 threads in a warp, a conversion of the hardware's own.
KINDS = ["sm_90", "gfx942", "sm_100"]
# Between two neighbouring codes.
BOUNDARIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
FEW = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _need(kind, device) -> None:
    """Skip a conversion that the GPU at hand does not have."""
    here = target_of(device)
    if here is not None and here.nvfp4_matmul < TARGETS[kind].nvfp4_matmul:
        pytest.skip(f"{here.name} is not {kind}")


def _hostile(shape, dtype, device) -> torch.Tensor:
    """Blocks of every magnitude, blocks of zeros of both signs, subnormal numbers, infinity."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    blocks = torch.randn(math.prod(shape) // 16, 16, generator=generator)
    blocks *= torch.exp2(torch.randint(-40, 12, (len(blocks), 1), generator=generator).float())
    blocks[1::7] = (torch.arange(16) - 8) * 0.25
    blocks[2::11] = 0.0
    blocks[3::13, ::2] = -0.0
    blocks[4::17] *= 1e-30
    blocks[5::19, 3] = -math.inf
    return blocks.reshape(shape).to(device=device, dtype=dtype)


def _same(actual: torch.Tensor, expected: torch.Tensor, assert_same_bits) -> None:
    """The same bits; of NaN only that it is one, for GPUs know one NaN and the reference many."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(actual.nan_to_num(0.0), expected.nan_to_num(0.0))


def _check_all(x, scale, target, assert_same_bits, truth=body) -> None:
    """All operations against the torch body, or the reference, which it equals on any tensor."""
    expected_codes, expected_scale = truth.quantize(x.cpu(), scale.cpu())
    codes, block_scale = launch.quantize(x, scale, target=target)
    assert_same_bits(block_scale.cpu(), expected_scale)
    assert_same_bits(codes.cpu(), expected_codes)
    values = truth.dequantize(expected_codes, expected_scale, scale.cpu(), x.dtype)
    stored = launch.dequantize(codes, block_scale, scale, x.dtype, target=target)
    _same(stored.cpu(), values, assert_same_bits)
    _same(launch.fake_quantize(x, scale, target=target).cpu(), values, assert_same_bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_scales_and_values_are_those_of_the_reference(dtype, kind, device, assert_same_bits):
    _need(kind, device)
    for shape, amax in zip(SHAPES, (0.37, 4.0, 3e-5, 1e6), strict=True):
        scale = nvfp4.global_scale(amax).to(device)
        _check_all(_hostile(shape, dtype, device), scale, TARGETS[kind], assert_same_bits)


@pytest.mark.parametrize("scale", [2.0**-100, 3e-20, 1.0, 7e20, 1.26e35])
def test_scales_of_every_size(scale, device, assert_same_bits):
    x = _hostile((160, 16), torch.float32, device)
    x *= torch.logspace(-38, 25, 160, device=device)[:, None]
    _check_all(x, torch.tensor(scale, device=device), TARGETS["sm_90"], assert_same_bits)


@pytest.mark.parametrize("kind", ["sm_90", "sm_100"])
def test_negative_values_keep_their_sign_where_the_quotient_does_not_vanish(
    kind, device, assert_same_bits
):
    """The smallest magnitudes under block scales from 2**-9 to 448: most quotients are below the
    normal numbers, and those that float32 rounds to zero lose their sign."""
    _need(kind, device)
    steps = torch.tensor([2.0**-9, 0.5, 1.0, 1.5, 2.0, 3.0, 28.0, 448.0], device=device)
    x = torch.arange(0, -15, -1, device=device, dtype=torch.int32).abs().view(torch.float32)
    x = -torch.cat((x, x[:1]))
    for global_scale in (1.0, 3.0, 2.0**23, 2.0**24, 2.0**25 * 1.01, 2.0**60):
        blocks = x.repeat(len(steps), 1) * max(1.0, global_scale / 16)
        blocks[:, 15] = steps * 6 * global_scale
        scale = torch.tensor(global_scale, device=device)
        _check_all(blocks, scale, TARGETS[kind], assert_same_bits)


def test_quotients_next_to_every_boundary(device, assert_same_bits):
    """Of blocks with scales all over an octave: there one wrong last bit is another code."""
    steps = torch.rand(128, 1, device=device) + 1
    boundaries = torch.tensor([*BOUNDARIES, 0.5], device=device).repeat(2) * steps
    near = boundaries.view(torch.int32) + torch.randint(-2, 3, (128, 16), device=device)
    x = near.view(torch.float32)
    x[:, 15] = 6 * steps.flatten()
    for global_scale in (1.0, 1.7e-5):
        scale = torch.tensor(global_scale, device=device)
        _check_all(x * scale, scale, TARGETS["sm_90"], assert_same_bits)
        # With the exact steps, of which there are eight.
        exact = x * (scale * (1 + torch.randint(0, 8, (128, 1), device=device) / 8) / steps)
        _check_all(exact, scale, TARGETS["sm_90"], assert_same_bits)


def _float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


any_float = st.integers(0, 2**32 - 1).map(_float32)
near_one = st.floats(-8.0, 8.0, width=32)
blocks = st.lists(st.one_of(any_float, near_one), min_size=32, max_size=32)


@FEW
@given(blocks, st.floats(2.0**-99, 2.0**60, width=32))
def test_any_float32_equals_the_reference(assert_same_bits, device, values, scale):
    x, scale = torch.tensor(values, device=device), torch.tensor(scale, device=device)
    _check_all(x, scale, TARGETS["sm_90"], assert_same_bits, truth=reference)


@pytest.mark.parametrize("kind", ["sm_90", "sm_100"])
def test_a_nan_spoils_its_block_only(kind, device):
    _need(kind, device)
    x = torch.ones(2, 32, device=device)
    x[0, 3], x[0, 4] = -math.nan, -1.0
    scale = torch.tensor(0.01, device=device)
    codes, block_scale = launch.quantize(x, scale, target=TARGETS[kind])
    assert codes[0, :8].tolist() == [0x77] * 8
    assert block_scale.view(torch.uint8)[0, 0] == 0x7F
    fake = launch.fake_quantize(x, scale, target=TARGETS["sm_90"])
    assert fake[0, :16].isnan().all() and fake.isnan().sum() == 16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 5000, 4096 * 9 + 17])
def test_the_global_scale_is_that_of_the_largest_magnitude(
    size, dtype, device, assert_same_bits, monkeypatch
):
    monkeypatch.setattr(launch, "_MOST_PARTIAL_MAXIMA", 4)
    x = torch.zeros(size, device=device, dtype=dtype)
    x[size // 3 : size // 3 + 9] = -3.3
    x[-1:] = 7.7
    scale = launch.global_scale(x, target=TARGETS["sm_90"])
    assert_same_bits(scale.cpu(), nvfp4.global_scale(body.amax(x).cpu()))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_the_global_scale_and_all_values_nan(bad, device):
    x = torch.ones(4, 16, device=device)
    x[1, 5] = bad
    scale = launch.global_scale(x, target=TARGETS["sm_90"])
    assert scale.isnan()
    assert launch.fake_quantize(x, scale, target=TARGETS["sm_90"]).isnan().all()
    packed = launch.quantize(x, scale, target=TARGETS["sm_90"])
    values = launch.dequantize(*packed, scale, torch.float32, target=TARGETS["sm_90"])
    assert values.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_without_the_global_scale_are_exact(dtype, device, assert_same_bits):
    x = _hostile((40, 64), torch.float32, device).nan_to_num(posinf=9.0, neginf=-9.0)
    scale = nvfp4.global_scale(8.0).to(device)
    codes, block_scale = launch.quantize(x, scale, target=TARGETS["sm_90"])
    one = torch.ones((), device=device)
    expected = body.dequantize(codes, block_scale, one, torch.float32)
    for values in (
        launch.unscaled_values(x, scale, dtype, target=TARGETS["sm_90"]),
        launch.unscaled_dequantize(codes, block_scale, dtype, target=TARGETS["sm_90"]),
    ):
        assert values.dtype == dtype
        assert_same_bits(values.float(), expected)


def test_every_byte_and_every_scale_byte_dequantize(device, assert_same_bits):
    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(8).reshape(256, 8).to(device)
    block_scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    block_scale = block_scale.reshape(256, 1).to(device)
    scale = torch.tensor(0.37, device=device)
    for dtype in DTYPES:
        values = launch.dequantize(codes, block_scale, scale, dtype, target=TARGETS["sm_90"])
        expected = body.dequantize(codes.cpu(), block_scale.cpu(), scale.cpu(), dtype)
        _same(values.cpu(), expected, assert_same_bits)


def test_strided_and_misaligned_operands(device, assert_same_bits):
    scale = torch.tensor(0.002, device=device)
    whole = torch.randn(49, 66, device=device).bfloat16()
    for x in (whole[:, 1:65], whole[:48].t(), whole.flatten()[1:33]):
        codes, block_scale = launch.quantize(x, scale, target=TARGETS["sm_90"])
        expected = body.quantize(x, scale)
        assert_same_bits(codes, expected[0])
        odd = torch.cat((codes.flatten()[:1], codes.flatten()))[1:].view(codes.shape)
        values = launch.dequantize(odd, block_scale, scale, torch.bfloat16, target=TARGETS["sm_90"])
        assert_same_bits(values, body.dequantize(*expected, scale, torch.bfloat16))
        assert_same_bits(launch.fake_quantize(x, scale, target=TARGETS["sm_90"]), values)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0)], ids=str)
def test_empty_tensors(shape, device):
    x, scale = torch.empty(shape, device=device), torch.ones((), device=device)
    codes, block_scale = launch.quantize(x, scale, target=TARGETS["sm_90"])
    assert codes.shape == (shape[0], shape[1] // 2)
    assert launch.fake_quantize(x, scale, target=TARGETS["sm_90"]).shape == shape
    values = launch.dequantize(codes, block_scale, scale, torch.float16, target=TARGETS["sm_90"])
    assert values.shape == shape


def test_long_tensors_take_several_steps_a_program(device, assert_same_bits, monkeypatch):
    monkeypatch.setattr(launch, "_MOST_PROGRAMS_OF_ONE_STEP", 1)
    x = _hostile((400, 16), torch.bfloat16, device)
    _check_all(x, torch.tensor(0.01, device=device), TARGETS["sm_90"], assert_same_bits)


def _rounded(value: Fraction) -> Fraction:
    """To float32, within its normal numbers."""
    if value < 0:
        return -_rounded(-value)
    if value == 0:
        return value
    last = Fraction(2) ** (math.floor(math.log2(value)) - 23)
    return round(value / last) * last


@pytest.mark.parametrize("centre", [2**23, 3 * 2**22, 2**24])
def test_one_correction_of_the_quotient_decides_as_the_rounded_quotient(centre):
    """For the divisors where an error of 2**-46 could matter, at every boundary, in exact numbers.

    The quotient s / d is compared with boundary +- half of a last bit. As fractions of 24-bit
    integers they differ by |2**j * i -+ d| / (2**25 * d) at least, which is below the error left
    only for d within 16 of 2**23, 1.5 * 2**23 or 2**24.
    """
    for divisor in range(max(centre - 20, 2**23), min(centre + 21, 2**24)):
        normal = Fraction(divisor, 2**23)
        reciprocal = _rounded(1 / normal)
        for boundary, offset in itertools.product(map(Fraction, BOUNDARIES), range(-4, 5)):
            middle = _rounded(boundary * normal)
            scaled = middle + offset * Fraction(2) ** (math.floor(math.log2(middle)) - 23)
            rough = _rounded(scaled * reciprocal)
            residual = _rounded(scaled - rough * normal)
            quotient, true = _rounded(rough + residual * reciprocal), _rounded(scaled / normal)
            assert (quotient > boundary) == (true > boundary)
            assert (quotient >= boundary) == (true >= boundary)
