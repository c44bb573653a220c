"""MXFP4: values worked out by hand. What it shares with MXFP8 is in test_mx.py."""

import math

import pytest
import torch

from autoq.kernels import mxfp4
from autoq.kernels._reference import mx as reference
from autoq.kernels.mxfp4 import ScaleRule

# amax -> bytes by the OCP rule and rounded up: the exponent of amax, less 2, plus 127; one more
# where the mantissa exceeds 6 / 4 = 1.5.
SCALES = [
    (1.0, 125, 125),
    (1.5, 125, 125),
    (1.5000001, 125, 126),
    (1.75, 125, 126),
    (3.49, 126, 127),
    (4.0, 127, 127),
    (6.0, 127, 127),
    (7.0, 127, 128),
    (7.9, 127, 128),
    (8.0, 128, 128),
    (2.0**-125, 0, 0),
    (1.8 * 2.0**-125, 0, 1),
    (2.0**-124, 1, 1),
    (2.0**-149, 0, 0),
    (0.0, 0, 0),
    (2.0**127, 252, 252),
    (1.9 * 2.0**127, 252, 252),  # one more would overflow
    (1.9 * 2.0**126, 251, 252),
    (math.inf, 255, 255),
    (math.nan, 255, 255),
]

# magnitude in a block whose maximum is 6, so that its scale is 1 -> (code, value): every code,
# every tie, both neighbours of every tie.
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
    (7.9, 7, 6.0),
]


def _codes(packed: mxfp4.MXFP4Tensor) -> list[int]:
    return reference.unpack(packed.codes).flatten().tolist()


@pytest.mark.parametrize(("amax", "ocp", "up"), SCALES, ids=[str(row[0]) for row in SCALES])
def test_scale_by_hand(amax, ocp, up):
    block = torch.tensor([0.0] * 31 + [-amax])
    for rule, byte in ((ScaleRule.OCP, ocp), (ScaleRule.UP, up)):
        assert mxfp4.quantize(block, rule).block_scale.tolist() == [byte]
        assert reference.scale_byte(abs(block[31].item()), reference.E2M1, rule) == byte


@pytest.mark.parametrize(("magnitude", "code", "value"), ROUNDED, ids=[str(r[0]) for r in ROUNDED])
@pytest.mark.parametrize("exponent", [-100, 0, 124])
def test_code_by_hand_under_every_scale(magnitude, code, value, exponent):
    factor = 2.0**exponent
    block = torch.tensor([6.0, magnitude, -magnitude] + [0.0] * 29) * factor
    packed = mxfp4.quantize(block)
    assert packed.block_scale.tolist() == [127 + exponent]
    assert _codes(packed)[:3] == [7, code, code + 8 if magnitude else 0]
    expected = [6.0 * factor, value * factor, -value * factor]
    assert mxfp4.fake_quantize(block)[:3].tolist() == expected
    assert mxfp4.dequantize(packed)[:3].tolist() == expected


def test_above_6_saturates_under_the_ocp_rule_and_not_rounded_up():
    block = torch.tensor([7.9, -7.0, 5.5, 1.0] + [0.0] * 28)
    assert mxfp4.fake_quantize(block)[:4].tolist() == [6.0, -6.0, 6.0, 1.0]
    assert mxfp4.fake_quantize(block, ScaleRule.UP)[:4].tolist() == [8.0, -8.0, 6.0, 1.0]


def test_every_code_decodes_by_hand():
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, dtype=torch.uint8)
    packed = mxfp4.MXFP4Tensor(codes, torch.tensor([126], dtype=torch.uint8))
    magnitudes = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    values = mxfp4.dequantize(packed)
    assert values.tolist() == [*magnitudes, *(-magnitude for magnitude in magnitudes)] * 2
    assert values[8].signbit() and not values[0].signbit()


def test_negative_zero_becomes_zero_and_small_negatives_negative_zero(assert_same_bits):
    block = torch.tensor([6.0, -0.0, -0.1, 0.1] + [0.0] * 28)
    assert _codes(mxfp4.quantize(block))[:4] == [7, 0, 8, 0]
    expected = torch.tensor([6.0, 0.0, -0.0, 0.0] + [0.0] * 28)
    assert_same_bits(mxfp4.fake_quantize(block), expected)


def test_packing_agrees_with_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    utils = pytest.importorskip("compressed_tensors.quantization.utils.mxfp_utils")
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2))
    packed = mxfp4.quantize(x)
    step = torch.exp2(packed.block_scale.float() - 127).repeat_interleave(32, dim=1)
    values = mxfp4.dequantize(packed)
    assert torch.equal(helpers.pack_fp4_to_uint8(values / step), packed.codes)
    # Between the mantissas 1.5 and 1.75 its rule does as OCP, above as UP.
    amax = torch.tensor([4.5, 6.0, 6.9, 7.0, 7.9, 0.015])
    theirs = utils.generate_mx_scales(amax).to(torch.uint8).tolist()
    ours = {
        rule: [mxfp4.quantize(torch.full((32,), value), rule).block_scale.item() for value in amax]
        for rule in ScaleRule
    }
    assert theirs == [*ours[ScaleRule.OCP][:3], *ours[ScaleRule.UP][3:]]
    assert theirs == ours[ScaleRule.HALF]
