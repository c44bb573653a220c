"""Input scales that move outliers of the input into the weight, for 8-bit inputs and weights.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models" (2022): channel j of the input is divided by amax|x_j|^alpha / amax|w_j|^(1 - alpha),
and the weight's column multiplied by as much. The paper fixes one alpha for a model; here it is
searched for every set of layers that share an input, by the error of their outputs with inputs and
weights quantised. Scales are powers of two, for the reasons that `autoq.calibration.awq` gives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autoq.calibration.awq import candidate, search_input_scale
from autoq.calibration.statistics import InputStatistics
from autoq.formats import QuantFormat
from autoq.layers.quantize import Container


def search_smoothing_scale(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    fmt: QuantFormat,
    *,
    scale_dtype: torch.dtype,
    container: Container,
    strength: float | None = None,
) -> Tensor | None:
    """The smoothing scale with the smallest output error, or None if none beats plain rounding.

    Args:
        weights: matrices [out_features, in_features] that share one input.
        statistics: of that input, with kept rows.
        fmt: the format, whose inputs are quantised, too.
        scale_dtype: the dtype in which the checkpoint stores scales that follow the model's.
        container: whose run time is meant.
        strength: the alpha to take without a search, in [0, 1]; None searches.
    Returns:
        float32 [in_features] of powers of two, to multiply the input by; None, too, where no input
        came.
    """
    if strength is not None:
        if not statistics.row_count:
            return None  # the input's channels are not known
        return candidate([weight.float() for weight in weights], statistics.channel_amax, strength)
    return search_input_scale(
        weights,
        statistics,
        fmt,
        scale_dtype=scale_dtype,
        container=container,
        magnitude=statistics.channel_amax,
    )
