"""How well predicted losses tell measured ones, and what a prediction becomes in their light."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.evaluators.estimate import CONFIDENCE, Estimate

FEWEST_FOR_CALIBRATION = 5
"""Plans that a line with an interval is drawn through: fewer leave nearly no degree of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionQuality:
    """Predicted beside measured losses of some plans; None where too few or equal plans are."""

    plans: int
    rank_correlation: float | None  # Spearman, over all plans
    slope: (
        float | None
    )  # of log measured on log predicted, least squares with intercept; 1 is right
    ratio: float | None  # geometric mean of measured / predicted; 1 is right
    coverage: float | None  # share of plans measured within the prediction's own 95 % interval


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionCalibration:
    """The line log measured = intercept + slope * log predicted, and the spread round it.

    Ordinary least squares; a new plan's 95 % interval is Student's, with the line's own
    uncertainty in it (any text on linear regression has the formula).
    """

    slope: float
    intercept: float
    residual: float  # standard deviation of log measured round the line, n - 2 degrees of freedom
    plans: int
    mean_log_predicted: float
    spread_log_predicted: float  # sum of squares round the mean

    def apply(self, predicted: float) -> Estimate:
        """What a plan of this predicted loss will be measured at, with its 95 % interval."""
        from scipy.stats import t as student

        place = math.log(predicted)
        middle = self.intercept + self.slope * place
        distance = (place - self.mean_log_predicted) ** 2 / self.spread_log_predicted
        error = self.residual * math.sqrt(1 + 1 / self.plans + distance)
        reach = float(student.ppf(0.5 + CONFIDENCE / 2, self.plans - 2)) * error
        return Estimate(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))

    def to_json(self) -> dict[str, float]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, float]) -> PredictionCalibration:
        """The value that `to_json` came from."""
        return cls(**{**data, "plans": int(data["plans"])})  # type: ignore[arg-type]


def prediction_quality(
    predicted: Sequence[float],
    measured: Sequence[float],
    intervals: Sequence[tuple[float, float]],
) -> PredictionQuality:
    """Judge predictions by what was measured.

    Ranks need no scale. Slope and ratio are taken over the plans whose losses are above zero, as
    logarithms need, and mean something only where both are in the same unit.

    Args:
        predicted: loss of each plan.
        measured: KL divergence of the same plans.
        intervals: 95 % interval of each prediction; bounds that are not finite leave the plan out.
    """
    logs = _logarithms(predicted, measured)
    line = _line(*logs)
    inside = [
        low <= value <= high
        for value, (low, high) in zip(measured, intervals, strict=True)
        if math.isfinite(low) and math.isfinite(high)
    ]
    return PredictionQuality(
        plans=len(predicted),
        rank_correlation=_rank_correlation(predicted, measured),
        slope=line[0] if line else None,
        ratio=math.exp(float((logs[1] - logs[0]).mean())) if len(logs[0]) else None,
        coverage=sum(inside) / len(inside) if inside else None,
    )


def calibrate_prediction(
    predicted: Sequence[float], measured: Sequence[float]
) -> PredictionCalibration | None:
    """The line through the plans whose losses are above zero; None if they are too few or equal."""
    x, y = _logarithms(predicted, measured)
    line = _line(x, y)
    if line is None or len(x) < FEWEST_FOR_CALIBRATION:
        return None
    slope, intercept = line
    squares = float(((y - intercept - slope * x) ** 2).sum())
    return PredictionCalibration(
        slope=slope,
        intercept=intercept,
        residual=math.sqrt(squares / (len(x) - 2)),
        plans=len(x),
        mean_log_predicted=float(x.mean()),
        spread_log_predicted=float(((x - x.mean()) ** 2).sum()),
    )


def calibrated_coverage(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Share of plans measured within the interval that the other plans' calibration gives.

    Leaving the plan out is what makes this a test; None where too few plans remain.
    """
    hits = []
    for index, (prediction, value) in enumerate(zip(predicted, measured, strict=True)):
        if prediction <= 0.0 or value <= 0.0:
            continue
        others = calibrate_prediction(
            [*predicted[:index], *predicted[index + 1 :]],
            [*measured[:index], *measured[index + 1 :]],
        )
        if others is not None:
            found = others.apply(prediction)
            hits.append(found.low <= value <= found.high)
    return sum(hits) / len(hits) if hits else None


def _logarithms(
    predicted: Sequence[float], measured: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    usable = (x > 0.0) & (y > 0.0)
    return np.log(x[usable]), np.log(y[usable])


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float] | None:
    """Slope and intercept of the least squares line."""
    if len(x) < 2 or np.ptp(x) == 0.0:
        return None
    centred = x - x.mean()
    slope = float((centred * (y - y.mean())).sum() / (centred**2).sum())
    return slope, float(y.mean() - slope * x.mean())


def _rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    from scipy.stats import rankdata

    if len(first) < 2 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])
