"""SVDQuant: the best branch of its rank, what it leaves, and what it is good for."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from autoq.calibration import calibrate
from autoq.calibration.svdquant import low_rank_branch, with_branches
from autoq.formats import FORMATS, CalibrationMethod
from autoq.layers import Container, LayerCalibration, LowRank, fake_quantize_weight
from autoq.layers.quantize import coded_weight
from autoq.models import discover, forward_logits, slot_weight
from autoq.testing.tiny_models import make_tiny_model

SVDQUANT = FORMATS["nvfp4_svdquant"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def left_by(branch: LowRank, weight: Tensor, root: Tensor | float = 1.0) -> float:
    return float(((weight - branch.values()) * root).norm())


def test_a_matrix_of_the_branchs_rank_leaves_its_rounding_alone() -> None:
    # Two outer products of powers of two and small integers: bfloat16 holds the factors.
    weight = torch.outer(torch.tensor([4.0, 0, 0, 0]), torch.tensor([1.0, 2, 2, 0]))
    weight += torch.outer(torch.tensor([0.0, 1, 0, 0]), torch.tensor([0.0, 0, 0, 1]))
    branch = low_rank_branch(weight, 2)
    assert branch.down.dtype == branch.up.dtype == torch.bfloat16
    assert (branch.down.shape, branch.up.shape) == ((2, 4), (4, 2))
    torch.testing.assert_close(branch.values(), weight, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("shape", [(192, 320), (320, 192), (48, 40)])
def test_branch_leaves_hardly_more_than_the_exact_decomposition(
    shape: tuple[int, int], rank: int
) -> None:
    weight = drawn(*shape)  # noise has no leading directions to speak of: the hardest case
    least = float(torch.linalg.svdvals(weight)[rank:].norm())
    assert least <= left_by(low_rank_branch(weight, rank), weight) <= 1.002 * least


def test_channels_count_by_their_importance() -> None:
    weight, importance = drawn(64, 96), drawn(96, seed=1).square() + 1e-3
    importance[3] = 0.0  # a channel that no input reached
    root = importance.sqrt()
    weighed = low_rank_branch(weight, 8, importance)
    least = float(torch.linalg.svdvals(weight * root)[8:].norm())
    assert left_by(weighed, weight, root) <= 1.005 * least
    assert left_by(weighed, weight, root) < left_by(low_rank_branch(weight, 8), weight, root)
    assert torch.isfinite(weighed.values()).all()
    assert float(weighed.values()[:, 3].abs().max()) < 10 * float(weight.abs().max())


def test_without_any_input_all_channels_count_alike() -> None:
    weight = drawn(32, 64)
    none, plain = low_rank_branch(weight, 2, torch.zeros(64)), low_rank_branch(weight, 2)
    assert torch.equal(none.down, plain.down) and torch.equal(none.up, plain.up)


def test_zero_weights_have_a_branch_of_zeros() -> None:
    found = with_branches(
        [torch.zeros(32, 64)],
        SVDQUANT,
        LayerCalibration(weight_amax=0.0, input_amax=1.0, importance=torch.ones(64)),
        scale_dtype=torch.bfloat16,
    )
    assert found[0].low_rank is not None
    assert not found[0].low_rank.values().any() and found[0].weight_amax == 0.0


def error_of(weight: Tensor, entry: LayerCalibration, importance: Tensor) -> float:
    coded = fake_quantize_weight(weight, SVDQUANT, entry, scale_dtype=torch.bfloat16)
    branch = entry.low_rank.values() if entry.low_rank is not None else 0.0
    smoothed = weight / entry.pre_quant_scale if entry.pre_quant_scale is not None else weight
    return float(((smoothed - coded - branch).square() * importance).sum())


def test_turns_leave_less_than_the_first_branch_and_far_less_than_none() -> None:
    weights = [drawn(128, 256, seed=seed) for seed in (0, 1)]
    importance, scale = drawn(256, seed=2).square(), torch.exp2(torch.arange(256) % 3 - 1.0)
    plain = LayerCalibration(
        weight_amax=1.0, input_amax=1.0, pre_quant_scale=scale, importance=importance
    )
    found = with_branches(weights, SVDQUANT, plain, scale_dtype=torch.bfloat16)
    # Fusion sets share their top scale; it covers what the branches leave.
    left = [coded_weight(w, entry).abs().max() for w, entry in zip(weights, found, strict=True)]
    assert {entry.weight_amax for entry in found} == {float(max(left))}
    total = sum(error_of(w, e, importance) for w, e in zip(weights, found, strict=True))
    once = [low_rank_branch(w / scale, 8, importance) for w in weights]
    amax = max(
        float((w / scale - b.values()).abs().max()) for w, b in zip(weights, once, strict=True)
    )
    first = [dataclasses.replace(plain, low_rank=b, weight_amax=amax) for b in once]
    assert total < 0.97 * sum(
        error_of(w, e, importance) for w, e in zip(weights, first, strict=True)
    )
    amax = max(float((w / scale).abs().max()) for w in weights)
    none = dataclasses.replace(plain, weight_amax=amax)
    assert total < 0.9 * sum(error_of(w, none, importance) for w in weights)


def calibrated(method: CalibrationMethod) -> tuple[torch.nn.Module, dict]:
    model = make_tiny_model("llama", dtype=torch.float32)
    ids = torch.randint(4, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    table = calibrate(
        model,
        discover(model),
        ("nvfp4_svdquant",),
        [ids],
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, ids[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        method=method,
    )
    return model, table


@torch.no_grad()
def test_plain_calibration_is_the_decomposition_of_the_smoothed_weight() -> None:
    model, table = calibrated(CalibrationMethod.MAX)
    for slot in discover(model).slots.values():
        entry = table[slot.name, "nvfp4_svdquant"]
        assert entry.importance is None and entry.codes is None
        weight = slot_weight(model, slot)
        scale = entry.pre_quant_scale
        smoothed = weight if scale is None else weight / scale
        rank = entry.low_rank.rank
        assert rank == min(slot.out_features, slot.in_features) // 16
        # Factors in bfloat16 add their rounding, 2^-9 of the branch.
        least = torch.linalg.svdvals(smoothed)[rank:].norm()
        assert left_by(entry.low_rank, smoothed) <= 1.005 * float(least)


@torch.no_grad()
def test_best_calibration_chooses_codes_of_what_the_branch_leaves() -> None:
    model, table = calibrated(CalibrationMethod.BEST)
    for slot in discover(model).slots.values():
        entry = table[slot.name, "nvfp4_svdquant"]
        assert entry.codes is not None and entry.importance is not None
        weight = slot_weight(model, slot)
        residual = coded_weight(weight, entry)
        coded = fake_quantize_weight(weight, SVDQUANT, entry, scale_dtype=torch.bfloat16)
        # Error feedback moves codes by a step or two, E2M1's steps are a third of a value at most.
        assert (coded - residual).norm() < 0.2 * residual.norm()
        scale = entry.pre_quant_scale
        assert residual.norm() < 0.95 * (weight if scale is None else weight / scale).norm()
