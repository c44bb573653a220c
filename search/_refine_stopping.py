"""Stopping a trial early, and believing one: paired tests on losses per sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError

STOPPING_ERROR = 0.01
"""Largest chance that a trial which would turn out better is stopped."""

ACCEPTING_ERROR = 0.025
"""Largest chance that a plan which is no better is accepted."""

_LOOKS = (1 / 4, 1 / 2, 5 / 8, 3 / 4)
"""After which shares of the sequences a trial may be stopped."""

_FEWEST = 4
"""Sequences whose spread says something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a refined plan replaces the start; true where it does."""

    better: bool
    difference: float  # candidate less start, mean over sequences; negative is better
    low: float  # interval of the difference
    high: float
    reason: str  # one sentence for the user

    def __bool__(self) -> bool:
        """Whether the candidate is accepted."""
        return self.better


def hopeless(best: Sequence[float], so_far: Sequence[float]) -> bool:
    """Whether the mean over all sequences will be above the best trial's, as far as can be told.

    The rest of the differences to the best trial are predicted from those known: with s the spread
    of the first m of n differences, the mean of all n differs from theirs by s sqrt(1/m - 1/n)
    times Student's t with m - 1 degrees of freedom (the prediction interval of a finite
    population). A trial is stopped where the lower end is above zero. However often this is asked,
    the answer depends on four prefixes only, a quarter to three quarters of the sequences, among
    which the error rate of `STOPPING_ERROR` is shared (Bonferroni). It holds where differences are
    normally distributed and sequences come in no particular order.
    """
    known = min(len(so_far), len(best))
    differences = np.asarray(so_far[:known], dtype=np.float64) - np.asarray(best[:known])
    if not np.isfinite(differences).all():
        return False
    looks = {max(math.ceil(share * len(best)), _FEWEST) for share in _LOOKS}
    return any(
        _surely_above(differences[:look], len(best)) for look in looks if look <= known < len(best)
    )


def accepted(
    start_losses: Sequence[float],
    candidate_losses: Sequence[float],
    noise_floor: float = 0.0,
    *,
    candidates: int = 1,
) -> Verdict:
    """Whether a candidate is better than the start on fresh tokens.

    The best of many measured plans was also the luckiest on the tokens that it was chosen by, so
    only tokens that chose nothing can tell. It is accepted where the paired difference is larger
    than the noise floor, and the whole of its interval (Student's t over sequences) is on the good
    side: a plan that is no better passes with a chance of at most 2.5 % in all.

    Args:
        start_losses: per sequence, of tokens that chose nothing.
        candidate_losses: of the same sequences.
        noise_floor: improvement that means nothing.
        candidates: how many are tested beside each other; the error rate is shared among them
            (Bonferroni), so any that is accepted may be taken.
    Raises:
        InputError: the two were not measured on equally many sequences, on fewer than two, or not
            everywhere finite.
    """
    differences = _paired(start_losses, candidate_losses)
    difference = float(differences.mean())
    half = _quantile(ACCEPTING_ERROR / candidates, len(differences)) * _standard_error(differences)
    low, high = difference - half, difference + half
    better = high < 0.0 and difference < -noise_floor
    return Verdict(
        better=better,
        difference=difference,
        low=low,
        high=high,
        reason=_reason(difference, low, high, noise_floor),
    )


def _reason(difference: float, low: float, high: float, noise_floor: float) -> str:
    found = f"a difference of {difference:.4g} ({low:.4g} to {high:.4g}) on fresh tokens"
    if high < 0.0 and difference < -noise_floor:
        return f"accepted: {found}"
    if high < 0.0:
        return f"not accepted: {found} is within the noise floor of {noise_floor:.4g}"
    return f"not accepted: {found} is not significantly below zero"


def _paired(first: Sequence[float], second: Sequence[float]) -> NDArray[np.float64]:
    if len(first) != len(second) or len(first) < 2:
        raise InputError(
            "a refined plan must be compared with its start on the same sequences, at least two, "
            f"got {len(first)} and {len(second)}; measure both on the same fresh tokens"
        )
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    if not np.isfinite(differences).all():
        raise InputError(
            "losses on fresh tokens must be finite, got NaN or infinity; look for overflows in the "
            "quantised model"
        )
    return differences


def _surely_above(differences: NDArray[np.float64], sequences: int) -> bool:
    known = len(differences)
    spread = float(differences.std(ddof=1)) * math.sqrt(1 / known - 1 / sequences)
    return float(differences.mean()) > _quantile(STOPPING_ERROR / len(_LOOKS), known) * spread


def _standard_error(differences: NDArray[np.float64]) -> float:
    return float(differences.std(ddof=1)) / math.sqrt(len(differences))


def _quantile(tail: float, count: int) -> float:
    """Student's t above which `tail` of the distribution is, for the mean of `count` numbers."""
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 1 - tail))
