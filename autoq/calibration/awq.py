"""Activation-aware input scales for low-bit weights.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization" (2023): scale up the weight columns
that large inputs meet, and scale the inputs down by as much. Here the scales are rounded to
powers of two, so that dividing the weight, folding into a norm and multiplying the input are all
exact, and what is searched is bit for bit what is exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from autoq.calibration.scales import scaled_input_amax, scaled_weight_amax
from autoq.calibration.statistics import InputStatistics
from autoq.formats import QuantFormat
from autoq.layers import LayerCalibration
from autoq.layers.quantize import (
    Container,
    fake_quantize_input,
    fake_quantize_weight,
)

ALPHA_STEPS = 10
"""The exponents tried are 0, 1/10, ... 1."""

_EXPONENT_LIMIT = 13
"""Keeps scaled values far from the ends of every float format."""


def search_input_scale(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    fmt: QuantFormat,
    *,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor | None:
    """The input scale with the smallest output error, or None if none beats plain rounding.

    Args:
        weights: matrices [out_features, in_features] that share one input.
        statistics: of that input, with kept rows.
    Returns:
        float32 [in_features] of powers of two, to multiply the input by.
    """
    rows = statistics.kept_rows.float()
    if not rows.numel():
        return None
    floats = [weight.float() for weight in weights]
    expected = [rows @ weight.t() for weight in floats]

    def output_error(scale: Tensor | None) -> float:
        calibration = LayerCalibration(
            weight_amax=scaled_weight_amax(floats, scale, fmt, scale_dtype),
            input_amax=scaled_input_amax(statistics, scale),
            pre_quant_scale=scale,
        )
        inputs = fake_quantize_input(rows, fmt, calibration, container=container)
        error = 0.0
        for weight, target in zip(floats, expected, strict=True):
            quantized = fake_quantize_weight(
                weight, fmt, calibration, scale_dtype=scale_dtype, container=container
            )
            error += float((inputs @ quantized.t() - target).square().sum())
        return error

    best, best_error = None, output_error(None)
    for scale in _candidates(floats, statistics):
        error = output_error(scale)
        if error < best_error:
            best, best_error = scale, error
    return best


def _candidates(weights: Sequence[Tensor], statistics: InputStatistics) -> Iterator[Tensor]:
    """Input scales for every exponent, without repetitions."""
    input_mean = statistics.channel_mean().clamp(min=1e-8)
    weight_amax = torch.stack([w.abs().amax(dim=0) for w in weights]).amax(dim=0).clamp(min=1e-8)
    seen = {torch.zeros_like(input_mean).numpy(force=True).tobytes()}
    for step in range(ALPHA_STEPS + 1):
        alpha = step / ALPHA_STEPS
        gain = (input_mean.pow(alpha) / weight_amax.pow(1 - alpha)).log2()
        exponents = ((gain.amax() + gain.amin()) / 2 - gain).round()
        # + 0.0: no negative zero in the key
        exponents = exponents.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT) + 0.0
        key = exponents.numpy(force=True).tobytes()
        if key not in seen:
            seen.add(key)
            yield torch.exp2(exponents)
