"""Plans that take the interaction of groups into account are never worse by it, and stay within budget."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from autoq.errors import InputError
from autoq.search import Budget, plan_from_assignment, smallest, solve
from autoq.search._cells import Limit
from autoq.search._local import LocalSearch
from autoq.search.interactions import Interactions, improve, quadratic_loss
from tests.search.tables import (
    ACTIVE,
    BITS_RESOURCE,
    FORMATS,
    LATENCY,
    amounts,
    between,
    several_tables,
)


def tables_from_projections(seed, groups, tokens=64):
    """Scores and interactions of the same projections; a common part makes groups interact."""
    sensitivity, costs = several_tables(seed, groups)
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(tokens, 1, 1)) * rng.normal(size=(1, groups, 1))
    own = rng.normal(size=(tokens, groups, 3))
    projections = (common + own) * np.sqrt(sensitivity.scores())
    sensitivity = replace(sensitivity, contributions=projections**2 / 2)
    return sensitivity, costs, projections


def interactions_of(sensitivity, projections):
    return Interactions.from_projections(sensitivity.groups, sensitivity.formats, projections)


def loss_by_hand(projections, weight, choice):
    """Scores plus weighted pairs of format columns, straight from the projections."""
    taken = np.array(
        [
            projections[:, row, column] if column < 3 else np.zeros(len(projections))
            for row, column in enumerate(choice)
        ]
    )
    squares = (taken**2).sum(axis=0).mean() / 2
    return (1 - weight) * squares + weight * (taken.sum(axis=0) ** 2).mean() / 2


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_of_all_groups_is_half_the_mean_square_of_their_sum(weight):
    sensitivity, costs, projections = tables_from_projections(0, 7)
    found = interactions_of(sensitivity, projections)
    choice = [0, 1, 2, 3, 1, 1, 0]
    assignment = {name: FORMATS[c] for name, c in zip(costs.groups, choice, strict=True)}

    expected = loss_by_hand(projections, weight, choice)
    loss = quadratic_loss(sensitivity, found, assignment, weight=weight)
    assert loss == pytest.approx(expected, rel=1e-12)
    nothing = dict.fromkeys(costs.groups, "none")
    assert quadratic_loss(sensitivity, found, nothing, weight=weight) == 0.0


@pytest.mark.parametrize("seed", range(12))
def test_no_change_of_one_or_two_groups_is_better(seed):
    """By trying everything: the start is not beaten by accident, and the optimum bounds it."""
    sensitivity, costs, projections = tables_from_projections(seed, 5)
    found = interactions_of(sensitivity, projections)
    budgets = [between(costs, BITS_RESOURCE, 0.3), between(costs, LATENCY, 0.6)]
    start = solve(sensitivity, costs, budgets)
    plan = improve(start, found, sensitivity, costs, weight=1.0)

    rows = np.arange(5)
    every = np.array(list(itertools.product(range(4), repeat=5)))
    fits = np.ones(len(every), dtype=bool)
    for budget in budgets:
        taken = amounts(costs, budget.resource)[rows, every].sum(axis=1)
        fits &= taken + costs.fixed.get(budget.resource, 0.0) <= budget.limit
        assert plan.takes[budget.resource] <= budget.limit
    losses = np.array([loss_by_hand(projections, 1.0, choice) for choice in every])
    mine = np.array([FORMATS.index(plan.assignment[group]) for group in costs.groups])
    loss = quadratic_loss(sensitivity, found, plan.assignment, weight=1.0)
    near = fits & ((every != mine).sum(axis=1) <= 2)

    assert loss == pytest.approx(losses[near].min(), rel=1e-9)
    assert losses[fits].min() <= loss * (1 + 1e-12)
    assert loss <= quadratic_loss(sensitivity, found, start.assignment, weight=1.0)
    assert plan.bound == start.bound <= plan.predicted_loss


@pytest.mark.parametrize("weight", [0.25, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_larger_plans_improve_within_all_budgets(seed, weight):
    sensitivity, costs, projections = tables_from_projections(seed, 40)
    found = interactions_of(sensitivity, projections)
    budgets = [
        between(costs, BITS_RESOURCE, 0.15),
        between(costs, ACTIVE, 0.15),
        between(costs, LATENCY, 0.4),
    ]
    start = solve(sensitivity, costs, budgets)
    plan = improve(start, found, sensitivity, costs, budgets, weight=weight)
    before, after = (
        quadratic_loss(sensitivity, found, each.assignment, weight=weight) for each in (start, plan)
    )

    assert after < before  # groups share a part, so there is something to gain
    assert plan.predicted_loss >= start.predicted_loss * (1 - 1e-9)
    assert plan.gap == pytest.approx(1 - start.bound / plan.predicted_loss)
    assert plan.budgets == start.budgets
    for budget in budgets:
        assert plan.takes[budget.resource] <= budget.limit
    again = improve(plan, found, sensitivity, costs, weight=weight)
    assert again is plan


def test_without_weight_the_linear_optimum_stays():
    sensitivity, costs, projections = tables_from_projections(1, 30)
    start = solve(sensitivity, costs, 5.5)
    found = interactions_of(sensitivity, projections)

    assert improve(start, found, sensitivity, costs, weight=0.0) is start


def test_groups_whose_errors_cancel_are_quantised_together():
    """g0 and g1 have opposite errors: apart each costs 1/2, together nothing."""
    sensitivity, costs = several_tables(0, 3)
    projections = np.zeros((2, 3, 3))
    projections[:, 0] = np.array([[1.0], [-1.0]])
    projections[:, 1] = np.array([[-1.0], [1.0]])
    projections[:, 2] = np.array([[0.9], [0.9]])
    sensitivity = replace(sensitivity, contributions=projections**2 / 2)
    weights = np.array([64, 64, 64])
    bits = np.outer(weights, [8.0, 4.5, 4.25, 16.0]).astype(np.int64)
    costs = replace(costs, weights=weights, effective_bits=bits, stored_bits=bits, additional={})
    start = solve(sensitivity, costs, (4.25 * 2 + 16) / 3)
    assert start.assignment["g00002"] != "none"  # scores alone quantise the one of least score
    found = interactions_of(sensitivity, projections)
    plan = improve(start, found, sensitivity, costs, weight=1.0)

    assert plan.assignment["g00002"] == "none"
    assert quadratic_loss(sensitivity, found, plan.assignment, weight=1.0) == 0.0


def test_the_order_of_the_interactions_does_not_matter():
    sensitivity, costs, projections = tables_from_projections(3, 20)
    start = solve(sensitivity, costs, 5.0)
    plan = improve(start, interactions_of(sensitivity, projections), sensitivity, costs, weight=1.0)
    order = np.random.default_rng(0).permutation(20)
    moved = Interactions.from_projections(
        [sensitivity.groups[row] for row in order],
        sensitivity.formats[::-1],
        projections[:, order, ::-1],
    )

    assert improve(start, moved, sensitivity, costs, weight=1.0).assignment == plan.assignment


def test_cells_that_may_not_be_taken_are_not():
    sensitivity, costs, projections = tables_from_projections(4, 12)
    projections[:, ::2, 1:] = np.nan
    sensitivity = replace(sensitivity, contributions=projections**2 / 2)
    start = solve(sensitivity, costs, 8.0)
    found = interactions_of(sensitivity, projections)
    plan = improve(start, found, sensitivity, costs, weight=1.0)

    formats = list(plan.assignment.values())
    assert set(formats[::2]) <= {"fp8", "none"}
    before, after = (
        quadratic_loss(sensitivity, found, each.assignment, weight=1.0) for each in (start, plan)
    )
    assert after <= before


def test_a_limit_on_the_loss_is_kept():
    sensitivity, costs, projections = tables_from_projections(5, 20)
    limit = solve(sensitivity, costs, 5.0).predicted_loss * 1.01
    start = smallest(sensitivity, costs, limit)
    plan = improve(start, interactions_of(sensitivity, projections), sensitivity, costs, weight=1.0)

    assert plan.predicted_loss <= limit
    assert plan.effective_bits <= start.effective_bits
    assert plan.least == start.least
    loose = (Budget(resource=BITS_RESOURCE, limit=10.0),)
    wasteful = replace(start, budgets=loose, least=replace(start.least, value=16.0, gap=0.5))
    plan = improve(
        wasteful, interactions_of(sensitivity, projections), sensitivity, costs, weight=1.0
    )
    assert plan is not wasteful
    assert plan.least.value == plan.effective_bits
    assert plan.least.gap == pytest.approx(1 - plan.least.bound / plan.effective_bits)


def test_a_proof_of_the_least_is_not_carried_over_to_other_budgets():
    sensitivity, costs, projections = tables_from_projections(5, 20)
    limit = solve(sensitivity, costs, 5.0).predicted_loss
    start = smallest(sensitivity, costs, limit)
    found = interactions_of(sensitivity, projections)
    plan = improve(start, found, sensitivity, costs, 10.0, weight=1.0)

    assert plan.effective_bits > start.least.value
    assert plan.least is None
    assert plan.predicted_loss <= limit


def test_no_limit_on_the_loss_limits_nothing():
    sensitivity, costs, projections = tables_from_projections(5, 20)
    least = smallest(sensitivity, costs, float("inf"))
    start = replace(least, budgets=(between(costs, BITS_RESOURCE, 0.3),))
    found = interactions_of(sensitivity, projections)
    plan = improve(start, found, sensitivity, costs, weight=1.0)
    free = improve(replace(start, least=None), found, sensitivity, costs, weight=1.0)

    assert plan.assignment == free.assignment != start.assignment


def test_another_budget_than_the_plans_own_has_its_own_bound():
    sensitivity, costs, projections = tables_from_projections(6, 30)
    start = solve(sensitivity, costs, 4.8)
    found = interactions_of(sensitivity, projections)
    plan = improve(start, found, sensitivity, costs, 6.0, weight=1.0)

    assert 4.8 < plan.effective_bits <= 6.0
    assert plan.bound <= solve(sensitivity, costs, 6.0).predicted_loss
    with pytest.raises(InputError, match=r"must be within its budgets; solve with them first"):
        improve(plan, found, sensitivity, costs, 4.8, weight=1.0)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_weights_out_of_range_are_refused(weight):
    sensitivity, costs, projections = tables_from_projections(6, 4)
    start = solve(sensitivity, costs, 8.0)
    with pytest.raises(InputError, match=r"must be in \[0, 1\], got"):
        improve(start, interactions_of(sensitivity, projections), sensitivity, costs, weight=weight)


def test_interactions_of_another_model_are_refused():
    sensitivity, costs, projections = tables_from_projections(6, 4)
    start = solve(sensitivity, costs, 8.0)
    other = Interactions.from_projections(sensitivity.groups[:3], FORMATS[:3], projections[:, :3])
    with pytest.raises(InputError, match=r"all groups of the scores, got none for 'g00003'; take"):
        improve(start, other, sensitivity, costs, weight=1.0)
    with pytest.raises(InputError, match=r"must be \[groups, formats\] twice, \(4, 3, 4, 3\), got"):
        Interactions(groups=sensitivity.groups, formats=FORMATS[:3], gram=np.zeros((3, 3, 3, 3)))


def test_a_start_that_breaks_a_rule_is_refused():
    sensitivity, costs, projections = tables_from_projections(6, 4)
    start = plan_from_assignment(sensitivity, costs, dict.fromkeys(costs.groups, "nvfp4"))
    allowed = costs.allowed.copy()
    allowed[2, 1] = False
    found = interactions_of(sensitivity, projections)
    with pytest.raises(InputError, match=r"group 'g00002' cannot take nvfp4; start from a plan of"):
        improve(
            start,
            found,
            sensitivity,
            replace(costs, allowed=allowed),
            Budget(resource=BITS_RESOURCE, limit=8.0),
            weight=1.0,
        )


def descent(scores, amounts, most, start):
    """Where steepest descent within one limit on a sum of floats ends, without interactions."""
    scores, start = np.array(scores), np.array(start)
    limit = Limit(amounts=np.array(amounts), most=most)
    search = LocalSearch(
        scores=scores,
        pairs=np.zeros((*scores.shape, *scores.shape)),
        usable=np.ones(scores.shape, dtype=bool),
        limits=[limit],
    )
    return search.from_choice(start).tolist()


def test_limits_on_sums_of_floats_are_kept_exactly_and_used_up():
    # Ten times 0.1 is 1 when rounded once, and 0.99... or 1.00... when added one by one.
    gain, takes = [[0.0, -1.0]] * 10, [[0.0, 0.1]] * 10
    assert sum(descent(gain, takes, 1.0, [0] * 10)) == 10
    assert sum(descent(gain, takes, np.nextafter(1.0, 0.0), [0] * 10)) == 9

    # 0.3 - 0.1 is a hair more than what the limit leaves beside 0.1: only the sums fit.
    swap = [[0.0, -1.0], [0.0, -5.0]], [[0.0, 0.1], [0.0, 0.3]]
    assert 0.3 - 0.1 != 0.2
    assert descent(*swap, 0.3, [1, 0]) == [0, 1]
    assert descent(*swap, np.nextafter(0.3, 0.0), [1, 0]) == [1, 0]
