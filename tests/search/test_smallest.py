"""The least of a resource within a limit on the predicted loss, with a proof."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from autoq.errors import InputError, QualityInfeasibleError, ResourceInfeasibleError
from autoq.search import Budget, Resource, _knapsack, _smallest, smallest, solve
from autoq.search._knapsack import Answer
from tests.search.tables import (
    ACTIVE,
    BITS_RESOURCE,
    BYTES,
    LATENCY,
    between,
    every_choice,
    several_tables,
)

ALL = (BITS_RESOURCE, BYTES, ACTIVE, LATENCY)


def limit_between(sensitivity, costs, share):
    """A loss between the worst (0) and the best (1) on a logarithmic scale."""
    worst = solve(sensitivity, costs, between(costs, BITS_RESOURCE, 0.0)).predicted_loss
    return worst * 1e-3**share


@pytest.mark.parametrize("resource", ALL)
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_trying_everything(seed, resource):
    sensitivity, costs = several_tables(seed, 5)
    losses, taken = every_choice(sensitivity, costs)
    for share in (0.1, 0.4, 0.8):
        limit = limit_between(sensitivity, costs, share)
        other = between(costs, LATENCY if resource is not LATENCY else ACTIVE, 0.6)
        for budgets in ((), other):
            fits = losses <= limit
            if budgets:
                fits &= taken[other.resource] <= other.limit
            if not fits.any():
                best = losses[taken[other.resource] <= other.limit].min()
                with pytest.raises(QualityInfeasibleError, match="cannot be reached") as caught:
                    smallest(sensitivity, costs, limit, minimise=resource, budgets=budgets)
                assert caught.value.best_loss == pytest.approx(best, rel=1e-12)
                continue
            plan = smallest(sensitivity, costs, limit, minimise=resource, budgets=budgets)
            least = taken[resource][fits].min()
            at_least = fits & (taken[resource] <= least * (1 + 1e-12))
            assert plan.takes[resource] == pytest.approx(least, rel=1e-12)
            assert plan.predicted_loss == pytest.approx(losses[at_least].min(), rel=1e-12)
            assert plan.predicted_loss <= limit
            assert plan.least.value == plan.takes[resource]
            assert plan.least.bound == pytest.approx(plan.least.value, rel=1e-9)
            assert plan.least.gap < 1e-9
            assert (plan.least.resource, plan.least.loss_limit) == (resource, limit)


def test_the_loss_of_a_plan_as_the_limit_finds_no_larger_plan():
    sensitivity, costs = several_tables(2, 50)
    for bits in (4.6, 5.5, 8.0):
        plan = solve(sensitivity, costs, bits)
        least = smallest(sensitivity, costs, plan.predicted_loss)
        assert least.effective_bits <= plan.effective_bits
        assert least.predicted_loss <= plan.predicted_loss
        assert least.budget_bits == least.effective_bits
        assert least.budgets == (Budget(resource=BITS_RESOURCE, limit=least.effective_bits),)


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_with_fewer_bits_is_as_good(seed):
    """Groups of few shapes: many plans take equally many bits, and the proof must not need them."""
    sensitivity, costs = several_tables(seed, 120)
    shapes = np.array([4096 * 6144, 4096 * 4096, 4096 * 28672, 14336 * 4096])
    weights = shapes[np.arange(120) % 4]
    bits = np.outer(weights, [8.0, 4.5, 4.25, 16.0]).astype(np.int64)
    costs = replace(costs, weights=weights, effective_bits=bits, stored_bits=bits)
    limit = limit_between(sensitivity, costs, 0.4)
    plan = smallest(sensitivity, costs, limit)
    step = np.gcd.reduce((bits - bits.min(axis=1, keepdims=True)).ravel()) / weights.sum()

    assert plan.least.gap == 0.0
    assert plan.predicted_loss <= limit
    fewer = Budget(resource=BITS_RESOURCE, limit=plan.effective_bits - step)
    assert solve(sensitivity, costs, fewer).bound > limit


def test_a_looser_limit_never_takes_more():
    tables = several_tables(3, 40)
    limits = [limit_between(*tables, share) for share in np.linspace(0.9, 0.0, 7)]
    bits = [smallest(*tables, limit).effective_bits for limit in limits]

    assert bits == sorted(bits, reverse=True)


def test_without_loss_everything_stays_or_takes_what_costs_nothing():
    sensitivity, costs = several_tables(4, 6)
    contributions = sensitivity.contributions.copy()
    contributions[:, 2, 1] = 0.0
    plan = smallest(replace(sensitivity, contributions=contributions), costs, 0.0)

    formats = list(plan.assignment.values())
    assert formats[2] == "nvfp4"
    assert formats[:2] + formats[3:] == ["none"] * 5
    assert plan.predicted_loss == plan.gap == 0.0


@pytest.mark.parametrize("limit", [-1e-9, -1.0, float("-inf")])
def test_less_than_no_loss_is_refused(limit):
    with pytest.raises(
        QualityInfeasibleError,
        match=r"a predicted loss of at most \S+ cannot be reached with the allowed formats: the "
        r"best reachable is 0; raise the limit",
    ):
        smallest(*several_tables(4, 6), limit)


def test_the_best_reachable_loss_is_named_and_does():
    sensitivity, costs = several_tables(5, 6)
    allowed = costs.allowed.copy()
    allowed[:, 3] = False
    costs = replace(costs, allowed=allowed)
    best = sensitivity.scores().min(axis=1).sum()
    with pytest.raises(QualityInfeasibleError, match="with the allowed formats") as caught:
        smallest(sensitivity, costs, best / 2)

    assert caught.value.best_loss == pytest.approx(best, rel=1e-12)
    printed = float(re.search(r"reachable is (\S+);", str(caught.value)).group(1))
    assert smallest(sensitivity, costs, printed).predicted_loss <= printed


def test_a_loss_that_the_budgets_exclude_names_the_best_within_them():
    sensitivity, costs = several_tables(6, 30)
    budgets = [Budget(resource=BITS_RESOURCE, limit=5.0), between(costs, LATENCY, 0.4)]
    best = solve(sensitivity, costs, budgets)
    with pytest.raises(
        QualityInfeasibleError,
        match=r"within 5 effective bits per weight and .* seconds of latency",
    ) as caught:
        smallest(sensitivity, costs, best.predicted_loss / 2, budgets=budgets)

    assert caught.value.best_loss == best.predicted_loss
    plan = smallest(sensitivity, costs, best.predicted_loss, budgets=budgets, minimise=ACTIVE)
    assert plan.takes[ACTIVE] <= best.takes[ACTIVE]
    assert plan.predicted_loss <= best.predicted_loss
    assert plan.takes[LATENCY] <= budgets[1].limit


def test_budgets_out_of_reach_are_refused_before_the_loss():
    tables = several_tables(6, 8)
    with pytest.raises(ResourceInfeasibleError, match="below the least"):
        smallest(*tables, 1e9, budgets=Budget(resource=LATENCY, limit=1e-9))


def test_a_large_model_has_a_proof():
    tables = several_tables(7, 20_000)
    limit = limit_between(*tables, 0.3)
    plan = smallest(*tables, limit, relative_gap=1e-6)

    assert plan.predicted_loss <= limit
    assert plan.least.gap <= 1e-6
    assert plan.least.bound <= plan.effective_bits


def test_no_number_is_refused():
    with pytest.raises(InputError, match=r"predicted loss must be a number, got nan; give"):
        smallest(*several_tables(6, 8), float("nan"))


def test_costs_that_are_missing_cannot_be_minimised():
    sensitivity, costs = several_tables(6, 8)
    with pytest.raises(InputError, match=r"holds \(effective_bits, stored_bytes\), got latency"):
        smallest(sensitivity, replace(costs, additional={}), 1.0, minimise=Resource.LATENCY)


@pytest.mark.parametrize(("share_of_step", "proved"), [(0.99, True), (0.9999, False), (1.0, False)])
def test_only_a_bound_well_within_a_step_proves_whole_totals(monkeypatch, share_of_step, proved):
    sensitivity, costs = several_tables(0, 6)
    limit = limit_between(sensitivity, costs, 0.4)
    known = smallest(sensitivity, costs, limit)
    extra = costs.effective_bits - costs.effective_bits.min(axis=1, keepdims=True)
    step = share_of_step * np.gcd.reduce(extra, axis=None) / costs.effective_bits.max()
    choice = np.array([costs.formats.index(known.assignment[group]) for group in costs.groups])
    answer = Answer(choice=choice, unproved=float(step))
    monkeypatch.setattr("autoq.search._smallest.fewest_bits", lambda *_args: None)
    monkeypatch.setattr("autoq.search._smallest.ask", lambda *_args, **_options: answer)

    least = smallest(sensitivity, costs, limit).least
    assert (least.gap == 0.0) is proved


@pytest.mark.parametrize("resource", [BITS_RESOURCE, BYTES])
@pytest.mark.parametrize("seed", range(4))
def test_halving_capacities_and_a_program_of_all_limits_agree(seed, resource, monkeypatch):
    sensitivity, costs = several_tables(seed, 40)
    limit = limit_between(sensitivity, costs, 0.2 + 0.2 * seed)
    halved = smallest(sensitivity, costs, limit, minimise=resource)
    monkeypatch.setattr("autoq.search._smallest.fewest_bits", lambda *_args: None)
    together = smallest(sensitivity, costs, limit, minimise=resource)
    assert halved.takes[resource] == together.takes[resource]
    assert halved.predicted_loss == pytest.approx(together.predicted_loss, rel=1e-9)
    assert halved.least.gap == 0.0


def test_a_limit_that_every_plan_keeps_takes_the_smallest_one():
    sensitivity, costs = several_tables(0, 12)
    floor = between(costs, BITS_RESOURCE, 0.0).limit
    assert smallest(sensitivity, costs, 1e9).effective_bits == pytest.approx(floor, rel=1e-12)


def test_what_could_not_be_proved_in_time_is_left_to_the_program(monkeypatch):
    sensitivity, costs = several_tables(1, 40)
    limit = limit_between(sensitivity, costs, 0.5)
    expected = smallest(sensitivity, costs, limit)
    solve_exactly = _knapsack.solve

    def unproved(options, *args, **named):
        answer = solve_exactly(options, *args, **named)
        return replace(answer, unproved=1.0)

    monkeypatch.setattr("autoq.search._least_total._knapsack.solve", unproved)
    calls = []
    honest = _smallest.fewest_bits

    def watched(*args):
        calls.append(honest(*args))
        monkeypatch.setattr("autoq.search._least_total._knapsack.solve", solve_exactly)
        return calls[-1]

    monkeypatch.setattr("autoq.search._smallest.fewest_bits", watched)
    assert smallest(sensitivity, costs, limit).effective_bits == expected.effective_bits
    assert calls == [None]


def test_groups_that_lose_next_to_nothing_beside_others_are_weighed_too():
    sensitivity, costs = several_tables(25, 5)
    scales = np.array([1e-24, 1e-11, 1e2, 1e-5, 1e-5])
    sensitivity = replace(sensitivity, contributions=sensitivity.contributions * scales[:, None])
    losses, taken = every_choice(sensitivity, costs)
    limit = float(sensitivity.scores()[0].min())
    plan = smallest(sensitivity, costs, limit)
    assert plan.effective_bits == pytest.approx(taken[BITS_RESOURCE][losses <= limit].min())
    assert plan.effective_bits < costs.effective_bits[:, -1].sum() / costs.weights.sum()
    assert plan.least.gap == 0.0
