"""Largest magnitudes, from which the formats' scales derive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from autoq.calibration.statistics import InputStatistics
from autoq.errors import ModelError
from autoq.formats import QuantFormat, WeightElement, WeightScaling
from autoq.kernels import int4
from autoq.layers.quantize import int4_group_scale
from autoq.models import DecisionGroup, SlotName


def has_second_level(fmt: QuantFormat) -> bool:
    """Whether INT4 codes times group scales are scaled once more, by their largest magnitude."""
    is_two_level = fmt.weight_scaling is WeightScaling.TWO_LEVEL_GROUP
    return fmt.weight_element is WeightElement.INT4 and is_two_level


def sharing_sets(group: DecisionGroup) -> list[tuple[SlotName, ...]]:
    """The group's slots in sets that share weight, activation and input scales; most are alone."""
    fused = {name for names in group.fusion_sets for name in names}
    return [*group.fusion_sets, *((name,) for name in group.slots if name not in fused)]


def scaled_input_amax(
    statistics: InputStatistics, scale: Tensor | None, percentile: float | None = None
) -> float:
    """Largest input magnitude after the input scale.

    Args:
        percentile: the share of magnitudes in per cent that it covers, larger ones being clipped;
            of scaled inputs it is that of the kept rows. None: all.
    """
    amax = statistics.channel_amax if scale is None else statistics.channel_amax * scale
    largest = float(amax.max())
    if percentile is None:
        return largest
    if scale is None:
        return min(largest, statistics.magnitude_below(percentile))
    return percentile_of(statistics.kept_rows.float().abs() * scale, percentile)


def refuse_broken_weight(name: SlotName, weight: Tensor) -> None:
    """
    Raises:
        ModelError: the weight holds NaN or infinity, so that no scale of it is a number.
    """
    if not torch.isfinite(weight.abs().max()):
        raise ModelError(
            f"weights must be finite, and {name} has NaN or infinity; restore the weights from a good "
            "copy, or exclude the layer"
        )


def percentile_of(magnitudes: Tensor, percentile: float) -> float:
    """The smallest of the values that at least `percentile` per cent of them do not exceed."""
    values = magnitudes.flatten()
    rank = math.ceil(percentile / 100 * len(values))
    return float(values.kthvalue(max(rank, 1)).values)


def mean_square(statistics: Sequence[InputStatistics]) -> Tensor:
    """Mean square of every channel over the inputs of several slots, float32 [in_features].

    Zeros where no row came, as to an expert that no token was routed to.
    """
    total = torch.stack([entry.channel_square_sum for entry in statistics]).sum(0)
    return (total / max(sum(entry.row_count for entry in statistics), 1)).float()


def scaled_importance(importance: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """Mean squares of the channels of x * scale, from those of x."""
    if importance is None or scale is None:
        return importance
    return importance * scale.to(importance.device).square()


def scaled_weight_amax(
    weights: Sequence[Tensor],
    scale: Tensor | None,
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> float:
    """Largest magnitude that the format's top-level weight scale must reach.

    Args:
        weights: matrices [out_features, in_features] that share the top-level scale.
        scale: the input scale, float32 [in_features]; the weights are divided by it.
        scale_dtype: dtype in which INT4 group scales are stored.
        importance: as `LayerCalibration.importance`, of the scaled input.
    """
    smoothed = (w if scale is None else w / scale for w in weights)
    return max(_amax(w, fmt, scale_dtype, importance) for w in smoothed)


def _amax(
    weight: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype, importance: Tensor | None
) -> float:
    """Of INT4 weights with a second level the largest value after rounding, which it scales."""
    if has_second_level(fmt):
        group_scale = int4_group_scale(weight, fmt, scale_dtype, importance)
        return float(int4.fake_quantize(weight.float(), group_scale).abs().max())
    smallest, largest = weight.aminmax()  # no copy, and NaN stays NaN
    return float(torch.maximum(-smallest, largest))
