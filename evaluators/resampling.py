"""Intervals of statistics of sequences, by drawing whole sequences again and again.

Tokens of one sequence are alike, so sequences are what is drawn (a cluster bootstrap; Efron and
Tibshirani, An Introduction to the Bootstrap, chapter 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.evaluators.estimate import BOOTSTRAP_DRAWS, CONFIDENCE, Estimate

QUANTILE_DRAWS = 200
"""For quantiles of all tokens, each of which sorts them anew."""

Numbers = NDArray[np.float64]


def ratio_estimate(
    sums: Sequence[float],
    counts: Sequence[float],
    transform: Callable[[Numbers], Numbers] = lambda values: values,
) -> Estimate | None:
    """`transform` of the sum of all sums over the sum of all counts; None where nothing counts.

    Args:
        sums: of each sequence, over what it counts.
        counts: of each sequence; some may be 0, and then no sequence has a value of its own.
    """
    totals, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if not weights.sum() > 0:
        return None
    drawn = _draws(len(totals), BOOTSTRAP_DRAWS)
    drawn_weights = weights[drawn].sum(axis=1)
    usable = drawn_weights > 0
    ratios = transform(totals[drawn].sum(axis=1)[usable] / drawn_weights[usable])
    value = float(transform(np.asarray(totals.sum() / weights.sum())))
    own = tuple(transform(totals / weights).tolist()) if bool((weights > 0).all()) else ()
    return Estimate(value, *_ends(ratios), own)


def quantile_estimates(sequences: Sequence[Numbers], quantiles: Sequence[float]) -> list[Estimate]:
    """Quantiles of all values of all sequences together.

    Args:
        sequences: values of each, [tokens].
    """
    values = np.concatenate(sequences)
    lengths = [len(sequence) for sequence in sequences]
    starts = np.cumsum([0, *lengths[:-1]])
    places = [
        np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)
    ]
    drawn = np.stack(
        [
            np.quantile(values[np.concatenate([places[index] for index in draw])], quantiles)
            for draw in _draws(len(sequences), QUANTILE_DRAWS)
        ]
    )
    own = np.stack([np.quantile(sequence, quantiles) for sequence in sequences])
    return [
        Estimate(float(value), *_ends(drawn[:, index]), tuple(own[:, index].tolist()))
        for index, value in enumerate(np.quantile(values, quantiles))
    ]


def _draws(count: int, draws: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (draws, count))


def _ends(drawn: Numbers) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
