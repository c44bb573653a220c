"""INT4 kernels, two-level ones included: the bits of the torch body, proved in tests/kernels."""

import math

import pytest
import torch

from autoq.kernels import int4, w4a8
from autoq.kernels._launch import int4 as launch
from autoq.kernels._torch import int4 as body
from autoq.kernels._torch import w4a8 as two_level_body
from autoq.kernels.targets import TARGETS

TARGET = TARGETS["sm_90"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [N, K] and group size: groups of every kind of size, programs that are not full.
SHAPES = [((1, 2), 2), ((3, 36), 12), ((7, 384), 128), ((65, 128), 64), ((2, 6000), 6000)]
TENSOR_SCALE = 0.0123


@pytest.fixture
def hostile_weight(device):
    """(shape, group size, dtype): groups of all magnitudes, ties, zeros of both signs, NaN, inf."""

    def make(shape: tuple[int, int], group_size: int, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(11)
        groups = torch.randn(shape, generator=generator).reshape(-1, group_size)
        groups *= torch.logspace(-12, 9, len(groups))[:, None]
        if len(groups) > 16:
            groups[::16] = (torch.arange(group_size) % 29 - 14) * 0.5
            groups[::16, 0] = 7.0
            groups[1] = 0.0
            groups[2, ::2] = -0.0
            groups[3] = 1e-41
            groups[4] = 3e38
            groups[5, -1] = math.nan
            groups[6, 1] = -math.inf
        return groups.reshape(shape).to(device, dtype)

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "group_size"), SHAPES, ids=str)
def test_quantize(shape, group_size, dtype, storage_dtype, hostile_weight, assert_same_bits):
    weight = hostile_weight(shape, group_size, dtype)
    expected = body.group_scale(weight, group_size, storage_dtype)
    codes, scale = launch.quantize(weight, None, group_size, storage_dtype, target=TARGET)
    _assert_same_but_for_nan(scale, expected, assert_same_bits)
    finite = expected.isfinite() & (expected < 1e38)
    given, same_scale = launch.quantize(weight, expected, group_size, torch.float32, target=TARGET)
    assert same_scale is expected
    for actual in (codes, given):
        wanted = body.quantize(weight, expected)
        kept = finite.repeat_interleave(group_size // 2, dim=1)
        assert_same_bits(actual[kept], wanted[kept])


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize(("shape", "group_size"), SHAPES, ids=str)
def test_fake_quantize(
    shape, group_size, given, levels, target, hostile_weight, device, assert_same_bits
):
    for dtype in DTYPES:
        weight = hostile_weight(shape, group_size, dtype)
        scale = body.group_scale(weight, group_size, torch.bfloat16)
        tensor_scale = torch.tensor(TENSOR_SCALE, device=device) if levels == 2 else None
        actual = launch.fake_quantize(
            weight,
            scale if given else None,
            tensor_scale,
            group_size,
            torch.bfloat16,
            target=TARGETS[target],
        )
        if tensor_scale is None:
            expected = body.fake_quantize(weight, scale)
        else:
            expected = two_level_body.fake_quantize(weight, scale, tensor_scale)
        _assert_same_but_for_nan(actual, expected, assert_same_bits)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(("shape", "group_size"), SHAPES, ids=str)
def test_dequantize(shape, group_size, levels, dtype, target, device, assert_same_bits):
    codes, scale = _packed(shape, group_size, device)
    if levels == 1:
        actual = launch.dequantize(codes, scale, None, dtype, target=TARGETS[target])
        assert_same_bits(actual, body.dequantize(codes, scale, dtype))
        return
    for tensor_scale in (TENSOR_SCALE, 3e-7, 1e4):
        tensor_scale = torch.tensor(tensor_scale, device=device)
        actual = launch.dequantize(codes, scale, tensor_scale, dtype, target=TARGETS[target])
        expected = two_level_body.dequantize(codes, scale, tensor_scale, dtype)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(("shape", "group_size"), SHAPES, ids=str)
def test_largest_value(shape, group_size, device, assert_same_bits):
    codes, scale = _packed(shape, group_size, device)
    found = launch.largest(codes, scale, target=TARGET)
    assert_same_bits(found.amax(), body.scaled(codes, scale).abs().amax())
    scale[0, 0] = math.nan
    assert launch.largest(codes, scale, target=TARGET).amax().isnan()


def test_empty_weights():
    weight = torch.empty(0, 128)
    codes, scale = launch.quantize(weight, None, 128, torch.float32, target=TARGET)
    assert (codes.shape, scale.shape) == ((0, 64), (0, 1))
    values = launch.dequantize(codes, scale, None, torch.float32, target=TARGET)
    assert values.shape == weight.shape
    fake = launch.fake_quantize(weight, None, None, 128, torch.float32, target=TARGET)
    assert fake.shape == weight.shape
    assert launch.largest(codes, scale, target=TARGET).shape == (0,)


def test_strided_operands(device, assert_same_bits):
    weight = torch.randn(256, 6, device=device).t()
    codes, scale = launch.quantize(weight, None, 128, torch.float32, target=TARGET)
    assert_same_bits(codes, body.quantize(weight, scale))
    turned, turned_scale = codes.t().contiguous().t(), scale.t().contiguous().t()
    values = launch.dequantize(turned, turned_scale, None, torch.float32, target=TARGET)
    assert_same_bits(values, body.dequantize(codes, scale, torch.float32))
    fake = launch.fake_quantize(weight, turned_scale, None, 128, torch.float32, target=TARGET)
    assert_same_bits(fake, values)


def _packed(
    shape: tuple[int, int], group_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """All codes, -8 too, under scales of which some are outside of float16."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = shape
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
    scale = torch.randn(rows, columns // group_size, generator=generator).exp2()
    scale.view(-1)[::5] = 70000.0
    scale.view(-1)[1::7] = 3e-8
    return codes.to(device), scale.to(device)


def _assert_same_but_for_nan(actual, expected, assert_same_bits) -> None:
    """NaN has many bits, and which ones a device makes is its own affair."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(actual.nan_to_num(0.5), expected.nan_to_num(0.5))


def test_contracts_launch_what_they_say(device, monkeypatch, assert_same_bits):
    weight = torch.randn(6, 256, generator=torch.Generator().manual_seed(2)).to(device)
    results = []
    for target in (None, TARGET):
        monkeypatch.setattr(int4, "triton_target", lambda device, target=target: target)
        results.append(_contract_results(weight))
    for expected, actual in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def _contract_results(weight: torch.Tensor) -> list[torch.Tensor]:
    scale = int4.group_scale(weight, 64, storage_dtype=torch.float16)
    settings = {"group_size": 64, "storage_dtype": torch.float16}
    packed, two_level = int4.quantize(weight, **settings), w4a8.quantize(weight, **settings)
    given = w4a8.quantize(weight, scale, torch.tensor(0.02))
    return [
        *packed.tensors().values(),
        *two_level.tensors().values(),
        *given.tensors().values(),
        int4.dequantize(packed, torch.bfloat16),
        w4a8.dequantize(two_level, torch.float16),
        int4.fake_quantize(weight, **settings),
        int4.fake_quantize(weight, scale),
        w4a8.fake_quantize(weight, **settings),
        w4a8.fake_quantize(weight, None, torch.tensor(0.02), **settings),
        w4a8.fake_quantize(weight, scale, torch.tensor(0.02)),
    ]
