"""The frontier is made of plans that nothing beats."""

import itertools

import numpy as np
import pytest

from autoq.search import CostTable, SensitivityTable, _highs
from autoq.search.frontier import frontier
from autoq.search.solver import reachable_bits, solve

FORMATS = ("fp8", "nvfp4", "none")


def random_tables(seed, groups=30, scale=1e-9):
    rng = np.random.default_rng(seed)
    names = tuple(f"g{row:03d}" for row in range(groups))
    scores = scale * rng.lognormal(0, 1.5, (groups, 1)) * [0.03, 1.0]
    contributions = scores * rng.lognormal(0, 0.2, (4, groups, 2))
    weights = np.array([4096, 6144, 28672, 14336])[np.arange(groups) % 4] * 64
    bits = np.outer(weights, [8.0, 4.5, 16.0]).astype(np.int64)
    sensitivity = SensitivityTable(
        groups=names,
        formats=FORMATS[:2],
        contributions=contributions,
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
        allowed=np.ones(bits.shape, dtype=bool),
    )
    return sensitivity, costs


@pytest.mark.parametrize("seed", range(4))
def test_bits_rise_losses_fall_and_the_ends_are_reached(seed):
    tables = random_tables(seed)
    plans = frontier(*tables, points=24)
    bits = [plan.effective_bits for plan in plans]
    losses = [plan.predicted_loss for plan in plans]

    assert (np.diff(bits) > 0).all()
    assert (np.diff(losses) < 0).all()
    assert (bits[0], bits[-1]) == reachable_bits(*tables) == (4.5, 16.0)
    assert losses[-1] == 0
    assert len(plans) >= 24


@pytest.mark.parametrize("seed", range(4))
def test_no_point_is_above_the_exact_solution_at_its_bits(seed):
    tables = random_tables(seed)
    for plan in frontier(*tables, points=12, relative_gap=0.0):
        exact = solve(*tables, plan.effective_bits)
        assert plan.predicted_loss == pytest.approx(exact.predicted_loss, rel=1e-9, abs=0)
        assert plan.bound <= exact.predicted_loss
        assert plan.gap < 1e-8


def test_within_the_gap_asked_for_points_cost_no_search(monkeypatch):
    tables = random_tables(3, groups=400)
    exact = frontier(*tables, points=6, relative_gap=0.0)
    floor_loss = exact[0].predicted_loss

    def unwanted(*args, **kwargs):
        raise AssertionError("HiGHS was asked")

    monkeypatch.setattr(_highs, "minimise", unwanted)
    for plan in frontier(*tables, points=6, relative_gap=1e-2):
        assert plan.predicted_loss - plan.bound <= max(
            1e-2 * plan.predicted_loss, 1e-6 * floor_loss
        )


def test_no_budget_has_a_better_plan_than_the_points_around_it_allow():
    tables = random_tables(7)
    plans = frontier(*tables, points=12)
    for left, right in itertools.pairwise(plans):
        between = solve(*tables, (left.effective_bits + right.effective_bits) / 2)
        assert right.predicted_loss <= between.predicted_loss <= left.predicted_loss


def test_points_limit_what_is_kept():
    tables = random_tables(0)

    assert 2 <= len(frontier(*tables, points=2)) <= 4
    assert len(frontier(*tables, points=16)) <= 32


def test_one_plan_when_there_is_nothing_to_decide():
    sensitivity, costs = random_tables(0, groups=1)
    free = SensitivityTable(
        groups=sensitivity.groups,
        formats=sensitivity.formats,
        contributions=np.zeros_like(sensitivity.contributions),
        unit="relative",
        estimator="test",
    )
    plans = frontier(free, costs)

    assert [plan.effective_bits for plan in plans] == [4.5]
    assert plans[0].gap == 0


def test_out_of_time_the_points_still_bound_the_optimum():
    tables = random_tables(3)
    for plan in frontier(*tables, points=8, time_limit_seconds=0.0):
        exact = solve(*tables, plan.effective_bits)
        assert plan.bound <= exact.predicted_loss <= plan.predicted_loss


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match=r"points must be >= 2, got 1"):
        frontier(*random_tables(0), points=1)
