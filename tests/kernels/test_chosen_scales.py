"""Block scales chosen by the error they leave: hand-computed blocks, brute force, one result everywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.errors import InputError
from autoq.kernels import int4, nvfp4
from autoq.kernels._reference import fp8 as reference_fp8
from autoq.kernels._reference import int4 as reference_int4
from autoq.kernels._reference import nvfp4 as reference
from autoq.kernels._torch.chosen_scales import INT4_FACTORS, NVFP4_OFFSETS, _best

ONE = torch.tensor(1.0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block(*values):
    return torch.tensor([[*values, *[0.0] * (16 - len(values))]])


def weighted_error(values, exact, importance):
    return ((values - exact).double().square() * importance.double()).sum()


@pytest.mark.parametrize(
    ("values", "scale", "result"),
    [
        # Scale 1 makes 5 a tie that goes to 4, an error of 1. Under 1.25 the codes are 4.8 -> 4
        # and 4 -> 4: 6 is lost. Under 1.5 they are 4 and 3.33: 6 and 4.5, 0.25 in all.
        ((6.0, 5.0), 1.5, (6.0, 4.5)),
        # Four sixths of the range: 4.5 and 6 are 3 and 4 times 1.5, nothing is lost.
        ((6.0, 4.5), 1.5, (6.0, 4.5)),
        # All codes fit: the scale of the maximum stays.
        ((6.0, 4.0, 3.0), 1.0, (6.0, 4.0, 3.0)),
        # 7 / 6 rounds to 1.125: 6.75. Under 1.75, 7 is 4.
        ((7.0, 3.5), 1.75, (7.0, 3.5)),
        ((0.0, 0.0), 1.0, (0.0, 0.0)),
    ],
)
def test_scales_of_hand_computed_blocks(values, scale, result):
    x, importance = block(*values), torch.ones(16)
    chosen = nvfp4.choose_block_scale(x, ONE, importance)
    assert chosen.dtype is torch.float8_e4m3fn
    assert chosen.float().tolist() == [[scale]]
    assert nvfp4.fake_quantize(x, ONE, chosen)[0, : len(result)].tolist() == list(result)


def test_what_matters_little_is_clipped():
    # The amax, 6.6, alone would have the scale 1.125; a scale of 1 keeps all that counts.
    x = block(6.6, 4.0, 3.0, 1.0, 0.5)
    importance = torch.ones(16)
    importance[0] = 1e-6
    chosen = nvfp4.choose_block_scale(x, ONE, importance)
    assert chosen.float().item() == 1.0
    assert nvfp4.fake_quantize(x, ONE, chosen)[0, :5].tolist() == [6.0, 4.0, 3.0, 1.0, 0.5]
    assert nvfp4.quantize(x, ONE).block_scale.float().item() == 1.125


def test_channels_that_are_never_seen_keep_the_scale_of_the_maximum():
    x = normal(4, 64)
    chosen = nvfp4.choose_block_scale(x, ONE, torch.zeros(64))
    assert torch.equal(chosen.float(), nvfp4.quantize(x, ONE).block_scale.float())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), power=st.integers(-9, 9))
def test_nvfp4_scales_are_the_best_of_all_that_are_tried(seed, power):
    x = normal(3, 32, seed=seed) * 2.0**power
    importance = normal(32, seed=seed + 1).square() ** 2
    scale = nvfp4.global_scale(x.abs().max())
    chosen = nvfp4.choose_block_scale(x, scale, importance)
    base = reference.block_scale(x.view(3, 2, 16).abs().amax(-1), scale)
    base = base.view(torch.uint8).int()
    errors = []
    for offset in (0, *NVFP4_OFFSETS):
        codes = (base + offset).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn)
        step = (reference_fp8.decode(codes) * scale)[..., None]
        values = reference.decode(reference.encode(x.view(3, 2, 16) / step)) * step
        weights = importance.view(2, 16)
        errors.append(((values - x.view(3, 2, 16)).double().square() * weights).sum(-1))
    values = nvfp4.fake_quantize(x, scale, chosen)
    found = ((values - x).view(3, 2, 16).double().square() * importance.view(2, 16)).sum(-1)
    # float32 sums of sixteen errors decide among candidates that float64 sums order alike
    torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=1e-5, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_int4_scales_are_the_best_of_all_that_are_tried(seed):
    weight = normal(3, 64, seed=seed)
    importance = normal(64, seed=seed + 1).square() ** 2
    chosen = int4.choose_group_scale(weight, importance, 32, storage_dtype=torch.bfloat16)
    assert torch.equal(chosen, chosen.bfloat16().float())
    base = reference_int4.group_scale(weight, 32, torch.bfloat16)
    errors = []
    for factor in (1.0, *INT4_FACTORS):
        scale = (base * factor).bfloat16().float()
        values = reference_int4.values(reference_int4.codes(weight, scale), scale)
        squares = (values - weight).double().square() * importance
        errors.append(squares.view(3, 2, 32).sum(-1))
    squares = (int4.fake_quantize(weight, chosen) - weight).double().square() * importance
    found = squares.view(3, 2, 32).sum(-1)
    # float32 sums decide among candidates that float64 sums order alike
    torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=1e-5, atol=0)


def test_int4_clips_by_hand():
    # amax / 7 is 2: the seven small values, 1 each, round to 0 (ties to even), an error of 7. Under
    # 1.9 they are 1.9, and 14 is 13.3: 5.67 + 0.49. Under 1.8 it is 4.48 + 1.96, more. Half of the
    # scale, 1, keeps them and clips 14 to 7, an error of 49: worth it only if 14 hardly counts.
    weight = torch.tensor([[14.0, *[1.0] * 7]])
    even = torch.ones(8)
    assert int4.choose_group_scale(weight, even, 8) == 2 * torch.tensor(0.95)
    importance = even.clone()
    importance[0] = 1e-3
    assert int4.choose_group_scale(weight, importance, 8).item() == 1.0
    assert int4.choose_group_scale(weight, torch.zeros(8), 8).item() == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_and_fake_quantized_are_the_same_bits(dtype):
    x, importance = normal(5, 96).to(dtype), normal(96, seed=1).square()
    scale = nvfp4.global_scale(x.abs().max())
    chosen = nvfp4.choose_block_scale(x, scale, importance)
    packed = nvfp4.quantize(x, scale, chosen)
    assert torch.equal(packed.block_scale.view(torch.uint8), chosen.view(torch.uint8))
    assert torch.equal(nvfp4.dequantize(packed, dtype), nvfp4.fake_quantize(x, scale, chosen))


def test_pieces_and_threads_choose_the_same():
    x, importance = normal(700, 512), normal(512, seed=1).square()
    scale = nvfp4.global_scale(x.abs().max())
    whole = nvfp4.choose_block_scale(x, scale, importance)
    rows = [nvfp4.choose_block_scale(x[start : start + 7], scale, importance) for start in (0, 350)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        single = nvfp4.choose_block_scale(x, scale, importance)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole.float(), single.float())
    assert torch.equal(whole[:7].float(), rows[0].float())
    assert torch.equal(whole[350:357].float(), rows[1].float())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nvfp4.choose_block_scale(normal(2, 32), ONE, torch.ones(16)), "importance"),
        (lambda: nvfp4.choose_block_scale(normal(2, 32), ONE, torch.ones(32).double()), "float32"),
        (lambda: nvfp4.choose_block_scale(normal(32), ONE, torch.ones(32)), "x must"),
        (lambda: int4.choose_group_scale(normal(2, 32), torch.ones(2), 16), "importance"),
        (lambda: nvfp4.quantize(normal(2, 32), ONE, torch.ones(2, 2)), "block_scale"),
        (
            lambda: nvfp4.fake_quantize(normal(2, 32), ONE, torch.ones(2).to(torch.float8_e4m3fn)),
            "block_scale",
        ),
    ],
)
def test_refusals_name_the_operand(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_even_importance_is_as_good_as_none_and_doubling_changes_nothing():
    x = normal(5, 64)
    scale = nvfp4.global_scale(x.abs().max())
    twice = nvfp4.choose_block_scale(x, scale, torch.full((64,), 2.0))
    assert torch.equal(nvfp4.choose_block_scale(x, scale, torch.ones(64)).float(), twice.float())
    groups = int4.choose_group_scale(x, torch.full((64,), 2.0), 32)
    assert torch.equal(int4.choose_group_scale(x, torch.ones(64), 32), groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_without_an_error_to_compare_keep_their_scale(dtype):
    x = normal(4, 32).to(dtype)
    x[1, 3], x[2, 20] = float("nan"), float("-inf")
    before = x.clone()
    kept = nvfp4.quantize(x, ONE).block_scale.view(torch.uint8)
    for importance in (torch.ones(32), torch.zeros(32)):
        chosen = nvfp4.choose_block_scale(x, ONE, importance).view(torch.uint8)
        assert chosen[1, 0] == kept[1, 0] == 0x7F
        assert chosen[2, 1] == kept[2, 1] == 0x7E
    assert torch.equal(x.nan_to_num(0.0), before.nan_to_num(0.0))


def test_of_equal_errors_the_first_is_taken_and_nan_is_never_the_best():
    errors = torch.tensor(
        [
            [2.0, 1.0, torch.nan, 3.0, 0.0, torch.inf],
            [1.0, 1.0, 0.0, torch.nan, 0.0, torch.inf],
            [1.0, 2.0, 0.0, 2.0, -0.0, torch.inf],
        ]
    )
    candidates = torch.tensor([[10], [11], [12]]).expand(3, 6)
    chosen = _best(candidates, lambda number: errors[number])
    assert chosen.tolist() == [11, 10, 10, 12, 10, 10]


def test_nan_of_all_bits_as_the_first_error_keeps_the_first_scale():
    """Errors are compared as integers: this one's is the largest there is."""
    every_bit = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    errors = [every_bit, every_bit, torch.tensor([0.5])]
    candidates = torch.tensor([[1.0], [2.0], [3.0]])
    assert _best(candidates, errors.__getitem__).tolist() == [1.0]


def test_int4_scales_of_a_matrix_with_nan_are_chosen_as_without_it_elsewhere():
    weight = normal(4, 64)
    expected = int4.choose_group_scale(weight, torch.ones(64), 16)
    weight[1, 5] = float("nan")
    found = int4.choose_group_scale(weight, torch.ones(64), 16)
    assert found[1, 0].isnan()
    found[1, 0] = expected[1, 0]
    assert torch.equal(found, expected)
