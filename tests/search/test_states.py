"""Lists of states find what trying everything finds, and say when they give up."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from autoq.search import _knapsack, _states
from autoq.search._knapsack import Tolerance
from autoq.search._relaxation import Relaxation, hull_steps, relax, undominated


def random_relaxation(seed: int, groups: int, share: float, formats: int = 4) -> Relaxation:
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.integers(3, 60, (groups, formats)), axis=1) * rng.integers(1, 9, (groups, 1))
    losses = -np.sort(-rng.lognormal(0, 1, (groups, formats)), axis=1)
    options = undominated(losses, bits, np.ones(bits.shape, dtype=bool))
    floor = options.floor_bits()
    ceiling = int(np.where(np.isfinite(options.losses), options.bits, 0).max(axis=1).sum())
    return relax(options, hull_steps(options), int(floor + share * (ceiling - floor)))


def least_excess(relaxation: Relaxation) -> float:
    """Of all choices that fit, by trying them."""
    options = relaxation.options
    rows = [np.flatnonzero(np.isfinite(row)) for row in options.losses]
    every = (np.array(choice) for choice in itertools.product(*rows))
    return min(
        relaxation.excess_of(choice)
        for choice in every
        if options.bits_of(choice) <= relaxation.capacity
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.7, 0.98, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_all_choices(seed: int, share: float) -> None:
    relaxation = random_relaxation(seed, 6, share)
    known = relaxation.excess_of(relaxation.choice)
    best = least_excess(relaxation)
    found = _states.better_choice(relaxation, known)
    assert found.proved
    if found.choice is None:
        assert best == pytest.approx(known, rel=1e-12, abs=1e-15)
        return
    assert relaxation.options.bits_of(found.choice) <= relaxation.capacity
    assert relaxation.excess_of(found.choice) == pytest.approx(best, rel=1e-12)
    assert best < known


@pytest.mark.parametrize("seed", range(8))
def test_highs_finds_nothing_better(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    relaxation = random_relaxation(seed, 150, 0.05 + 0.11 * seed, formats=9)
    options, steps = relaxation.options, hull_steps(relaxation.options)
    by_lists = _knapsack.solve(options, steps, relaxation.capacity, time_limit_seconds=0.0)
    gave_up = _states.Found(choice=None, proved=False)
    monkeypatch.setattr(_knapsack, "better_choice", lambda *args: gave_up)
    by_highs = _knapsack.solve(options, steps, relaxation.capacity, time_limit_seconds=60.0)
    assert by_lists.unproved <= 1e-12
    # HiGHS proves to 1e-10 of the excess.
    assert options.loss_of(by_lists.choice) == pytest.approx(
        options.loss_of(by_highs.choice), rel=1e-10
    )


@pytest.mark.parametrize("relative", [1e-3, 1e-5])
def test_what_is_allowed_is_not_exceeded(relative: float) -> None:
    relaxation = random_relaxation(3, 150, 0.4, formats=9)
    options, steps = relaxation.options, hull_steps(relaxation.options)
    solved = [
        _knapsack.solve(
            options, steps, relaxation.capacity, time_limit_seconds=0.0, tolerance=tolerance
        )
        for tolerance in (Tolerance(), Tolerance(relative=relative))
    ]
    exact, near = (options.loss_of(answer.choice) for answer in solved)
    assert exact <= near * (1 + 1e-12)
    assert near - solved[1].unproved <= exact * (1 + 1e-12)
    assert solved[1].unproved <= relative * near


def test_lists_that_grow_too_long_prove_nothing_and_lose_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    relaxation = random_relaxation(1, 150, 0.4, formats=9)
    known = relaxation.excess_of(relaxation.choice)
    whole = _states.better_choice(relaxation, known)
    few = _states._Bounds(states=2, looked_at=math.inf, steps=math.inf)
    monkeypatch.setattr(_states, "_LOOKS", (few, few))
    cut = _states.better_choice(relaxation, known)
    assert (whole.proved, cut.proved) == (True, False)
    assert cut.choice is not None
    assert whole.choice is not None
    assert relaxation.options.bits_of(cut.choice) <= relaxation.capacity
    best = relaxation.excess_of(whole.choice)
    assert best <= relaxation.excess_of(cut.choice) < known
    # What the lists found is kept where HiGHS is asked and has no time.
    options, steps = relaxation.options, hull_steps(relaxation.options)
    answer = _knapsack.solve(options, steps, relaxation.capacity, time_limit_seconds=0.0)
    assert relaxation.excess_of(answer.choice) - answer.unproved <= best * (1 + 1e-12)
