"""The branch of low rank that takes over what 4-bit codes would lose most of.

Source: Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models"
(2024): after input scales have moved outliers into the weight, its leading singular values go into
two thin factors in 16 bits, and codes stand for the rest.

Where errors are weighed, singular values are those of the weight with every column times the root
mean square of its input: both the rounding of what is left of the weight and that of the inputs grow
with it. Then codes and branch are found in turns, the branch again from what the codes leave, as in
Guo et al., "LQ-LoRA" (2023), and Li et al., "LoftQ" (2023). Without weighing it is the plain
singular value decomposition, as ModelOpt has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autoq.formats import QuantFormat
from autoq.layers import LayerCalibration, LowRank, fake_quantize_weight
from autoq.layers.quantize import coded_weight

TURNS = 5
"""How many branches are tried, each from what the codes beside the one before leave."""

_SPARE_DIRECTIONS = 16
_POWER_STEPS = 6
"""Subspace iteration with these leaves at most 0.2 % more than the exact decomposition, of matrices
of noise, which are the hardest: a test compares them."""

_SEED = 0
_LEAST_POWER = 1e-6
"""Share of the largest channel's power below which channels count alike: those that calibration
never saw must not get whatever values they like."""


def with_branches(
    weights: Sequence[Tensor],
    fmt: QuantFormat,
    calibration: LayerCalibration,
    *,
    scale_dtype: torch.dtype,
) -> list[LayerCalibration]:
    """The calibrations of layers that read one input, each with its branch of low rank.

    Args:
        weights: matrices [out_features, in_features] that share their top-level scale.
        fmt: a format with branches.
        calibration: of them all; its input scale and importance are kept.
        scale_dtype: as for `quantize_weight`.

    Returns:
        One for each weight; `weight_amax` is that of what the branches leave, of all weights.
    """
    smoothed = [coded_weight(weight.float(), calibration) for weight in weights]
    importance = calibration.importance
    found = _with(_branches(smoothed, fmt, importance), smoothed, calibration)
    if importance is None:
        return found
    weighing = importance.to(smoothed[0].device)
    best, best_error = found, float("inf")
    for _ in range(TURNS):
        left = [
            weight - _quantized(weight, fmt, entry, scale_dtype)
            for weight, entry in zip(smoothed, found, strict=True)
        ]
        error = _error(left, found, weighing)
        if error < best_error:
            best, best_error = found, error
        found = _with(_branches(left, fmt, importance), smoothed, calibration)
    return best


def low_rank_branch(weight: Tensor, rank: int, importance: Tensor | None = None) -> LowRank:
    """The branch that leaves least of a weight: the sum of (weight - branch)^2 * importance.

    Args:
        weight: float32 [out_features, in_features].
        rank: at most the smaller of the two.
        importance: float32 [in_features], not negative; None: all ones.

    Returns:
        Factors rounded to bfloat16, that with the singular values last.
    """
    root = _root(importance, weight)
    matrix = weight if root is None else weight * root
    basis = _leading_directions(matrix, rank)
    left, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    down = right[:rank] @ basis.t()
    if root is not None:
        down = down / root
    return LowRank(down.bfloat16(), (left[:, :rank] * values[:rank]).bfloat16())


def _branches(
    weights: Sequence[Tensor], fmt: QuantFormat, importance: Tensor | None
) -> list[LowRank]:
    return [
        low_rank_branch(weight, fmt.branch_rank(len(weight), weight.shape[1]), importance)
        for weight in weights
    ]


def _with(
    branches: Sequence[LowRank], smoothed: Sequence[Tensor], calibration: LayerCalibration
) -> list[LayerCalibration]:
    amax = max(
        float((weight - branch.values()).abs().max())
        for weight, branch in zip(smoothed, branches, strict=True)
    )
    return [replace(calibration, weight_amax=amax, low_rank=branch) for branch in branches]


def _error(
    left: Sequence[Tensor], calibrations: Sequence[LayerCalibration], weighing: Tensor
) -> float:
    """What neither codes nor branches have, squared and weighed."""
    branches = [entry.low_rank for entry in calibrations]
    return sum(
        float(((rest if branch is None else rest - branch.values()).square() * weighing).sum())
        for rest, branch in zip(left, branches, strict=True)
    )


def _quantized(
    smoothed: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> Tensor:
    """What codes stand for of a weight that is smoothed already."""
    plain = replace(calibration, pre_quant_scale=None)
    return fake_quantize_weight(smoothed, fmt, plain, scale_dtype=scale_dtype)


def _root(importance: Tensor | None, weight: Tensor) -> Tensor | None:
    """Root mean squares of the input's channels; None where no input came."""
    if importance is None or not float(importance.max()) > 0:
        return None
    power = importance.to(weight.device)
    return power.clamp(min=_LEAST_POWER * float(power.max())).sqrt()


def _leading_directions(matrix: Tensor, rank: int) -> Tensor:
    """An orthonormal basis [columns, rank and a few] of the leading right singular vectors.

    Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), section 4.5.
    """
    count = min(rank + _SPARE_DIRECTIONS, *matrix.shape)
    generator = torch.Generator().manual_seed(_SEED)
    basis = torch.randn(matrix.shape[1], count, generator=generator).to(matrix.device)
    for _ in range(_POWER_STEPS):
        basis = torch.linalg.qr(matrix.t() @ (matrix @ basis)).Q
    return basis
