"""Activation-aware input scales for low-bit weights.

Source: Lin et al., "AWQ: Activation-aware Weight Quantization" (2023): scale up the weight columns
that large inputs meet, and scale the inputs down by as much. Here the scales are rounded to
powers of two, so that dividing the weight, folding into a norm and multiplying the input are all
exact, and what is searched is bit for bit what is exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from autoq.calibration.scales import scaled_importance, scaled_input_amax, scaled_weight_amax
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

_CLEARLY_LESS = 0.95
"""Share of plain rounding's error that an input scale has to stay under once block scales are
chosen by error: the best of many candidates on a few rows wins by a few per cent without being
better on other tokens."""

_EXPONENT_LIMIT = 13
"""Keeps scaled values far from the ends of every float format."""


def search_input_scale(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    fmt: QuantFormat,
    *,
    scale_dtype: torch.dtype,
    container: Container,
    importance: Tensor | None = None,
    magnitude: Tensor | None = None,
) -> Tensor | None:
    """The input scale with the smallest output error, or None if none beats plain rounding.

    The candidates are compared with block scales of the largest magnitudes, which are quick to
    find. With an importance the best of them has to beat plain rounding once more and clearly, both
    with block scales chosen by it, as the layer will have them.

    Args:
        weights: matrices [out_features, in_features] that share one input.
        statistics: of that input, with kept rows.
        importance: float32 [in_features], mean squares of the input's channels.
        magnitude: float32 [in_features], what the scale is to even out; None is the channels' mean
            magnitude, AWQ's measure of how much a channel counts.
    Returns:
        float32 [in_features] of powers of two, to multiply the input by.
    """
    rows = statistics.kept_rows.float()
    if not rows.numel():
        return None
    floats = [weight.float() for weight in weights]
    error = partial(
        _output_error,
        floats,
        [rows @ weight.t() for weight in floats],
        rows,
        statistics,
        fmt,
        scale_dtype,
        container,
    )
    best, best_error = None, error(None, None)
    if magnitude is None:
        magnitude = statistics.channel_mean()
    for scale in candidates(floats, magnitude):
        found = error(scale, None)
        if found < best_error:
            best, best_error = scale, found
    if best is None or importance is None:
        return best
    final = error(best, scaled_importance(importance, best))
    return best if final < _CLEARLY_LESS * error(None, importance) else None


def _output_error(
    weights: Sequence[Tensor],
    expected: Sequence[Tensor],
    rows: Tensor,
    statistics: InputStatistics,
    fmt: QuantFormat,
    scale_dtype: torch.dtype,
    container: Container,
    scale: Tensor | None,
    importance: Tensor | None,
) -> float:
    """Squared error of the outputs of `rows`, both weight and input quantised."""
    calibration = LayerCalibration(
        weight_amax=scaled_weight_amax(weights, scale, fmt, scale_dtype, importance),
        input_amax=scaled_input_amax(statistics, scale),
        pre_quant_scale=scale,
        importance=importance,
    )
    inputs = fake_quantize_input(rows, fmt, calibration, container=container)
    error = 0.0
    for weight, target in zip(weights, expected, strict=True):
        quantized = fake_quantize_weight(
            weight, fmt, calibration, scale_dtype=scale_dtype, container=container
        )
        error += float((inputs @ quantized.t() - target).square().sum())
    return error


def candidates(weights: Sequence[Tensor], magnitude: Tensor) -> Iterator[Tensor]:
    """Input scales for every exponent alpha, without repetitions.

    Each is weight_amax^(1 - alpha) / magnitude^alpha by channel, moved to the middle of the
    exponents' range and rounded to powers of two.

    Args:
        weights: float32 [out_features, in_features], which share one input.
        magnitude: float32 [in_features], of that input's channels.
    """
    weight_amax = _column_amax(weights)
    seen = {torch.zeros_like(magnitude).numpy(force=True).tobytes()}
    for step in range(ALPHA_STEPS + 1):
        exponents = _exponents(weight_amax, magnitude, step / ALPHA_STEPS)
        key = exponents.numpy(force=True).tobytes()
        if key not in seen:
            seen.add(key)
            yield torch.exp2(exponents)


def candidate(weights: Sequence[Tensor], magnitude: Tensor, alpha: float) -> Tensor:
    """The input scale for one exponent alpha; arguments as those of `candidates`."""
    return torch.exp2(_exponents(_column_amax(weights), magnitude, alpha))


def _column_amax(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)


def _exponents(weight_amax: Tensor, magnitude: Tensor, alpha: float) -> Tensor:
    """Whole exponents of the scale, finite whatever the channels are."""
    magnitude, weight_amax = magnitude.clamp(min=1e-8), weight_amax.clamp(min=1e-8)
    gain = (magnitude.pow(alpha) / weight_amax.pow(1 - alpha)).log2()
    exponents = ((gain.amax() + gain.amin()) / 2 - gain).round()
    # + 0.0: no negative zero, which would be another key
    return exponents.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT) + 0.0
