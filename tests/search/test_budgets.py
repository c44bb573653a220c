"""Several budgets at once: the best plan within all of them, or a refusal that says what would do."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from autoq.errors import BudgetInfeasibleError, InputError, ResourceInfeasibleError
from autoq.search import Budget, Resource, _highs, frontier, plan_from_assignment, solve
from tests.search.tables import (
    ACTIVE,
    BITS_RESOURCE,
    BYTES,
    FORMATS,
    LATENCY,
    amounts,
    best_by_trying,
    between,
    every_choice,
    several_tables,
)

ALL = (BITS_RESOURCE, BYTES, ACTIVE, LATENCY)


def random_budgets(costs, seed, low, high):
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(ALL), rng.integers(1, len(ALL) + 1), replace=False)
    return [between(costs, ALL[index], rng.uniform(low, high)) for index in chosen]


def best_by_plain_highs(sensitivity, costs, budgets):
    """The least loss by scipy's HiGHS on the whole 0-1 program."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    scores = np.concatenate([sensitivity.scores(), np.zeros((len(costs.groups), 1))], axis=1)
    shape = scores.shape
    constraints = [
        LinearConstraint(kron(np.eye(shape[0]), np.ones((1, shape[1])), format="csr"), 1, 1)
    ]
    for budget in budgets:
        row = amounts(costs, budget.resource).reshape(1, -1)
        room = budget.limit - costs.fixed.get(budget.resource, 0.0)
        constraints.append(LinearConstraint(csr_array(row * (1000 / room)), -np.inf, 1000))
    with _highs.quiet_stdout():
        found = milp(
            scores.ravel(),
            integrality=np.ones(scores.size),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    return found.fun


@pytest.mark.parametrize("scale", [1e-9, 1.0])
@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_trying_everything(seed, scale):
    sensitivity, costs = several_tables(seed, 5, scale=scale)
    budgets = random_budgets(costs, seed, 0.05, 0.8)
    best = best_by_trying(sensitivity, costs, budgets)
    if best == float("inf"):
        with pytest.raises(ResourceInfeasibleError, match=r"cannot be met together with"):
            solve(sensitivity, costs, budgets)
        return
    plan = solve(sensitivity, costs, budgets)

    assert plan.predicted_loss == pytest.approx(best, rel=1e-12, abs=0)
    assert plan.bound <= best * (1 + 1e-12)
    assert plan.gap < 1e-8
    for budget in budgets:
        assert plan.takes[budget.resource] <= budget.limit


@pytest.mark.parametrize("seed", range(20))
def test_tight_budgets_are_refused_exactly_when_nothing_fits(seed):
    sensitivity, costs = several_tables(100 + seed, 5)
    budgets = random_budgets(costs, seed, 0.0, 0.1)
    best = best_by_trying(sensitivity, costs, budgets)
    try:
        plan = solve(sensitivity, costs, budgets)
    except ResourceInfeasibleError as refusal:
        assert best == float("inf")
        _, taken = every_choice(sensitivity, costs)
        fits = np.ones(len(taken[BYTES]), dtype=bool)
        named = [budget for budget in budgets if budget.resource.value in _spoken(refusal.within)]
        assert named
        for budget in named:
            fits &= taken[budget.resource] <= budget.limit * (1 + 1e-13)
        refused = Resource(refusal.resource)
        assert refusal.least == pytest.approx(taken[refused][fits].min(), rel=1e-12)
        assert refusal.least > refusal.limit
    else:
        assert plan.predicted_loss == pytest.approx(best, rel=1e-12, abs=0)


def _spoken(within):
    """Resources named in a refusal's text."""
    units = {
        "effective bits per weight": "effective_bits",
        "stored bytes": "stored_bytes",
        "active bits per weight": "active_bits",
        "seconds of latency": "latency_seconds",
    }
    return [name for unit, name in units.items() if unit in within]


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_plain_highs_on_larger_problems(seed):
    sensitivity, costs = several_tables(seed, 60)
    budgets = [
        between(costs, BITS_RESOURCE, 0.15),
        between(costs, ACTIVE, 0.12),
        between(costs, LATENCY, 0.3),
    ]
    plan = solve(sensitivity, costs, budgets)
    best = best_by_plain_highs(sensitivity, costs, budgets)

    # HiGHS's own tolerances leave 1e-6 of its unscaled rows and objective.
    assert plan.predicted_loss == pytest.approx(best, rel=1e-5)
    assert plan.bound <= plan.predicted_loss
    assert plan.gap < 1e-9


def test_twenty_thousand_groups_within_three_budgets_have_a_proof():
    sensitivity, costs = several_tables(1, 20_000)
    budgets = [
        between(costs, BITS_RESOURCE, 0.15),
        between(costs, ACTIVE, 0.12),
        between(costs, LATENCY, 0.25),
    ]
    plan = solve(sensitivity, costs, budgets, relative_gap=1e-5)

    assert plan.gap <= 1e-5
    for budget in budgets:
        assert plan.takes[budget.resource] <= budget.limit


@pytest.mark.parametrize("resource", ALL)
def test_asking_for_exactly_what_a_plan_takes_finds_it(resource):
    sensitivity, costs = several_tables(3, 40)
    for share in (0.1, 0.3, 0.7):
        plan = solve(sensitivity, costs, between(costs, resource, share))
        again = solve(sensitivity, costs, Budget(resource=resource, limit=plan.takes[resource]))
        assert again.predicted_loss == plan.predicted_loss
        assert again.takes[resource] <= plan.takes[resource]


@pytest.mark.parametrize("resource", [ACTIVE, LATENCY])
def test_an_option_that_takes_all_that_is_left_is_not_rounded_away(resource):
    for seed in range(150):
        sensitivity, costs = several_tables(seed, 3)
        least = {group: FORMATS[row.argmin()] for group, row in named(costs, resource)}
        wanted = {**least, costs.groups[seed % 3]: "fp8"}
        takes = plan_from_assignment(sensitivity, costs, wanted)
        plan = solve(sensitivity, costs, Budget(resource=resource, limit=takes.takes[resource]))
        assert plan.predicted_loss <= takes.predicted_loss
        assert plan.bound <= takes.predicted_loss
        assert plan.takes[resource] <= takes.takes[resource]


def named(costs, resource):
    """Each group's amounts of a resource."""
    return zip(costs.groups, amounts(costs, resource), strict=True)


def test_bounds_of_given_assignments_use_every_bit_of_the_budget():
    for seed in range(20):
        sensitivity, costs = several_tables(seed, 12)
        smallest = dict.fromkeys(costs.groups, "w4a8_awq")
        for best in frontier(sensitivity, costs, points=20):
            plan = plan_from_assignment(sensitivity, costs, smallest, best.effective_bits)
            assert plan.bound <= best.predicted_loss + 1e-13 * plan.predicted_loss


@pytest.mark.parametrize("resource", ALL)
def test_a_looser_budget_never_predicts_a_worse_plan(resource):
    sensitivity, costs = several_tables(4, 30, scale=1e-7)
    other = between(costs, LATENCY if resource is not LATENCY else ACTIVE, 0.4)
    budgets = [between(costs, resource, share) for share in np.linspace(0.15, 0.9, 6)]
    losses = [solve(sensitivity, costs, [budget, other]).predicted_loss for budget in budgets]

    assert losses == sorted(losses, reverse=True)


def test_budgets_that_do_not_limit_change_nothing():
    sensitivity, costs = several_tables(5, 40)
    alone = solve(sensitivity, costs, 5.5)
    loose = [
        Budget(resource=BITS_RESOURCE, limit=5.5),
        Budget(resource=LATENCY, limit=float("inf")),
        Budget(resource=BYTES, limit=1e12),
        Budget(resource=ACTIVE, limit=alone.takes[ACTIVE]),
    ]
    plan = solve(sensitivity, costs, loose)

    assert plan.assignment == alone.assignment
    assert plan.budgets == (loose[0], loose[2], loose[3], loose[1])  # in the order of resources
    assert plan.budget_bits == 5.5


def test_without_any_limit_the_least_loss_is_found():
    plan = solve(*several_tables(5, 10), Budget(resource=LATENCY, limit=1e9))

    assert plan.predicted_loss == plan.gap == 0.0
    assert set(plan.assignment.values()) == {"none"}
    assert plan.budget_bits == plan.effective_bits == 16.0


def test_plan_says_what_it_takes_of_everything():
    sensitivity, costs = several_tables(6, 2)
    plan = solve(sensitivity, costs, Budget(resource=BYTES, limit=1e9))
    rows, last = np.arange(2), FORMATS.index("none")

    assert set(plan.takes) == set(ALL)
    assert plan.takes[BITS_RESOURCE] == 16.0
    assert plan.takes[BYTES] == (costs.weights.sum() * 16 + 128) / 8 + 4096
    assert plan.takes[LATENCY] == pytest.approx(costs.additional[LATENCY][rows, last].sum() + 1e-4)
    assert plan.takes[ACTIVE] == pytest.approx(16.0)


def test_bytes_count_what_is_not_searched():
    sensitivity, costs = several_tables(6, 20)
    without = replace(costs, fixed={})
    limit = between(without, BYTES, 0.2).limit

    plan = solve(sensitivity, costs, Budget(resource=BYTES, limit=limit + 4096))
    other = solve(sensitivity, without, Budget(resource=BYTES, limit=limit))
    assert plan.assignment == other.assignment
    assert plan.takes[BYTES] == other.takes[BYTES] + 4096 <= limit + 4096


def test_the_order_of_groups_and_budgets_does_not_matter():
    sensitivity, costs = several_tables(7, 25)
    budgets = [between(costs, ACTIVE, 0.2), between(costs, LATENCY, 0.3)]
    order = np.random.default_rng(0).permutation(25)
    moved = replace(
        costs,
        groups=tuple(costs.groups[row] for row in order),
        **{
            name: getattr(costs, name)[order]
            for name in ("weights", "effective_bits", "stored_bits", "peer_bits", "allowed")
        },
        additional={resource: table[order] for resource, table in costs.additional.items()},
    )
    plan = solve(sensitivity, costs, budgets)
    other = solve(sensitivity, moved, budgets[::-1])

    assert other.assignment == plan.assignment
    assert other.takes == plan.takes


@pytest.mark.parametrize("resource", [BYTES, ACTIVE, LATENCY])
def test_a_budget_below_its_floor_names_the_least_that_would_do(resource):
    sensitivity, costs = several_tables(8, 12)
    floor = between(costs, resource, 0.0).limit
    with pytest.raises(
        ResourceInfeasibleError, match=r"is below the least that the allowed formats reach"
    ) as caught:
        solve(sensitivity, costs, Budget(resource=resource, limit=floor * 0.99))

    assert caught.value.least == pytest.approx(floor, rel=1e-12)
    printed = float(re.search(r"formats reach, (\S+)", str(caught.value)).group(1))
    assert printed == pytest.approx(floor, rel=1e-4)
    plan = solve(sensitivity, costs, Budget(resource=resource, limit=printed))
    assert plan.takes[resource] <= printed


def test_bits_out_of_reach_are_refused_beside_other_budgets():
    sensitivity, costs = several_tables(8, 12)
    with pytest.raises(BudgetInfeasibleError, match=r"a budget of 3 effective bits is outside"):
        solve(
            sensitivity,
            costs,
            [between(costs, LATENCY, 0.5), Budget(resource=BITS_RESOURCE, limit=3.0)],
        )


def test_not_a_number_is_refused():
    sensitivity, costs = several_tables(8, 12)
    with pytest.raises(ResourceInfeasibleError, match=r"a budget of nan seconds of latency"):
        solve(sensitivity, costs, Budget(resource=LATENCY, limit=float("nan")))


def test_of_three_budgets_only_those_in_conflict_are_named():
    """Fewest bits and least latency exclude each other; bytes have nothing to do with it."""
    sensitivity, costs = several_tables(9, 12)
    speeds = np.tile([1.0, 3.0, 4.0, 2.0], (12, 1)) * 1e-6
    costs = replace(costs, additional={LATENCY: speeds}, fixed={})
    budgets = [
        Budget(resource=BYTES, limit=between(costs, BYTES, 0.9).limit),
        Budget(resource=BITS_RESOURCE, limit=4.5),
        Budget(resource=LATENCY, limit=20e-6),
    ]
    with pytest.raises(ResourceInfeasibleError) as caught:
        solve(sensitivity, costs, budgets)

    assert "seconds of latency cannot be met together with 4.5 effective bits" in str(caught.value)
    assert "bytes" not in str(caught.value)
    least = caught.value.least
    again = solve(sensitivity, costs, [*budgets[:2], Budget(resource=LATENCY, limit=least)])
    assert again.takes[LATENCY] == least


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        pytest.param([], r"at least one budget, got none; give effective bits", id="none"),
        pytest.param(
            [Budget(resource=BYTES, limit=1e6), Budget(resource=BYTES, limit=2e6)],
            r"each resource may have one budget, got 1e\+06 and 2e\+06 for stored_bytes; give the",
            id="twice",
        ),
        pytest.param(
            [Budget(resource=LATENCY, limit=1.0)],
            r"limit only what the cost table holds \(effective_bits, stored_bytes\), got "
            r"latency_seconds; build the costs with it first",
            id="unknown",
        ),
    ],
)
def test_budgets_that_cannot_be_used_are_refused(budgets, message):
    sensitivity, costs = several_tables(10, 4)
    with pytest.raises(InputError, match=message):
        solve(sensitivity, replace(costs, additional={}), budgets)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_costs_that_are_no_costs_are_refused(value):
    sensitivity, costs = several_tables(10, 4)
    table = costs.additional[LATENCY].copy()
    table[2, 1] = value
    with pytest.raises(InputError, match=r"latency_seconds must be finite and not negative, got"):
        solve(sensitivity, replace(costs, additional={LATENCY: table}), 6.0)


def test_out_of_time_the_plan_fits_and_its_bound_is_true():
    sensitivity, costs = several_tables(11, 60)
    budgets = [between(costs, ACTIVE, 0.15), between(costs, LATENCY, 0.3)]
    exact = solve(sensitivity, costs, budgets)
    plan = solve(sensitivity, costs, budgets, time_limit_seconds=0.0)

    assert plan.bound <= exact.predicted_loss <= plan.predicted_loss
    assert exact.gap <= plan.gap < 0.1
    for budget in budgets:
        assert plan.takes[budget.resource] <= budget.limit


def test_a_choice_that_oversteps_by_rounding_is_not_used(monkeypatch):
    """HiGHS may answer a hair over a budget; the plan must not follow it."""
    minimise = _highs.minimise
    calls = []

    def generous(objective, rows, row_bounds, **options):
        calls.append(row_bounds[0][-1])
        if len(calls) % 2:
            row_bounds = tuple(np.concatenate([side[:-1], [side[-1] * 1.2]]) for side in row_bounds)
        return minimise(objective, rows, row_bounds, **options)

    sensitivity, costs = several_tables(12, 40)
    budget = between(costs, LATENCY, 0.3)
    honest = solve(sensitivity, costs, budget)
    monkeypatch.setattr(_highs, "minimise", generous)
    plan = solve(sensitivity, costs, budget)

    assert len(calls) >= 2
    assert plan.takes[LATENCY] <= budget.limit
    assert plan.bound <= honest.predicted_loss <= plan.predicted_loss
