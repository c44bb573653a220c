"""Early stopping and acceptance keep the error rates that they state."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from autoq.errors import InputError
from autoq.search._refine_stopping import ACCEPTING_ERROR, STOPPING_ERROR, hopeless
from autoq.search.refine import accepted

SEQUENCES = 32


def test_trials_that_would_be_better_are_hardly_ever_stopped():
    """Differences with mean zero: half of the trials turn out better, and those count."""
    rng = np.random.default_rng(0)
    best = np.zeros(SEQUENCES)
    differences = rng.standard_normal((6000, SEQUENCES))
    better = differences[differences.mean(axis=1) < 0.0]
    # Asked with all but one sequence known, the answer covers every earlier look.
    stopped = sum(hopeless(best, trial[:-1]) for trial in better)

    # The bound holds for each trial's expectation; 3 standard deviations for the sample's size.
    allowed = STOPPING_ERROR + 3 * np.sqrt(STOPPING_ERROR / len(better))
    assert stopped / len(better) <= allowed


def test_clearly_worse_trials_stop_at_the_first_look():
    rng = np.random.default_rng(1)
    best = rng.lognormal(0.0, 0.5, SEQUENCES)
    worse = best + 1.0 + 0.05 * rng.standard_normal(SEQUENCES)

    assert not hopeless(best, worse[:7])
    assert hopeless(best, worse[:8])


def test_only_fixed_prefixes_count():
    """Between looks the answer stays; after the last sequence nothing is left to stop."""
    rng = np.random.default_rng(2)
    best = rng.lognormal(0.0, 0.5, SEQUENCES)
    for trial in best + 0.3 + rng.standard_normal((40, SEQUENCES)):
        answers = [hopeless(best, trial[:known]) for known in range(SEQUENCES + 1)]
        changes = [at for at in range(1, SEQUENCES) if answers[at] != answers[at - 1]]
        assert set(changes) <= {8, 16, 20, 24}
        assert not answers[SEQUENCES]


def test_what_cannot_be_compared_is_not_stopped():
    assert not hopeless([1.0] * 8, [9.0, float("nan"), 9.0, 9.0])
    assert not hopeless([1.0], [])


def test_interval_is_students():
    start, candidate = [5.0, 6.0, 7.0, 8.0], [4.0, 4.0, 4.0, 6.0]
    verdict = accepted(start, candidate)
    # Differences -1, -2, -3, -2: mean -2, standard error sqrt(2/3) / 2.
    half = student.ppf(0.975, 3) * np.sqrt(2 / 3) / 2

    assert verdict
    assert verdict.difference == pytest.approx(-2.0)
    assert (verdict.low, verdict.high) == pytest.approx((-2.0 - half, -2.0 + half))
    assert verdict.reason.startswith("accepted")


@pytest.mark.parametrize(
    ("floor", "candidates", "reason"),
    [(2.5, 1, "noise floor"), (0.0, 100, "not significantly below")],
    ids=["noise", "many"],
)
def test_small_or_uncertain_gains_are_refused(floor, candidates, reason):
    start, candidate = [5.0, 6.0, 7.0, 8.0], [4.0, 4.0, 4.0, 6.0]
    verdict = accepted(start, candidate, floor, candidates=candidates)

    assert not verdict
    assert reason in verdict.reason


def test_the_luckiest_of_equal_plans_is_hardly_ever_accepted():
    """The winner's curse: 50 plans as good as the start, the best on 32 sequences is picked."""
    rng = np.random.default_rng(3)
    looked_better = passed = 0
    for _ in range(1500):
        chosen = rng.standard_normal((50, SEQUENCES)).mean(axis=1).argmin()
        fresh = rng.standard_normal((50, SEQUENCES))
        looked_better += 1
        passed += bool(accepted(np.zeros(SEQUENCES), fresh[chosen]))

    allowed = ACCEPTING_ERROR + 3 * np.sqrt(ACCEPTING_ERROR / looked_better)
    assert passed / looked_better <= allowed


@pytest.mark.parametrize(
    ("start", "candidate", "message"),
    [
        ([1.0, 2.0], [1.0], "the same sequences"),
        ([1.0], [2.0], "at least two"),
        ([1.0, 2.0], [1.0, float("inf")], "finite"),
    ],
    ids=["unequal", "one", "infinite"],
)
def test_what_cannot_be_tested_is_refused(start, candidate, message):
    with pytest.raises(InputError, match=message):
        accepted(start, candidate)
