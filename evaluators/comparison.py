"""Whether one quantised model is better than another, on the same sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from autoq.errors import InputError
from autoq.evaluators.estimate import bootstrap_interval

Verdict = Literal["better", "worse", "tie"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The first model's mean divergence less the second's, in nats per token."""

    difference: float
    low: float  # 95 % interval of the difference, from the spread over sequences
    high: float
    verdict: Verdict  # of the first model


def compare(
    measured_a: Sequence[float], measured_b: Sequence[float], floor: float = 0.0
) -> Comparison:
    """Compare two models by the KL divergences that each has on the same sequences.

    Sequences differ far more than models do, so their differences are taken sequence by sequence
    (paired bootstrap). It is a tie where the mean difference is not above the noise floor, or the
    interval holds zero. One sequence alone has no spread, so everything is a tie.

    Args:
        measured_a: per sequence, nats per token; lower is better.
        measured_b: of the other model, the same sequences in the same order.
        floor: KL divergence that rounding alone causes, as `rounding_noise` makes it.
    Raises:
        InputError: the two were not measured on equally many sequences, or on none.
    """
    if len(measured_a) != len(measured_b) or not measured_a:
        raise InputError(
            "plans are compared on the same sequences, at least one, got "
            f"{len(measured_a)} and {len(measured_b)}; measure both on the same data"
        )
    differences = np.asarray(measured_a, dtype=np.float64) - np.asarray(measured_b)
    difference = float(differences.mean())
    low, high = -math.inf, math.inf
    if len(differences) > 1:
        low, high = bootstrap_interval(differences)
    return Comparison(
        difference=difference, low=low, high=high, verdict=_verdict(difference, low, high, floor)
    )


def _verdict(difference: float, low: float, high: float, floor: float) -> Verdict:
    if abs(difference) <= floor or low <= 0.0 <= high:
        return "tie"
    return "better" if difference < 0.0 else "worse"
