"""INT4 with coded scales: worked out by hand, against a slow reference, and refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from autoq.errors import InputError
from autoq.kernels import int4, int4_dq

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_scales_by_hand() -> None:
    # Mean 3, distances -2, -1, 0, 3; the largest is 127 steps, so a step is 3 / 127.
    found = int4_dq.quantize_scales(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert float(found.mean) == 3.0
    torch.testing.assert_close(found.second_scale, torch.tensor([3 / 127]))
    assert found.codes.tolist() == [[-85, -42], [0, 127]]  # -84.67 and -42.33
    expected = torch.tensor([[3 - 85 * 3 / 127, 3 - 42 * 3 / 127], [3.0, 6.0]])
    torch.testing.assert_close(found.values(), expected)


def test_a_scale_that_would_not_be_positive_takes_the_next_code() -> None:
    # Mean 2.000333, a step of 0.02362: 0.001 is -84.65 steps away, and code -85 stands for -0.0074.
    found = int4_dq.quantize_scales(torch.tensor([[0.001, 1.0, 5.0]]))
    assert found.codes.tolist() == [[-84, -42, 127]]
    torch.testing.assert_close(found.values()[0, 0], torch.tensor(2.000333 - 84 * 2.999667 / 127))


def test_equal_scales_and_zero_weights_are_exact() -> None:
    found = int4_dq.quantize_scales(torch.full((3, 5), 0.3))
    assert not found.codes.any() and found.second_scale.tolist() == [2**-24]
    assert torch.equal(found.values(), torch.full((3, 5), 0.3))
    assert not int4_dq.fake_quantize(torch.zeros(4, 128)).any()


def test_blocks_run_on_from_row_to_row_and_the_last_may_be_short() -> None:
    scales = drawn(3, 100).abs() + 0.1
    found = int4_dq.quantize_scales(scales)
    distances = (scales - found.mean).abs().flatten().tolist()
    wanted = [max(distances[:256]) / 127, max(distances[256:]) / 127]
    torch.testing.assert_close(found.second_scale, torch.tensor(wanted))
    steps = torch.tensor([wanted[0]] * 256 + [wanted[1]] * 44).view(3, 100)
    # Half a step, or a whole one where the nearest code stands for nothing positive.
    assert ((found.values() - scales).abs() <= 0.5001 * steps).all()
    assert (found.values() > 0).all()


def slow(weight: Tensor) -> Tensor:
    """Number by number, in Python's own arithmetic but for the scales."""
    scales = int4_dq.quantize_scales(int4.group_scale(weight, 64)).values()
    out = torch.empty(weight.shape)
    for row, column in torch.cartesian_prod(*(torch.arange(n) for n in weight.shape)).tolist():
        scale = scales[row, column // 64]
        code = (weight[row, column].float() / scale).round().clamp(-8, 7)
        out[row, column] = code * scale
    return out.to(weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_rounded_under_the_scales_that_come_out(dtype: torch.dtype) -> None:
    weight = (drawn(5, 192) * torch.tensor([1.0, 0.01, 3.0, 0.0, 1.0])[:, None]).to(dtype)
    packed = int4_dq.quantize(weight)
    assert packed.shape == (5, 192)
    assert torch.equal(int4_dq.dequantize(packed, dtype), slow(weight))
    assert torch.equal(int4_dq.fake_quantize(weight), slow(weight))
    again = int4_dq.pack(int4.unpack(packed.plain()), packed.scales)
    assert torch.equal(again.codes, packed.codes)


def test_bits_are_those_of_the_paper() -> None:
    # "0.127 bits per parameter" beside the codes; the mean is 32 bits once.
    packed = int4_dq.quantize(drawn(512, 1024))
    assert 8 * packed.nbytes == 512 * 1024 * (4 + 8 / 64 + 32 / (64 * 256)) + 32


def test_coded_scales_cost_little() -> None:
    weight = drawn(256, 512)
    plain = (int4.fake_quantize(weight, group_size=64) - weight).norm()
    # Measured 1.0003 on these weights; without the scales' codes it is 1.
    assert (int4_dq.fake_quantize(weight) - weight).norm() < 1.002 * plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_is_that_of_the_dequantised_weight(dtype: torch.dtype) -> None:
    packed, x, bias = int4_dq.quantize(drawn(48, 256)), drawn(3, 7, 256, seed=1), drawn(48, seed=2)
    expected = linear(x.to(dtype), int4_dq.dequantize(packed, dtype), bias.to(dtype))
    assert torch.equal(int4_dq.linear(x.to(dtype), packed, bias.to(dtype)), expected)


def test_misfits_are_refused() -> None:
    packed = int4_dq.quantize(drawn(48, 256))
    for name, wrong in {
        "second_scale": torch.ones(2),
        "mean_scale": torch.ones(1),
        "scale_codes": packed.scale_codes.float(),
    }.items():
        with pytest.raises(InputError):
            int4_dq.dequantize(dataclasses.replace(packed, **{name: wrong}))
    with pytest.raises(InputError, match="64"):
        int4_dq.quantize(drawn(4, 96))
    with pytest.raises(InputError, match="at least one scale"):
        int4_dq.quantize_scales(torch.empty(0, 2))
