"""Dividing by a shared scale and rounding to E4M3: true float32 division, for hostile operands."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from autoq.kernels._launch import fp8 as launch
from autoq.kernels._reference.fp8 import decode_byte
from autoq.kernels._scaling import Scaling
from autoq.kernels.targets import TARGETS

EXTREME_SCALES = [
    2.0**-100,
    math.nextafter(2.0**-99, 0),  # in float32 the same power of two
    (2 - 2.0**-23) * 2.0**-100,
    (1 + 2.0**-23) * 2.0**-60,
    1 / 3,
    1.0,
    2 - 2.0**-23,
    448.0,
    7e20,
    2.0**126,
    2.0**127,
    1.5 * 2.0**127,
    (2 - 2.0**-23) * 2.0**127,
]
every_rounding = pytest.mark.parametrize(
    "target",
    [
        TARGETS["sm_80"],
        pytest.param(TARGETS["sm_90"], marks=pytest.mark.needs("fp8_type")),
    ],
    ids=lambda target: target.name,
)


def _scales(count: int) -> Tensor:
    """[rows, 1]: the extreme ones, and random mantissas under every exponent that scales have."""
    generator = torch.Generator().manual_seed(11)
    exponents = torch.randint(-100, 120, (count,), generator=generator)
    random = torch.ldexp(1 + torch.rand(count, generator=generator), exponents)
    return torch.cat([torch.tensor(EXTREME_SCALES), random])[:, None]


def _boundaries() -> Tensor:
    """The E4M3 magnitudes, and the midpoints at which rounding changes its mind."""
    magnitudes = torch.tensor([decode_byte(code) for code in range(0x7F)])
    return torch.cat([magnitudes, (magnitudes[:-1] + magnitudes[1:]) / 2, torch.tensor([464.0])])


def _beside(x: Tensor) -> Tensor:
    """Every number of `x` [rows, n], its three neighbours on both sides, and all with a minus."""
    bits = x.view(torch.int32)[..., None] + torch.arange(-3, 4, dtype=torch.int32)
    near = bits.clamp(0, 0x7F7FFFFF).view(torch.float32).flatten(1)
    return torch.cat([near, -near], 1)


def _every_magnitude() -> Tensor:
    """[n]: every sign, exponent and leading 4 mantissa bits with three endings; NaN and infinity."""
    leading = torch.arange(2**13, dtype=torch.int64) << 19
    bits = torch.cat([leading | ending for ending in (0, 1, 0x7FFFF)])
    bits = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    return bits.view(torch.float32)


def _check(x: Tensor, scale: Tensor, target, device, assert_same_bits) -> None:
    """Codes and values of rows under given scales, against division, cast and product of torch."""
    dtype = x.dtype
    codes, _ = launch.quantize(x.to(device), scale.to(device), Scaling.ROW, target=target)
    values = launch.fake_quantize(x.to(device), scale.to(device), Scaling.ROW, target=target)
    expected = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    number = ~(expected.isnan())
    assert_same_bits(codes.cpu()[number], expected[number])
    assert codes.cpu()[~number].isnan().all()
    products = (expected.float() * scale).to(dtype)
    assert_same_bits(values.cpu()[~products.isnan()], products[~products.isnan()])
    assert values.cpu()[products.isnan()].isnan().all()


@every_rounding
def test_quotients_beside_every_boundary(target, device, assert_same_bits):
    scale = _scales(50)
    _check(_beside(_boundaries() * scale), scale, target, device, assert_same_bits)


@every_rounding
def test_every_magnitude_under_extreme_scales(target, device, assert_same_bits):
    """Subnormal, huge, infinite, NaN of both signs, zeros of both signs."""
    x = _every_magnitude()
    scale = torch.tensor([*EXTREME_SCALES, math.inf, math.nan])[:, None]
    _check(x.expand(len(scale), -1), scale, target, device, assert_same_bits)


def _threshold_ends() -> list[tuple[int, int]]:
    """(end, exponent): end * 2**exponent are the ends of the intervals that float32 rounds to
    thresholds of E4M3, half a last bit from odd numbers below 32."""
    ends = []
    for threshold in range(1, 32, 2):
        for side in (-1, 1):
            exponent = threshold.bit_length() - 25 - (side < 0 and threshold == 1)
            ends.append(((threshold << -exponent) + side, exponent))
    return ends


def _nearest(mantissas: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of `bits` bits for which x / scale comes closest to another E4M3 rounding: below and
    above the products of scales and ends.

    Args:
        mantissas: of the scales in [1, 2), integers from 2**23 to 2**24 - 1.

    Returns:
        x float64 [scales, places], exact, and the relative distances.
    """
    numbers, distances = [], []
    for end, exponent in _threshold_ends():
        product = mantissas * end  # below 2**50, exact
        last_bit = np.frexp(product.astype(np.float64))[1] - bits
        below = product >> last_bit << last_bit
        for x in (below, below + (np.int64(1) << last_bit)):
            numbers.append(x * 2.0 ** (exponent - 23))
            distances.append(np.abs(x - product) / product)
    return np.stack(numbers, 1), np.stack(distances, 1)


def _mantissas(count: int) -> np.ndarray:
    random = np.random.default_rng(7).integers(2**23, 2**24, count)
    return np.concatenate([[2**23, 2**23 + 1, 2**24 - 2, 2**24 - 1], random])


@pytest.mark.parametrize("bits", [8, 11])
def test_no_narrow_quotient_is_near_the_end_of_a_threshold(bits):
    """The premise of divide_narrow, whose error is 2**-46; no scale at all gives less than 2**-36
    to thresholds of 5 bits, which takes minutes to count."""
    _, distances = _nearest(_mantissas(2**16), bits)
    assert distances[3].min() == pytest.approx(2.0**-48)  # a power of two over 2 - 2**-23
    assert np.delete(distances, 3, axis=0).min() > 2.0**-36


@every_rounding
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 11), (torch.bfloat16, 8)], ids=str)
def test_narrow_quotients_nearest_to_thresholds(bits, dtype, target, device, assert_same_bits):
    """Under the scales that bring them closest, of many; one multiplication would not do there."""
    mantissas = _mantissas(2**18)
    _, distances = _nearest(mantissas, bits)
    mantissas = np.concatenate([mantissas[:4], mantissas[distances.argmin(axis=0)]])
    numbers, _ = _nearest(mantissas, bits)
    for exponent in (-10, 3):  # odd numbers times 2**-10 are the thresholds of subnormal codes
        x = torch.from_numpy(numbers * 2.0**exponent)
        assert torch.equal(x.to(dtype).double(), x), "the numbers must be exact"
        scale = torch.from_numpy(mantissas * 2.0**-23).float()[:, None]
        _check(x.to(dtype), scale, target, device, assert_same_bits)


def _hardest() -> tuple[list[float], list[float]]:
    """Float32 x and scales with quotients within 32 * 2**-49 of the end of a threshold.

    x * 2**shift = scale * end - miss in integers, so scale = miss / end modulo 2**shift.
    """
    numbers, scales = [], []
    for end, exponent in _threshold_ends():
        for shift in (end.bit_length() - 1, end.bit_length()):
            for miss in range(-31, 32, 2):
                scale = miss * pow(end, -1, 2**shift) % 2**shift
                product = scale * end - miss
                if 2**23 <= scale < 2**24 and product.bit_length() == shift + 24:
                    numbers.append(product * 2.0 ** (exponent - 23))
                    scales.append(scale * 2.0**-23)
    return numbers, scales


@every_rounding
def test_hardest_float32_quotients(target, device, assert_same_bits):
    numbers, scales = _hardest()
    assert len(numbers) > 300
    x, scale = torch.tensor(numbers, dtype=torch.float64), torch.tensor(scales)[:, None]
    assert torch.equal(x.float().double(), x), "the numbers must be exact"
    for exponent in (-10, 3):
        _check((x * 2.0**exponent).float()[:, None], scale, target, device, assert_same_bits)
