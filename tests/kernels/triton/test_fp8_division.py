"""Dividing by a shared scale and rounding to E4M3: true float32 division, for hostile operands."""

import math

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
    codes, _ = launch.quantize(x.to(device), scale.to(device), Scaling.ROW, target=target)
    values = launch.fake_quantize(x.to(device), scale.to(device), Scaling.ROW, target=target)
    expected = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    number = ~(expected.isnan())
    assert_same_bits(codes.cpu()[number], expected[number])
    assert codes.cpu()[~number].isnan().all()
    products = expected.float() * scale
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
