"""Lists of states find what trying everything finds, and say when they give up."""

from __future__ import annotations

import itertools
import math
from typing import Any

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


@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
@pytest.mark.parametrize("seed", range(4))
def test_groups_that_do_nothing_to_a_few_states_are_passed_over(
    seed: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    relaxation = random_relaxation(seed, 150, share, formats=9)
    known = relaxation.excess_of(relaxation.choice)
    changes = _states._changes(relaxation, known)
    random = np.random.default_rng(seed)
    more = np.sort(random.integers(-200, changes.slack + 1, 3))
    losses = np.sort(random.uniform(0.0, known, 3))[::-1]
    monkeypatch.setattr(_states, "_TOGETHER", 7)
    steps = range(len(changes.groups))
    for below in (known, known / 2, known / 20):
        growing = [
            step
            for step in steps
            if len(_states._grown(changes, step, more, losses, below).more) > 3
        ]
        for start in (0, 5, len(steps) // 2):
            expected = next((step for step in growing if step >= start), len(steps))
            found = _states._next_that_grows(changes, start, more, losses, below)
            assert found == expected


def test_a_long_tail_of_groups_is_not_looked_at_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As real scores do, losses fall by four for every bit; a known choice that is far off leaves
    # most groups some change that could be worth it.
    random = np.random.default_rng(3)
    per_weight = np.array([3.25, 4.25, 4.5, 6.25, 8.0, 8.5, 16.0])
    bits = np.outer(random.choice([1024, 1536, 2816, 5632], 300), per_weight).astype(np.int64)
    losses = (
        4.0**-per_weight * random.lognormal(0, 1, (300, 1)) * random.lognormal(0, 0.25, (300, 7))
    )
    options = undominated(losses, bits, np.ones(bits.shape, dtype=bool))
    relaxation = relax(options, hull_steps(options), 5_939_000)
    known = relaxation.excess_of(relaxation.choice)
    whole, looked_at = _states._grown, []

    def counted(*args: Any) -> Any:
        looked_at.append(args[1])
        return whole(*args)

    monkeypatch.setattr(_states, "_grown", counted)
    together = _states.better_choice(relaxation, known)
    few = len(looked_at)
    looked_at.clear()
    monkeypatch.setattr(_states, "_FEW_STATES", 0)
    one_by_one = _states.better_choice(relaxation, known)
    assert (together.proved, one_by_one.proved) == (True, True)
    assert together.choice is not None
    np.testing.assert_array_equal(together.choice, one_by_one.choice)
    assert few < len(looked_at) / 2
