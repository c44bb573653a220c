"""Predicted beside measured losses: by hand."""

import math

import pytest

from autoq.evaluators import (
    PredictionCalibration,
    calibrate_prediction,
    calibrated_coverage,
    prediction_quality,
)

# Logarithms with round sums: means 2 and 2, cross products 8, squares 10, residuals 3.6.
PREDICTED = [math.exp(x) for x in (0, 1, 2, 3, 4)]
MEASURED = [math.exp(y) for y in (0, 2, 1, 4, 3)]
NO_BOUND = (-math.inf, math.inf)


def quality(predicted, measured, intervals=None):
    return prediction_quality(predicted, measured, intervals or [NO_BOUND] * len(predicted))


def test_quality_by_hand():
    found = quality(PREDICTED, MEASURED)
    assert found.plans == 5
    # Squared rank differences 0, 1, 1, 1, 1: 1 - 6 * 4 / (5 * 24).
    assert found.rank_correlation == pytest.approx(0.8)
    assert found.slope == pytest.approx(0.8)
    assert found.ratio == pytest.approx(1.0)
    assert found.coverage is None


def test_a_power_law_has_its_exponent_as_slope():
    predicted = [0.01, 0.1, 1.0]
    found = quality(predicted, [2 * p**1.5 for p in predicted])
    assert found.slope == pytest.approx(1.5)
    assert found.ratio == pytest.approx(2 * 0.1**0.5)
    assert found.rank_correlation == pytest.approx(1.0)


def test_equal_ranks_share_their_mean():
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    found = quality([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0])
    assert found.rank_correlation == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_falling_predictions_rank_backwards():
    assert quality([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]).rank_correlation == pytest.approx(-1.0)


def test_coverage_counts_measured_values_inside():
    intervals = [(0.5, 1.5), (0.5, 1.5), (1.0, 2.0), NO_BOUND]
    found = quality([1.0] * 4, [1.0, 2.0, 2.0, 7.0], intervals)
    assert found.coverage == pytest.approx(2 / 3)


def test_losses_of_zero_rank_and_have_no_logarithm():
    found = quality([0.0, *PREDICTED], [0.0, *MEASURED])
    assert found.plans == 6
    assert found.slope == pytest.approx(0.8)
    assert found.rank_correlation == pytest.approx(1 - 6 * 4 / (6 * 35))


@pytest.mark.parametrize(
    ("predicted", "measured"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0])]
)
def test_too_few_or_equal_plans_say_nothing(predicted, measured):
    found = quality(predicted, measured)
    assert found.rank_correlation is None
    assert found.slope is None


def test_calibration_by_hand():
    line = calibrate_prediction(PREDICTED, MEASURED)
    assert line.slope == pytest.approx(0.8)
    assert line.intercept == pytest.approx(0.4)
    assert line.residual == pytest.approx(math.sqrt(3.6 / 3))
    # At the mean: residual * sqrt(1 + 1 / 5) = 1.2, and Student's 97.5 % of three degrees.
    found = line.apply(math.exp(2))
    assert found.value == pytest.approx(math.exp(2))
    assert math.log(found.high) == pytest.approx(2 + 3.182446 * 1.2, rel=1e-6)
    assert math.log(found.low) == pytest.approx(2 - 3.182446 * 1.2, rel=1e-6)
    # Two from the mean the line itself is uncertain: sqrt(1.2 * (1 + 1 / 5 + 4 / 10)).
    far = line.apply(math.exp(4))
    assert far.value == pytest.approx(math.exp(3.6))
    assert math.log(far.high / far.value) == pytest.approx(3.182446 * math.sqrt(1.92), rel=1e-6)


def test_calibration_survives_a_round_trip():
    line = calibrate_prediction(PREDICTED, MEASURED)
    assert PredictionCalibration.from_json(line.to_json()) == line


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [(PREDICTED[:4], MEASURED[:4]), ([0.0, *PREDICTED[:4]], [1.0] * 5), ([1.0] * 9, [2.0] * 9)],
)
def test_too_few_plans_do_not_calibrate(predicted, measured):
    assert calibrate_prediction(predicted, measured) is None


def test_coverage_of_the_calibration_leaves_each_plan_out():
    predicted = [math.exp(x) for x in range(10)]
    near = [math.exp(x + 0.1 * (-1) ** x) for x in range(10)]
    assert calibrated_coverage(predicted, near) == 1.0
    # A plan far off is outside what the others say, though a line through all would hold it.
    far = [*near[:9], near[9] * 1e3]
    assert calibrated_coverage(predicted, far) == pytest.approx(0.9)
    assert calibrated_coverage(PREDICTED, MEASURED) is None
