"""E2M1 codes of bfloat16 pairs: against the slow reference, value by value."""

import pytest
import torch

from autoq.kernels import mxfp4, mxfp8, nvfp4
from autoq.kernels._mx import ScaleRule
from autoq.kernels._reference import mx as mx_reference
from autoq.kernels._reference import nvfp4 as reference
from autoq.kernels._torch import e2m1_pairs
from autoq.kernels._torch.chunks import bfloat16_block_amax, block_maxima

EVERY_PATTERN = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
FINITE = EVERY_PATTERN[torch.isfinite(EVERY_PATTERN)]
FINITE = FINITE[: len(FINITE) // 16 * 16].view(-1, 16)


def _packed(x: torch.Tensor, step: float) -> torch.Tensor:
    """Codes [.., 8] of blocks of 16 under one step, by the path in question and no other."""

    def refused(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the piece was not taken")

    codes = torch.empty(len(x), 8, dtype=torch.uint8)
    for piece, blocks in e2m1_pairs.blocks(x, 16):
        codes[piece] = blocks.packed(torch.full((blocks.count, 1), step), refused)
    return codes


def _expected(x: torch.Tensor, step: float) -> torch.Tensor:
    return mx_reference.pack(reference.encode(x.float() / torch.tensor(step)))


@pytest.mark.parametrize("step", [1.0, 2.0**16, 2.0**-126, 0.0123, 3.1e-5, 1.0000001, 7.9])
def test_every_finite_pattern_gets_the_code_of_its_quotient(step):
    order = torch.randperm(FINITE.numel(), generator=torch.Generator().manual_seed(0))
    shuffled = FINITE.view(-1)[order].view(-1, 16)
    assert torch.equal(_packed(shuffled, step), _expected(shuffled, step))


def test_values_at_ties_and_beside_them():
    # Multiples of 2**-6 up to 8 hold every tie, 0.25 to 5, and both of its neighbours.
    values = (torch.arange(-512, 512) / 64).bfloat16().view(-1, 16)
    for step in (1.0, 0.5, 3.0):
        assert torch.equal(_packed(values, step), _expected(values, step))


@pytest.mark.parametrize("width", [16, 32])
def test_maxima_are_those_of_the_blocks_and_nan_wins(width):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, width, generator=generator).bfloat16()
    x[3], x[4, 7], x[5, -1] = 0.0, float("nan"), float("-inf")
    x[6] = -0.0
    ((_, blocks),) = e2m1_pairs.blocks(x, width)
    maxima = x.float().abs().amax(-1, keepdim=True)
    assert torch.equal(blocks.amax().nan_to_num(-1.0), maxima.nan_to_num(-1.0))
    assert torch.equal(bfloat16_block_amax(x).nan_to_num(-1.0), maxima.nan_to_num(-1.0))


def test_block_maxima_by_hand():
    values = torch.tensor([3, 9, 1, 2, 0, 0, 0, 7, 5, 4, 8, 6], dtype=torch.int32)
    scratch = torch.full((2, 20), 99, dtype=torch.int32)
    assert block_maxima(values, 4, scratch).tolist() == [[9], [7], [8]]


def _quantised_alike(x: torch.Tensor, scale: torch.Tensor) -> None:
    codes, block_scale = reference.quantize(x, scale)
    ours = nvfp4.quantize(x, scale)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.block_scale.view(torch.uint8), block_scale.view(torch.uint8))
    under = nvfp4.quantize(x, scale, block_scale)
    assert torch.equal(under.codes, codes)


@pytest.mark.parametrize("scale", [2.0**-100, 1e-5, 1.0, 2.0**12, 2.0**30])
def test_nvfp4_of_every_finite_pattern_in_order(scale):
    """In order, a block's values are neighbours; in both signs, subnormals and zeros among them."""
    _quantised_alike(FINITE, torch.tensor(scale))


def test_nan_infinity_and_odd_addresses_among_others():
    generator = torch.Generator().manual_seed(2)
    memory = torch.randn(1 + 40 * 32, generator=generator).bfloat16()
    x = memory[1:].view(40, 32)
    assert x.data_ptr() % 4 == 2
    _quantised_alike(x, torch.tensor(0.01))
    x[7, 3] = float("inf")
    _quantised_alike(x, torch.tensor(0.01))
    x[11, 30] = float("nan")
    packed = nvfp4.quantize(x, torch.tensor(0.01))
    assert packed.block_scale.float().isnan().nonzero().tolist() == [[11, 1]]
    assert packed.codes[11, 8:].tolist() == [0x77] * 8
    codes, _ = reference.quantize(x[:11], torch.tensor(0.01))
    assert torch.equal(packed.codes[:11], codes)


def test_pieces_are_put_together(monkeypatch):
    monkeypatch.setattr(e2m1_pairs, "rows_per_piece", lambda rows: 1)  # four blocks a piece
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert [piece for piece, _ in e2m1_pairs.blocks(x, 16)][-1] == slice(40, 42)
    _quantised_alike(x, torch.tensor(0.002))
    for rule in ScaleRule:
        codes, scale = mx_reference.quantize(x, mx_reference.E2M1, rule)
        ours = mxfp4.quantize(x, rule)
        assert torch.equal(ours.codes, mx_reference.pack(codes))
        assert torch.equal(ours.block_scale, scale)
        assert torch.equal(mxfp4.quantize(x, rule, scale).codes, ours.codes)


@pytest.mark.parametrize("byte", [0, 1, 127, 143, 144, 252, 254])
def test_mxfp4_under_given_bytes(byte):
    x = FINITE.reshape(-1)[: FINITE.numel() // 32 * 32].view(-1, 32)
    scale = torch.full((len(x), 1), byte, dtype=torch.uint8)
    general = mxfp4.quantize(x.float(), ScaleRule.OCP, scale)
    assert torch.equal(mxfp4.quantize(x, ScaleRule.OCP, scale).codes, general.codes)


def test_zero_and_negative_block_scales_take_the_general_path():
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0] * 4]).bfloat16()
    for scale in (0.0, -1.0):
        block_scale = torch.tensor([[scale]]).to(torch.float8_e4m3fn)
        one = torch.tensor(1.0)
        general = nvfp4.quantize(x.float(), one, block_scale)
        assert torch.equal(nvfp4.quantize(x, one, block_scale).codes, general.codes)


_ODD_ROWS = torch.randn(9, 33, generator=torch.Generator().manual_seed(4)).bfloat16()
_NOT_CONTIGUOUS = {
    "transposed": torch.randn(32, 9, generator=torch.Generator().manual_seed(5)).bfloat16().t(),
    "every other column": torch.randn(
        9, 128, generator=torch.Generator().manual_seed(6)
    ).bfloat16()[:, ::2],
    "rows at odd distances": _ODD_ROWS[:, :32],
    "one row of such": _ODD_ROWS[:1, :32],
    "repeated": _ODD_ROWS[:1, :32].expand(5, 32),
}


@pytest.mark.parametrize("name", _NOT_CONTIGUOUS)
def test_weights_that_are_not_contiguous(name):
    x = _NOT_CONTIGUOUS[name]
    _quantised_alike(x, torch.tensor(0.01))
    for module, rule in ((mxfp4, ScaleRule.OCP), (mxfp8, ScaleRule.UP)):
        ours, general = module.quantize(x, rule), module.quantize(x.float().contiguous(), rule)
        assert torch.equal(ours.codes.view(torch.uint8), general.codes.view(torch.uint8))
        assert torch.equal(ours.block_scale, general.block_scale)
