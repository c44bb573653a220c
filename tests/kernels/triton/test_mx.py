"""MXFP8 and MXFP4 element-wise kernels: the bits of the torch body, which test_mx.py proves."""

import math

import pytest
import torch

from autoq.kernels._launch import mx as launch
from autoq.kernels._mx import E2M1, E4M3, MXTensor, ScaleRule
from autoq.kernels._torch import mx as body
from autoq.kernels.targets import TARGETS

ELEMENTS = pytest.mark.parametrize("element", [E4M3, E2M1], ids=["mxfp8", "mxfp4"])
# Conversions of E4M3 in software, in hardware.
SOFTWARE_AND_HARDWARE = pytest.mark.parametrize("target", ["sm_80", "sm_90"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def _hostile_values(blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """Blocks of all magnitudes, ties, zeros of both signs, subnormals, infinity, NaN."""
    generator = torch.Generator().manual_seed(blocks)
    x = torch.randn(blocks, 32, generator=generator)
    x[1::4] *= torch.exp2(torch.randint(-149, 127, (len(x[1::4]), 1), generator=generator).float())
    x[2::4] = (x[2::4] * 16).round() * 0.25
    x[3::16] = 0.0
    x[3::32] = -0.0
    x[5::16, 7] = math.nan
    x[6::16, 9] = -math.inf
    x[7::16] *= 2.0 ** -torch.arange(32.0)
    return x.to(dtype)


def _same(actual, expected, assert_same_bits):
    """Bits, but for those of NaN: targets and libraries make different ones."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@SOFTWARE_AND_HARDWARE
@ELEMENTS
@DTYPES
@pytest.mark.parametrize("rule", ScaleRule)
@pytest.mark.parametrize("blocks", [1, 128, 333])
def test_codes_scales_and_values(
    blocks, rule, dtype, element, target, device, guard, assert_same_bits
):
    target = TARGETS[target]
    x = guard.copy(_hostile_values(blocks, dtype).to(device).reshape(1, -1, 32))
    codes, scale = launch.quantize(x, element, rule, target=target)
    expected_codes, expected_scale = body.quantize(x, element, rule)
    assert_same_bits(scale, expected_scale)
    assert_same_bits(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    values = launch.dequantize(MXTensor(codes, scale), dtype, target=target)
    expected = body.dequantize(codes, scale, element, dtype)
    _same(values, expected, assert_same_bits)
    fake = launch.fake_quantize(x, element, rule, target=target)
    _same(fake, body.fake_quantize(x, element, rule), assert_same_bits)
    _same(fake, expected, assert_same_bits)


@SOFTWARE_AND_HARDWARE
@ELEMENTS
@DTYPES
def test_every_code_under_every_scale(dtype, element, target, device, guard, assert_same_bits):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).reshape(256, -1)
    codes = guard.copy(codes.to(device)).view(element.dtype)
    scale = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    blocks = codes.numel() * element.codes_per_byte // 32 // 256
    packed = MXTensor(codes, guard.copy(scale.expand(-1, blocks)))
    values = launch.dequantize(packed, dtype, target=TARGETS[target])
    expected = body.dequantize(packed.codes, packed.block_scale, element, dtype)
    _same(values, expected, assert_same_bits)


@ELEMENTS
def test_rows_that_are_not_contiguous_and_none_at_all(element, device, assert_same_bits):
    target = TARGETS["sm_90"]
    x = torch.randn(64, 6, device=device).t()
    codes, scale = launch.quantize(x, element, ScaleRule.OCP, target=target)
    expected_codes, expected_scale = body.quantize(x, element, ScaleRule.OCP)
    assert_same_bits(scale, expected_scale)
    assert_same_bits(codes.view(torch.uint8), expected_codes.view(torch.uint8))
    for shape in [(0, 64), (3, 0)]:
        empty = torch.empty(shape, device=device)
        codes, scale = launch.quantize(empty, element, ScaleRule.OCP, target=target)
        packed = MXTensor(codes, scale)
        assert packed.shape == shape
        assert launch.dequantize(packed, torch.bfloat16, target=target).shape == shape
        assert launch.fake_quantize(empty, element, ScaleRule.OCP, target=target).shape == shape
