"""Plans for judging predictions: spread over all budgets, allowed, repeatable, near the best."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from autoq.search import CostTable, SensitivityTable, plan_from_assignment, reachable_bits, solve
from autoq.search.sampling import neighbours, random_plans

FORMATS = ("fp8", "nvfp4", "none")
BITS = np.array([8.0, 4.5, 16.0])


def tables(groups: int = 30, seed: int = 0) -> tuple[Any, Any]:
    """Random scores; of three groups and more the last two may not take everything."""
    rng = np.random.default_rng(seed)
    weights = 16 * rng.integers(1, 100, groups)
    scores = rng.lognormal(0, 1, (groups, 1)) * [0.05, 1.0]
    bits = np.outer(weights, BITS).astype(np.int64)
    allowed = np.ones(bits.shape, dtype=np.bool_)
    if groups > 2:
        scores[-2, 1] = np.nan  # it cannot take nvfp4
        allowed[-1] = [True, False, False]  # a rule: fp8 only
    names = tuple(f"g{row:02d}" for row in range(groups))
    sensitivity = SensitivityTable(
        groups=names,
        formats=FORMATS[:2],
        contributions=scores[None],
        unit="relative",
        estimator="test",
    )
    costs = CostTable(
        groups=names,
        formats=FORMATS,
        weights=weights,
        effective_bits=bits,
        stored_bits=bits,
        peer_bits=bits.astype(np.float64),
        allowed=allowed,
    )
    return sensitivity, costs


def test_random_plans_are_spread_over_all_bits() -> None:
    sensitivity, costs = tables()
    plans = random_plans(sensitivity, costs, count=12)
    edges = np.linspace(*reachable_bits(sensitivity, costs), 13)
    for plan, (low, high) in zip(plans, itertools.pairwise(edges), strict=True):
        assert low <= plan.effective_bits <= high
    formats = [set(plan.assignment.values()) for plan in plans]
    assert sum(len(found) == 3 for found in formats) >= 10  # mixed, not uniform


def test_random_plans_take_only_what_is_allowed() -> None:
    sensitivity, costs = tables()
    for plan in random_plans(sensitivity, costs, count=12):
        assert plan.assignment["g28"] != "nvfp4"
        assert plan.assignment["g29"] == "fp8"
        assert plan == plan_from_assignment(sensitivity, costs, plan.assignment)


def test_equal_seeds_give_equal_plans() -> None:
    sensitivity, costs = tables()
    first, again, other = (
        [plan.assignment for plan in random_plans(sensitivity, costs, count=5, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_two_groups_still_give_plans() -> None:
    # Nine plans in all: most parts of the range hold none of them.
    sensitivity, costs = tables(groups=2)
    plans = random_plans(sensitivity, costs, count=20)
    assert len(plans) == 20
    assert len({tuple(plan.assignment.values()) for plan in plans}) >= 5


@pytest.mark.parametrize("budget", [7.0, 8.0, 12.0])
def test_neighbours_are_the_best_plans_with_one_group_elsewhere(budget: float) -> None:
    sensitivity, costs = tables(groups=5, seed=1)
    optimum = solve(sensitivity, costs, budget)
    found = list(neighbours(sensitivity, costs, optimum))
    expected = [
        best
        for group, fmt in itertools.product(costs.groups, FORMATS)
        if optimum.assignment[group] != fmt
        and (best := least_loss(sensitivity, costs, budget, group, fmt)) is not None
    ]
    assert expected
    # A neighbour is proven to 1e-4 of the least loss.
    np.testing.assert_allclose(
        sorted(plan.predicted_loss for plan in found), sorted(expected), rtol=1e-4
    )
    for plan in found:
        assert plan.effective_bits <= budget
        assert plan.assignment != optimum.assignment
        assert plan.predicted_loss >= optimum.predicted_loss


def least_loss(sensitivity: Any, costs: Any, budget: float, forced: str, fmt: str) -> float | None:
    """By trying every plan that gives `forced` the format; None where none fits."""
    losses = []
    scores = dict(zip(costs.groups, sensitivity.scores(), strict=True))
    for formats in itertools.product(range(3), repeat=len(costs.groups)):
        assignment = dict(zip(costs.groups, formats, strict=True))
        if FORMATS[assignment[forced]] != fmt:
            continue
        rows = range(len(costs.groups))
        if not all(costs.allowed[row, column] for row, column in zip(rows, formats, strict=True)):
            continue
        bits = sum(costs.effective_bits[row, column] for row, column in enumerate(formats))
        loss = sum(0.0 if c == 2 else scores[g][c] for g, c in assignment.items())
        if bits <= budget * costs.weights.sum() and not np.isnan(loss):
            losses.append(loss)
    return min(losses) if losses else None


def test_the_order_of_neighbours_is_the_seeds() -> None:
    sensitivity, costs = tables(groups=6)
    optimum = solve(sensitivity, costs, 9.0)
    first, again, other = (
        [plan.assignment for plan in neighbours(sensitivity, costs, optimum, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == len(other)
