"""A mean over sequences and its bootstrap interval; plain numbers, for whoever reads results."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_DRAWS = 1000
CONFIDENCE = 0.95

NOISE_FLOOR = "noise floor"
"""Label of the measurement of how far the original is from itself."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over sequences with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    per_sequence: tuple[float, ...] = field(default=(), repr=False)  # where each has a value


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [n], by drawing n of them again and again."""
    draws = np.random.default_rng(0).integers(0, len(values), (BOOTSTRAP_DRAWS, len(values)))
    means = values[draws].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
