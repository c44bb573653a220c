"""MXFP4 scales chosen by the error they leave: a block by hand, brute force, one result everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.errors import InputError
from autoq.kernels import mxfp4
from autoq.kernels._reference import mx as reference
from autoq.kernels.mxfp4 import ScaleRule


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_block_by_hand() -> None:
    # Doubled from 1.75 * 4 on: under 2 the block is 8, 0 and 2 (0.25 and 0.75 are ties), an error
    # of 1 + 0.25 + 0.25; under 1 it is 6, 0.5 and 1.5, an error of 1.
    x = torch.tensor([[7.0, 0.5, 1.5] + [0.0] * 29])
    assert mxfp4.quantize(x, ScaleRule.HALF).block_scale.tolist() == [[128]]
    chosen = mxfp4.choose_block_scale(x, torch.ones(32), ScaleRule.HALF)
    assert chosen.tolist() == [[127]]
    packed = mxfp4.quantize(x, ScaleRule.HALF, chosen)
    assert mxfp4.dequantize(packed)[0, :3].tolist() == [6.0, 0.5, 1.5]
    # Where the small values do not count, the errors are equal, and the rule's own scale stays.
    largest_alone = torch.tensor([1.0] + [0.0] * 31)
    assert mxfp4.choose_block_scale(x, largest_alone, ScaleRule.HALF).tolist() == [[128]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    power=st.integers(-30, 30),  # squares of the errors stay within float32
    rule=st.sampled_from(list(ScaleRule)),
)
def test_the_best_of_all_that_are_tried(seed: int, power: int, rule: ScaleRule) -> None:
    x = normal(3, 64, seed=seed) * 2.0**power
    importance = normal(64, seed=seed + 1).square()
    chosen = mxfp4.choose_block_scale(x, importance, rule)
    blocks, weights = x.view(6, 32).double(), importance.view(2, 32).repeat(3, 1).double()
    for block, weight, byte in zip(blocks, weights, chosen.flatten().tolist(), strict=True):
        own = reference.scale_byte(float(block.abs().max()), reference.E2M1, rule)
        tried = {min(max(own + offset, 0), 252) for offset in (-1, 0, 1)}
        assert byte in tried | {own}

        def error(
            candidate: int, block: torch.Tensor = block, weight: torch.Tensor = weight
        ) -> float:
            scale = reference.decode_scale(candidate)
            codes = reference.E2M1.encode((block / scale).float())
            values = reference.E2M1.decode(codes).double() * scale
            return float(((values - block).square() * weight).sum())

        # Float32 sums of 32 squares: two candidates this close may change places.
        assert error(byte) <= min(map(error, tried)) * (1 + 1e-5)


def test_blocks_of_zeros_and_with_nan_keep_their_bytes() -> None:
    x = torch.zeros(2, 32)
    x[1, 3] = torch.nan
    chosen = mxfp4.choose_block_scale(x, torch.ones(32))
    assert chosen.tolist() == [[0], [255]]
    assert mxfp4.dequantize(mxfp4.quantize(x, block_scale=chosen))[1].isnan().all()


def test_given_scales_give_the_reference_codes() -> None:
    x = normal(4, 96, seed=3).bfloat16()
    own = mxfp4.quantize(x)
    again = mxfp4.quantize(x, block_scale=own.block_scale)
    assert torch.equal(again.codes, own.codes)
    coarser = mxfp4.quantize(x, block_scale=own.block_scale + 1)
    expected = reference.E2M1.encode(
        x.float().view(4, 3, 32) / torch.exp2(own.block_scale.float() - 126)[..., None]
    )
    assert torch.equal(reference.unpack(coarser.codes), expected.view(4, 96))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mxfp4.choose_block_scale(torch.ones(2, 33), torch.ones(33)), "multiple of 32"),
        (lambda: mxfp4.choose_block_scale(torch.ones(2, 32), torch.ones(31)), "importance must"),
        (lambda: mxfp4.choose_block_scale(torch.ones(32), torch.ones(32)), "x must be a matrix"),
        (lambda: mxfp4.quantize(torch.ones(2, 32), block_scale=torch.ones(2, 1)), "must be uint8"),
        (
            lambda: mxfp4.quantize(torch.ones(2, 32), block_scale=torch.ones(1, 1).byte()),
            "must have shape",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
