"""Diverse plans are good, allowed, different, and the same for the same seed."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from autoq.errors import ResourceInfeasibleError
from autoq.search import Budget, solve
from autoq.search.diverse import diverse_plans
from tests.search.tables import (
    BITS_RESOURCE,
    FORMATS,
    LATENCY,
    between,
    every_choice,
    several_tables,
)


def difference(costs, first, second):
    """Fraction of the weights in another format."""
    differs = [first.assignment[group] != second.assignment[group] for group in costs.groups]
    return costs.weights[np.array(differs)].sum() / costs.weights.sum()


@pytest.mark.parametrize("noise", [0.3, 1.5], ids=["sure", "uncertain"])
@pytest.mark.parametrize("several", [False, True], ids=["one_budget", "several"])
def test_all_plans_are_within_budgets_and_slack_and_apart(several, noise):
    sensitivity, costs = several_tables(1, 40, sequences=12, noise=noise)
    budgets = [Budget(resource=BITS_RESOURCE, limit=5.5)]
    if several:
        budgets.append(between(costs, LATENCY, 0.35))
    plans = diverse_plans(
        sensitivity, costs, budgets, count=6, loss_slack=0.04, least_difference=0.02
    )
    best = solve(sensitivity, costs, budgets)

    assert len(plans) == 6
    assert plans[0] == best
    for plan in plans:
        assert plan.predicted_loss <= best.predicted_loss * 1.04 * (1 + 1e-12)
        assert plan.bound == pytest.approx(best.bound, rel=1e-12)
        assert plan.budgets == best.budgets
        for budget in budgets:
            assert plan.takes[budget.resource] <= budget.limit
    for first, second in itertools.combinations(plans, 2):
        assert difference(costs, first, second) >= 0.02


def test_uncertain_groups_are_those_that_differ():
    """Half the groups have scores that hardly vary over sequences: there the plans agree."""
    sensitivity, costs = several_tables(2, 40, sequences=16, noise=1.0)
    contributions = sensitivity.contributions.copy()
    contributions[:, ::2] = contributions[:, ::2].mean(axis=0)
    sensitivity = replace(sensitivity, contributions=contributions)
    plans = diverse_plans(sensitivity, costs, 5.5, count=6, loss_slack=0.2)
    names = costs.groups

    changed = np.array(
        [
            sum(plan.assignment[name] != plans[0].assignment[name] for plan in plans[1:])
            for name in names
        ]
    )
    assert changed[1::2].sum() > changed[::2].sum()


def test_the_seed_decides():
    tables = several_tables(3, 25, sequences=12, noise=1.0)

    def assignments(seed):
        plans = diverse_plans(*tables, 5.0, count=4, loss_slack=0.1, seed=seed)
        return [plan.assignment for plan in plans]

    assert assignments(0) == assignments(0)
    assert assignments(0) != assignments(1)


def test_one_sequence_leaves_the_cuts():
    """Nothing to resample: the next plans are the best that are far enough, in order."""
    sensitivity, costs = several_tables(4, 5)
    budget = between(costs, BITS_RESOURCE, 0.4)
    plans = diverse_plans(
        sensitivity, costs, budget, count=3, loss_slack=10.0, least_difference=1e-9
    )
    losses, taken = every_choice(sensitivity, costs)
    best = np.sort(losses[taken[BITS_RESOURCE] <= budget.limit])[:3]

    # The plans after the first are solved to a thousandth of what they lose.
    assert [plan.predicted_loss for plan in plans] == pytest.approx(best, rel=2e-3)


def test_fewer_plans_come_back_where_no_more_exist():
    sensitivity, costs = several_tables(5, 4, sequences=4)
    few = diverse_plans(sensitivity, costs, 6.0, count=50, loss_slack=0.0)
    some = diverse_plans(sensitivity, costs, 6.0, count=20, loss_slack=0.2, least_difference=1e-9)
    losses, taken = every_choice(sensitivity, costs)
    good = (taken[BITS_RESOURCE] <= 6.0) & (losses <= some[0].predicted_loss * 1.2)

    assert len(few) == 1
    assert 1 < len(some) == good.sum() < 20


def test_one_plan_is_the_optimum():
    tables = several_tables(6, 30, sequences=4)

    assert diverse_plans(*tables, 5.0, count=1) == [solve(*tables, 5.0)]


def test_budgets_out_of_reach_are_refused():
    with pytest.raises(ResourceInfeasibleError, match="below the least"):
        diverse_plans(*several_tables(6, 4), Budget(resource=LATENCY, limit=1e-9), count=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"count": 0}, r"count must be >= 1, got 0", id="count"),
        pytest.param({"loss_slack": -0.1}, r"loss_slack must be >= 0, got -0\.1", id="slack"),
        pytest.param({"least_difference": 0.0}, r"in \(0, 1\], got 0\.0", id="difference"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        diverse_plans(*several_tables(6, 4), 6.0, **{"count": 2, **options})


def test_formats_that_may_not_be_taken_are_not():
    sensitivity, costs = several_tables(7, 30, sequences=8, noise=1.0)
    allowed = costs.allowed.copy()
    allowed[::3, FORMATS.index("nvfp4")] = False
    plans = diverse_plans(
        sensitivity, replace(costs, allowed=allowed), 6.0, count=5, loss_slack=0.2
    )

    assert len(plans) > 1
    for plan in plans:
        assert "nvfp4" not in [plan.assignment[name] for name in costs.groups[::3]]
