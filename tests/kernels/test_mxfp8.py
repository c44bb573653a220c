"""MXFP8: values worked out by hand. What it shares with MXFP4 is in test_mx.py."""

import math

import pytest
import torch

from autoq.kernels import mxfp4, mxfp8
from autoq.kernels._reference import mx as reference
from autoq.kernels.mxfp8 import ScaleRule

# amax -> bytes by the OCP rule and rounded up: the exponent of amax, less 8, plus 127; one more
# where the mantissa exceeds 448 / 256 = 1.75.
SCALES = [
    (1.0, 119, 119),
    (1.75, 119, 119),
    (1.7500001, 119, 120),
    (2.0, 120, 120),
    (6.0, 121, 121),
    (7.0, 121, 121),
    (7.5, 121, 122),
    (448.0, 127, 127),
    (449.0, 127, 128),
    (511.9, 127, 128),
    (512.0, 128, 128),
    (2.0**-119, 0, 0),
    (1.8 * 2.0**-119, 0, 1),
    (2.0**-118, 1, 1),
    (2.0**-126, 0, 0),
    (2.0**-149, 0, 0),
    (0.0, 0, 0),
    (2.0**127, 246, 246),
    (1.9 * 2.0**127, 246, 246),  # one more would overflow
    (1.9 * 2.0**126, 245, 246),
    (math.inf, 255, 255),
    (math.nan, 255, 255),
]

# value in a block whose maximum is 448, so that its scale is 1 -> byte.
ENCODED = [
    (448.0, 0x7E),
    (432.0, 0x7E),  # tie between 416 and 448
    (400.0, 0x7C),  # tie between 384 and 416
    (17.0, 0x58),  # tie between 16 and 18
    (1.0, 0x38),
    (1.0625, 0x38),  # tie
    (1.1875, 0x3A),  # tie
    (-0.3, 0xAA),
    (0.015625, 0x08),
    (2.0**-9, 0x01),
    (1.5 * 2.0**-9, 0x02),  # tie
    (2.0**-10, 0x00),  # tie
    (-(2.0**-10), 0x80),
    (1e-30, 0x00),
    (0.0, 0x00),
    (-0.0, 0x80),
]


@pytest.mark.parametrize(("amax", "ocp", "up"), SCALES, ids=[str(row[0]) for row in SCALES])
def test_scale_by_hand(amax, ocp, up):
    block = torch.tensor([0.0] * 31 + [-amax])
    for rule, byte in ((ScaleRule.OCP, ocp), (ScaleRule.UP, up)):
        assert mxfp8.quantize(block, rule).block_scale.tolist() == [byte]
        assert reference.scale_byte(abs(block[31].item()), reference.E4M3, rule) == byte


@pytest.mark.parametrize("family", [mxfp8, mxfp4], ids=["mxfp8", "mxfp4"])
@pytest.mark.parametrize(
    ("amax", "exponent"),
    [(1.0, 0), (1.7499999, 0), (1.75, 1), (1.9, 1), (3.49, 1), (3.5, 2), (7.0, 3), (448.0, 9)],
)
def test_the_rule_of_compressed_tensors_doubles_from_mantissa_1_75_on(family, amax, exponent):
    largest = {mxfp8: 8, mxfp4: 2}[family]
    block = torch.tensor([0.0] * 31 + [amax])
    packed = family.quantize(block, ScaleRule.HALF)
    assert packed.block_scale.tolist() == [127 + exponent - largest]


@pytest.mark.parametrize(("value", "byte"), ENCODED, ids=[str(row[0]) for row in ENCODED])
@pytest.mark.parametrize("exponent", [-126, -60, 0, 60, 119])
def test_code_by_hand_under_every_scale(value, byte, exponent):
    block = torch.tensor([448.0, value] + [0.0] * 30) * 2.0**exponent
    packed = mxfp8.quantize(block)
    assert packed.block_scale.tolist() == [127 + exponent]
    assert packed.codes.view(torch.uint8)[:3].tolist() == [0x7E, byte, 0]


def test_above_448_saturates_under_the_ocp_rule_and_not_rounded_up():
    block = torch.tensor([511.0, -480.0, 464.0, 1.0] + [0.0] * 28)
    assert mxfp8.fake_quantize(block)[:4].tolist() == [448.0, -448.0, 448.0, 1.0]
    assert mxfp8.fake_quantize(block, ScaleRule.UP)[:4].tolist() == [512.0, -480.0, 448.0, 1.0]


def test_every_code_decodes_by_hand():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.full((8,), 126, dtype=torch.uint8)
    values = mxfp8.dequantize(mxfp8.MXFP8Tensor(codes, scale))
    for byte, value in enumerate(values.tolist()):
        exponent, mantissa = (byte >> 3) & 0xF, byte & 7
        magnitude = (1 + mantissa / 8) * 2.0 ** (exponent - 8) if exponent else mantissa * 2.0**-10
        if byte & 0x7F == 0x7F:
            assert math.isnan(value)
        else:
            assert value == (-magnitude if byte & 0x80 else magnitude)
    assert values[0x80].signbit()


def test_the_smallest_values_survive():
    x = torch.tensor([2.0**-136, -(2.0**-137), 1.5 * 2.0**-137] + [2.0**-120] * 29)
    assert mxfp8.fake_quantize(x)[:3].tolist() == [2.0**-136, -0.0, 2.0**-136]
