"""Largest magnitudes, from which the formats' scales derive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoq.calibration.statistics import InputStatistics
from autoq.formats import QuantFormat, WeightElement
from autoq.kernels import int4
from autoq.models import DecisionGroup, SlotName


def sharing_sets(group: DecisionGroup) -> list[tuple[SlotName, ...]]:
    """The group's slots in sets that share weight, activation and input scales; most are alone."""
    fused = {name for names in group.fusion_sets for name in names}
    return [*group.fusion_sets, *((name,) for name in group.slots if name not in fused)]


def scaled_input_amax(statistics: InputStatistics, scale: Tensor | None) -> float:
    """Largest input magnitude after the input scale."""
    amax = statistics.channel_amax if scale is None else statistics.channel_amax * scale
    return float(amax.max())


def scaled_weight_amax(
    weights: Sequence[Tensor], scale: Tensor | None, fmt: QuantFormat, scale_dtype: torch.dtype
) -> float:
    """Largest magnitude that the format's top-level weight scale must reach.

    Args:
        weights: matrices [out_features, in_features] that share the top-level scale.
        scale: the input scale, float32 [in_features]; the weights are divided by it.
        scale_dtype: dtype in which INT4 group scales are stored.
    """
    return max(_amax(w if scale is None else w / scale, fmt, scale_dtype) for w in weights)


def _amax(weight: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype) -> float:
    """Of INT4 weights the largest value after rounding: the second level scales those."""
    if fmt.weight_element is WeightElement.INT4 and fmt.weight_block_size:
        group_scale = int4.group_scale(
            weight, group_size=fmt.weight_block_size, storage_dtype=scale_dtype
        )
        return float(int4.fake_quantize(weight.float(), group_scale).abs().max())
    return float(weight.abs().max())
