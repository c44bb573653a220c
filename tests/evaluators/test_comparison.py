"""Comparing two measured models: by hand."""

import math

import pytest

from autoq.errors import InputError
from autoq.evaluators import compare


def test_the_difference_is_the_first_less_the_second():
    found = compare([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])
    assert found.difference == pytest.approx(-0.2)
    # Of three draws from -0.1, -0.2 and -0.3 one in 27 are all the same end: more than 2.5 %.
    assert (found.low, found.high) == (pytest.approx(-0.3), pytest.approx(-0.1))
    assert found.verdict == "better"
    back = compare([0.2, 0.4, 0.6], [0.1, 0.2, 0.3])
    assert (back.difference, back.verdict) == (pytest.approx(0.2), "worse")


def test_an_interval_with_zero_is_a_tie():
    found = compare([1.0, 2.0, 3.0], [2.0, 2.0, 5.0])
    assert found.difference == -1.0
    assert (found.low, found.high) == (-2.0, 0.0)
    assert found.verdict == "tie"


def test_differences_count_sequence_by_sequence():
    # The spread between sequences is a thousand times the difference, and says nothing of it.
    first = [1.0, 20.0, 3.0, 400.0, 50.0]
    found = compare(first, [value + 0.001 for value in first])
    assert found.verdict == "better"
    assert compare(first, [402.0, 2.0, 21.0, 51.0, 4.0]).verdict == "tie"


@pytest.mark.parametrize(
    ("floor", "verdict"), [(0.0, "better"), (0.19, "better"), (0.21, "tie"), (1.0, "tie")]
)
def test_a_difference_under_the_floor_is_a_tie(floor, verdict):
    assert compare([0.1, 0.2, 0.3], [0.2, 0.4, 0.6], floor).verdict == verdict


def test_one_sequence_decides_nothing():
    found = compare([0.1], [0.9])
    assert found.difference == pytest.approx(-0.8)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.verdict == "tie"


def test_equal_models_tie():
    found = compare([0.1, 0.2], [0.1, 0.2])
    assert (found.difference, found.low, found.high, found.verdict) == (0.0, 0.0, 0.0, "tie")


@pytest.mark.parametrize(("first", "second"), [([0.1], [0.1, 0.2]), ([], [])])
def test_other_sequences_are_refused(first, second):
    with pytest.raises(InputError, match=r"same sequences, at least one, got .*measure both"):
        compare(first, second)
