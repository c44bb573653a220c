"""Balanced choices fit, are better than what was known, and are mostly the best there are."""

from __future__ import annotations

import numpy as np
import pytest

from autoq.search import _highs, frontier
from autoq.search._balanced import balanced
from autoq.search._knapsack import solve
from autoq.search._relaxation import hull_steps, relax, undominated
from tests.search.tables import several_tables


def relaxation_of(seed, groups, sizes, share):
    rng = np.random.default_rng(seed)
    bits = np.outer(sizes(rng, groups), [9, 16, 32])
    losses = rng.lognormal(0, 1, (groups, 1)) * rng.lognormal(0, 0.3, (groups, 3)) * [1, 0.2, 0]
    options = undominated(losses, bits, np.ones(bits.shape, dtype=bool))
    steps = hull_steps(options)
    least, most = options.floor_bits(), int(bits.max(axis=1).sum())
    return relax(options, steps, int(least + share * (most - least))), steps


def shapes(rng, groups):
    return np.array([6, 4, 28, 14])[np.arange(groups) % 4] * 2**20


def coprime(rng, groups):
    return rng.integers(10**6, 10**7, groups)


@pytest.mark.parametrize("sizes", [shapes, coprime])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_what_comes_out_fits_and_is_between_the_known_and_the_best(seed, share, sizes):
    relaxation, steps = relaxation_of(seed, 80, sizes, share)
    options, capacity = relaxation.options, relaxation.capacity
    known = relaxation.excess_of(relaxation.choice)
    choice = balanced(relaxation, known)
    best = relaxation.excess_of(solve(options, steps, capacity, time_limit_seconds=30).choice)
    found = known if choice is None else relaxation.excess_of(choice)

    # The optimum may differ by what floating point adds up to.
    assert best * (1 - 1e-9) <= found <= known
    if choice is not None:
        assert options.bits_of(choice) <= capacity
        assert found < known
    if sizes is shapes:
        # A large common divisor: no size is rounded, and the window alone limits what is tried.
        assert found == pytest.approx(best, rel=1e-9, abs=1e-15)


def test_coprime_sizes_lose_little():
    """Of what the relaxation's choice is above the optimum, most is gained in most cases."""
    left = []
    for seed in range(12):
        relaxation, steps = relaxation_of(seed, 80, coprime, 0.3)
        known = relaxation.excess_of(relaxation.choice)
        answer = solve(relaxation.options, steps, relaxation.capacity, time_limit_seconds=30)
        best = relaxation.excess_of(answer.choice)
        choice = balanced(relaxation, known)
        found = known if choice is None else relaxation.excess_of(choice)
        left.append((found - best) / (known - best) if known > best else 0.0)

    assert np.median(left) < 0.05


def test_nothing_better_is_nothing():
    relaxation, _ = relaxation_of(0, 60, shapes, 0.3)
    choice = balanced(relaxation, relaxation.excess_of(relaxation.choice))

    assert balanced(relaxation, relaxation.excess_of(choice)) is None
    assert balanced(relaxation, 0.0) is None


def test_a_frontier_of_many_groups_needs_no_search(monkeypatch):
    sensitivity, costs = several_tables(0, 600)

    def unwanted(*args, **kwargs):
        raise AssertionError("HiGHS was asked")

    monkeypatch.setattr(_highs, "minimise", unwanted)
    plans = frontier(sensitivity, costs, points=100)
    largest = plans[0].predicted_loss
    for plan in plans:
        assert plan.predicted_loss - plan.bound <= max(1e-3 * plan.predicted_loss, 1e-6 * largest)
