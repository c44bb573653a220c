"""INT8 kernels: the bits of the torch body, which tests/kernels/test_int8.py proves."""

import math
from dataclasses import replace

import pytest
import torch

from autoq.kernels import int8
from autoq.kernels._launch import int8 as launch
from autoq.kernels._launch import int8_matmul as launch_matmul
from autoq.kernels._launch.split_k import parts
from autoq.kernels._torch import int8 as body
from autoq.kernels.int8 import LARGEST_K
from autoq.kernels.targets import TARGETS

TARGET = TARGETS["sm_90"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# One column; a part of one block; several rows to a program; rows of several blocks.
SHAPES = [(1, 1), (7, 129), (37, 517), (3, 8192), (3, 20001)]


def _values(shape, dtype, device):
    """Every scale of magnitude, rows of zeros, ties."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.logspace(-6, 4, shape[1])
    x[shape[0] // 2] = 0.0
    x[-1] = torch.arange(shape[1]) % 255 / 2 - 63.5
    x[-1, 0] = 127.0
    return x.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_are_those_of_the_torch_body(shape, dtype, device, assert_same_bits):
    x = _values(shape, dtype, device)
    for given in (None, torch.logspace(-3, 3, shape[0], device=device)[:, None]):
        codes, scale = launch.quantize(x, given, target=TARGET)
        expected_codes, expected_scale = body.quantize(x, given)
        assert_same_bits(scale, expected_scale)
        assert torch.equal(codes, expected_codes)
        fake = launch.fake_quantize(x, given, target=TARGET)
        assert_same_bits(fake, body.fake_quantize(x, given))
        assert_same_bits(launch.dequantize(codes, scale, dtype, target=TARGET), fake)


@pytest.mark.parametrize("columns", [3, 9000])
def test_rows_that_are_not_finite(columns, device):
    x = torch.ones(4, columns, device=device)
    x[0, -1], x[1, 0], x[2, 1] = math.nan, math.inf, -math.inf
    for given in (None, torch.full((4, 1), 0.5, device=device)):
        codes, scale = launch.quantize(x, given, target=TARGET)
        expected_codes, expected_scale = body.quantize(x, given)
        assert torch.equal(codes, expected_codes)
        torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
        fake = launch.fake_quantize(x, given, target=TARGET)
        expected = body.fake_quantize(x, given)
        torch.testing.assert_close(fake, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("amax", [1e-45, 1e-37, 127 * 2.0**-100, 3e-29, 1e38])
def test_tiny_and_huge_rows(amax, device, assert_same_bits):
    x = torch.linspace(-1, 1, 200, device=device)[None, :] * amax
    codes, scale = launch.quantize(x, None, target=TARGET)
    expected_codes, expected_scale = body.quantize(x, None)
    assert_same_bits(scale, expected_scale)
    assert torch.equal(codes, expected_codes)


def test_every_midpoint_between_codes_goes_to_the_even_one(device):
    midpoints = (torch.arange(-127, 127, device=device) + 0.5)[None, :]
    codes, _ = launch.quantize(midpoints, torch.ones(1, 1, device=device), target=TARGET)
    assert torch.equal(codes, midpoints.round().to(torch.int8))


def test_operands_with_strides_and_leading_dimensions(device, assert_same_bits):
    x = _values((40, 60), torch.bfloat16, device).t()[:, ::2].unflatten(0, (3, 20))
    codes, scale = launch.quantize(x, None, target=TARGET)
    expected_codes, expected_scale = body.quantize(x, None)
    assert codes.shape == (3, 20, 20)
    assert torch.equal(codes, expected_codes)
    assert_same_bits(scale, expected_scale)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty_operands(shape, device):
    x = torch.empty(shape, device=device)
    codes, scale = launch.quantize(x, None, target=TARGET)
    assert (codes.shape, scale.shape) == (shape, (shape[0], 1))
    assert launch.fake_quantize(x, None, target=TARGET).shape == shape
    assert launch.dequantize(codes, scale, torch.float32, target=TARGET).shape == shape


def _operands(m, n, k, device):
    generator = torch.Generator().manual_seed(m + n + k)
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    a_scale = torch.rand(m, 1, generator=generator) + 0.01
    b_scale = torch.rand(n, 1, generator=generator) + 0.01
    return tuple(tensor.to(device) for tensor in (a, a_scale, b, b_scale))


# Decoding in one part and in several, prefill; tails of M, N and K, rows that are not aligned.
PRODUCTS = [
    (1, 1, 1),
    (1, 130, 4096),
    (5, 66, 2064),
    (17, 200, 100),
    (64, 70, 1040),
    (130, 300, 208),
]


@pytest.mark.parametrize("name", ["sm_90", "sm_80"])
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_products_have_the_bits_of_the_torch_body(shape, name, device, assert_same_bits):
    operands = _operands(*shape, device)
    bias = torch.randn(shape[1], device=device).bfloat16()
    for offset, out_dtype in ((bias, torch.float32), (None, torch.bfloat16), (bias, torch.float16)):
        out = launch_matmul.matmul(*operands, offset, out_dtype, target=TARGETS[name])
        assert_same_bits(out, body.matmul(*operands, offset, out_dtype))


def test_a_product_is_cut_along_k_where_rows_are_few(device):
    operands = _operands(3, 130, 4096, device)
    target = TARGETS["sm_90"]
    assert parts(3, 130, 4096, block_m=16, block_n=64) == 8
    tile = replace(launch_matmul.tiles(target, 3)[0], split_k=8)
    whole = launch_matmul.matmul(*operands, None, torch.float32, target=target)
    cut = launch_matmul.matmul(*operands, None, torch.float32, target=target, tile=tile)
    assert torch.equal(whole, cut)


def test_the_longest_rows_of_the_largest_codes_sum_exactly(device):
    codes = torch.full((1, LARGEST_K), -128, dtype=torch.int8, device=device)
    one = torch.ones(1, 1, device=device)
    out = launch_matmul.matmul(codes, one, codes, one, None, torch.float32, target=TARGET)
    assert out.item() == torch.tensor(LARGEST_K * 128**2).float().item()


def test_products_of_operands_with_strides_and_leading_dimensions(device, assert_same_bits):
    a, a_scale, b, b_scale = _operands(24, 30, 64, device)
    strided = (a.t().contiguous().t().unflatten(0, (4, 6)), a_scale.unflatten(0, (4, 6)))
    weight = (b.t().contiguous().t(), b_scale.expand(30, 2)[:, :1])
    out = launch_matmul.matmul(*strided, *weight, None, torch.float32, target=TARGET)
    assert out.shape == (4, 6, 30)
    assert_same_bits(out, body.matmul(*strided, *weight, None, torch.float32))


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0)], ids=str)
def test_empty_products(shape, device):
    operands = _operands(*shape, device)
    bias = torch.arange(shape[1], device=device).float()
    out = launch_matmul.matmul(*operands, bias, torch.float32, target=TARGET)
    assert torch.equal(out, bias.expand(shape[:2]))


def test_the_public_functions_launch_these_kernels(device, monkeypatch, assert_same_bits):
    x, weight = _values((5, 48), torch.bfloat16, device), _values((7, 48), torch.float32, device)
    bias = torch.arange(7.0, device=device)
    given = torch.full((5, 1), 0.5, device=device)
    expected = [
        *int8.quantize(x.cpu(), given.cpu()).tensors().values(),
        int8.fake_quantize(x.cpu()),
        int8.dequantize(int8.quantize(x.cpu()), torch.float16),
        int8.matmul(
            int8.quantize(x.cpu()),
            int8.quantize(weight.cpu()),
            bias.cpu(),
            out_dtype=torch.bfloat16,
        ),
    ]
    for name in ("quantize", "fake_quantize", "dequantize", "matmul"):
        monkeypatch.setattr(body, name, None)
    monkeypatch.setattr(int8, "triton_target", lambda _: TARGET)
    packed = int8.quantize(weight)
    found = [
        *int8.quantize(x, given).tensors().values(),
        int8.fake_quantize(x),
        int8.dequantize(int8.quantize(x), torch.float16),
        int8.linear(x.view(1, 5, 48), packed, bias).view(5, 7),
    ]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)
