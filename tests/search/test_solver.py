"""Plans are optimal at every scale of the scores, and say how far from optimal they can be."""

import contextlib
import ctypes
import itertools
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.errors import BudgetInfeasibleError, InputError
from autoq.search import (
    Budget,
    CostTable,
    Resource,
    SensitivityTable,
    _highs,
    _knapsack,
    _relaxation,
    _states,
)
from autoq.search.solver import (
    check_budget,
    plan_from_assignment,
    reachable_bits,
    solve,
    uniform_plan,
)

FORMATS = ("fp8", "nvfp4", "w4a8_awq", "none")
BITS = np.array([8.0, 4.5, 4.25, 16.0])


def make_tables(scores, weights, allowed=None, contributions=None):
    """Tables of groups g0, g1, ... from scores [groups, 3] and weights [groups]."""
    scores = np.asarray(scores, dtype=np.float64)
    weights = np.asarray(weights, dtype=np.int64)
    groups = tuple(f"g{row:03d}" for row in range(len(weights)))
    bits = np.outer(weights, BITS).astype(np.int64)
    sensitivity = SensitivityTable(
        groups=groups,
        formats=FORMATS[:3],
        contributions=scores[None] if contributions is None else contributions,
        unit="relative",
        estimator="test",
    )
    costs = CostTable(
        groups=groups,
        formats=FORMATS,
        weights=weights,
        effective_bits=bits,
        stored_bits=bits + 64,
        peer_bits=np.outer(weights, [8.0, 4.5, 4.0, 16.0]),
        allowed=np.ones(bits.shape, dtype=bool) if allowed is None else allowed,
    )
    return sensitivity, costs


def random_tables(seed, groups, scale=1.0, spread=1.5):
    rng = np.random.default_rng(seed)
    scores = scale * rng.lognormal(0, spread, (groups, 1)) * rng.lognormal(0, 0.5, (groups, 3))
    scores[:, 0] *= 0.03
    return make_tables(scores, rng.integers(1, 2000, groups) * 4)


def brute_force(sensitivity, costs, budget_bits):
    """The least loss of all assignments within the budget."""
    scores = np.concatenate([sensitivity.scores(), np.zeros((len(costs.groups), 1))], axis=1)
    rows = np.arange(len(costs.groups))
    every = np.array(list(itertools.product(range(len(FORMATS)), repeat=len(rows))))
    bits = costs.effective_bits[rows, every].sum(axis=1)
    return scores[rows, every].sum(axis=1)[bits / costs.weights.sum() <= budget_bits].min()


def best_by_dynamic_programming(losses, bits, capacity):
    """The least loss within a small integer capacity, exact."""
    best = np.zeros(capacity + 1)
    for group_losses, group_bits in zip(losses, bits, strict=True):
        following = np.full(capacity + 1, np.inf)
        for loss, size in zip(group_losses, group_bits, strict=True):
            if size <= capacity:
                shifted = best[: capacity + 1 - size] + loss
                following[size:] = np.minimum(following[size:], shifted)
        best = following
    return best[capacity]


@pytest.mark.parametrize("scale", [1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_brute_force_at_every_scale(scale, seed):
    sensitivity, costs = random_tables(seed, 6, scale)
    for budget in (4.3, 4.8, 6.0, 9.0, 15.9):
        plan = solve(sensitivity, costs, budget)
        best = brute_force(sensitivity, costs, budget)
        assert plan.predicted_loss == pytest.approx(best, rel=1e-12, abs=0)
        assert plan.bound <= best * (1 + 1e-12)
        assert 0 <= plan.gap < 1e-8
        assert plan.effective_bits <= budget


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_brute_force_when_one_table_spans_many_scales(seed):
    sensitivity, costs = random_tables(seed, 6, spread=12)
    for budget in (4.5, 6.0, 9.0):
        best = brute_force(sensitivity, costs, budget)
        assert solve(sensitivity, costs, budget).predicted_loss == pytest.approx(best, rel=1e-12)


def test_a_power_of_two_scales_loss_and_bound_but_not_the_assignment():
    plans = [solve(*random_tables(3, 60, scale), 5.5) for scale in (1.0, 2.0**-50, 2.0**20)]

    assert plans[0].assignment == plans[1].assignment == plans[2].assignment
    assert plans[1].predicted_loss == plans[0].predicted_loss * 2.0**-50
    assert plans[2].bound == plans[0].bound * 2.0**20


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_dynamic_programming_on_larger_problems(seed):
    rng = np.random.default_rng(seed)
    groups = 40
    sizes = (
        rng.integers(1, 12, groups) if seed % 2 else np.array([1, 2, 3, 7])[np.arange(groups) % 4]
    )
    bits = np.outer(sizes, [9, 16, 32])
    losses = np.round(rng.random((groups, 3)), 3 if seed % 3 else 1) * [1, 0.3, 0] * 1e-11
    options = _relaxation.undominated(losses, bits, np.ones(bits.shape, dtype=bool))
    steps = _relaxation.hull_steps(options)
    for share in (0.1, 0.35, 0.8):
        capacity = int(options.floor_bits() * (1 - share) + bits.max(axis=1).sum() * share)
        answer = _knapsack.solve(options, steps, capacity, time_limit_seconds=30)
        columns = options.columns[np.arange(groups), answer.choice]
        loss = losses[np.arange(groups), columns].sum()
        best = best_by_dynamic_programming(losses, bits, capacity)
        assert options.bits_of(answer.choice) <= capacity
        assert loss == pytest.approx(best, rel=1e-9, abs=1e-20)
        assert loss - answer.unproved <= best * (1 + 1e-12)


def test_coprime_bits_of_large_models_stay_within_the_budget():
    rng = np.random.default_rng(0)
    sensitivity, costs = make_tables(
        rng.lognormal(0, 1, (80, 3)) * 1e-9, 4 * rng.integers(10**9, 10**10, 80) + 4
    )
    plan = solve(sensitivity, costs, 5.3)

    assert plan.effective_bits <= 5.3
    assert plan.gap < 1e-6


def test_within_the_gap_asked_for_a_hundred_thousand_groups_are_solved_without_a_search(
    monkeypatch,
):
    tables = random_tables(0, groups=100_000)

    def unwanted(*args, **kwargs):
        raise AssertionError("HiGHS was asked")

    monkeypatch.setattr(_highs, "minimise", unwanted)
    plan = solve(*tables, 5.5, relative_gap=1e-6)
    assert 0.0 < plan.gap <= 1e-6
    assert plan.bound < plan.predicted_loss
    assert plan.effective_bits <= 5.5


@pytest.mark.parametrize("relative_gap", [0.0, 1e-3, 0.1])
def test_a_gap_that_is_allowed_is_not_exceeded(relative_gap):
    tables = random_tables(5, groups=60)
    exact = solve(*tables, 5.0)
    plan = solve(*tables, 5.0, relative_gap=relative_gap)
    assert plan.bound <= exact.predicted_loss <= plan.predicted_loss * (1 + 1e-12)
    assert plan.predicted_loss <= exact.predicted_loss * (1 + relative_gap + 1e-9)


@pytest.fixture
def lists_too_long(monkeypatch):
    """States are too many for lists, so HiGHS is asked."""
    gave_up = _states.Found(choice=None, proved=False)
    monkeypatch.setattr(_knapsack, "better_choice", lambda *args: gave_up)


@pytest.mark.usefixtures("lists_too_long")
def test_a_choice_that_oversteps_by_rounding_is_not_used(monkeypatch):
    """HiGHS may answer a hair over the capacity; the plan must not follow it."""
    minimise = _highs.minimise
    calls = []

    def generous(objective, rows, row_bounds, **options):
        calls.append(row_bounds[0][-1])
        if len(calls) == 1:
            row_bounds = tuple(np.concatenate([side[:-1], [side[-1] * 1.2]]) for side in row_bounds)
        return minimise(objective, rows, row_bounds, **options)

    sensitivity, costs = random_tables(1, 60)
    honest = solve(sensitivity, costs, 5.5)
    monkeypatch.setattr(_highs, "minimise", generous)
    plan = solve(sensitivity, costs, 5.5)

    assert len(calls) >= 2
    assert calls[1] < calls[0]
    assert plan.effective_bits <= 5.5
    assert plan.bound <= honest.predicted_loss <= plan.predicted_loss


@pytest.mark.parametrize("seed", range(10))
def test_a_looser_budget_never_predicts_a_worse_plan(seed):
    tables = random_tables(seed, 30, 1e-7)
    losses = [solve(*tables, budget).predicted_loss for budget in np.linspace(4.25, 16, 12)]

    assert losses == sorted(losses, reverse=True)


cells = st.one_of(st.just(0.0), st.floats(1e-15, 1e6), st.just(float("nan")))
instances = st.lists(
    st.tuples(st.lists(cells, min_size=3, max_size=3), st.integers(1, 500)), min_size=1, max_size=5
)


@settings(max_examples=60, deadline=None)
@given(instances, st.floats(0, 1), st.randoms(use_true_random=False))
def test_order_does_not_matter_and_the_bound_holds(instance, share, random):
    shuffled = [(row, f"g{row:03d}") for row in range(len(instance))]
    random.shuffle(shuffled)
    scores = [row for row, _ in instance]
    weights = [4 * weight for _, weight in instance]
    sensitivity, costs = make_tables(scores, weights)
    floor, ceiling = reachable_bits(sensitivity, costs)
    budget = floor + share * (ceiling - floor)
    plan = solve(sensitivity, costs, budget)

    order = [row for row, _ in shuffled]
    moved = CostTable(
        groups=tuple(name for _, name in shuffled),
        formats=costs.formats,
        weights=costs.weights[order],
        effective_bits=costs.effective_bits[order],
        stored_bits=costs.stored_bits[order],
        peer_bits=costs.peer_bits[order],
        allowed=costs.allowed[order],
    )
    other = solve(sensitivity, moved, budget)
    assert other.assignment == plan.assignment
    assert other.predicted_loss == plan.predicted_loss
    assert other.effective_bits == plan.effective_bits
    assert plan.bound <= plan.predicted_loss
    assert 0 <= plan.gap <= 1
    assert plan.effective_bits <= budget


@pytest.mark.parametrize("resource", [Resource.EFFECTIVE_BITS, Resource.ACTIVE_BITS])
def test_of_formats_that_are_equal_in_all_the_order_of_columns_decides_nothing(resource):
    sensitivity, costs = make_tables([[0.2, 0.4, 0.4], [0.1, 0.3, 0.3]], [400, 400])

    def with_columns(order, names):
        bits = costs.effective_bits[:, order]
        return replace(
            costs,
            formats=names,
            effective_bits=bits,
            stored_bits=costs.stored_bits[:, order],
            peer_bits=costs.peer_bits[:, order],
            additional={Resource.ACTIVE_BITS: bits / 800},
        )

    budget = Budget(resource=resource, limit=6.25)
    plan = solve(sensitivity, with_columns([0, 1, 1, 3], FORMATS), budget)
    assert sorted(plan.assignment.values()) == ["fp8", "nvfp4"]
    assert plan == solve(sensitivity, with_columns([3, 1, 1, 0], FORMATS[::-1]), budget)


@settings(max_examples=60, deadline=None)
@given(instances, st.floats(0, 1), st.integers(0, 2))
def test_adding_a_format_never_hurts(instance, share, added):
    scores = [row for row, _ in instance]
    weights = [4 * weight for _, weight in instance]
    without = np.ones((len(instance), 4), dtype=bool)
    without[:, added] = False
    sensitivity, fewer = make_tables(scores, weights, allowed=without)
    floor, ceiling = reachable_bits(sensitivity, fewer)
    budget = floor + share * (ceiling - floor)
    _, more = make_tables(scores, weights)

    smaller_choice = solve(sensitivity, fewer, budget)
    assert solve(sensitivity, more, budget).predicted_loss <= smaller_choice.predicted_loss


def test_of_equal_losses_the_fewer_bits_are_taken():
    plan = solve(*make_tables([[0.0, 5.0, 5.0], [1.0, 1.0, 1.0]], [4, 4]), 16)

    assert plan.assignment == {"g000": "fp8", "g001": "none"}
    assert plan.predicted_loss == plan.bound == plan.gap == 0


def test_plan_carries_its_costs():
    plan = solve(*make_tables([[1.0, 2.0, 4.0], [9.0, 9.0, 9.0]], [300, 100]), 7.375)

    assert plan.assignment == {"g000": "nvfp4", "g001": "none"}
    assert plan.budget_bits == 7.375
    assert plan.effective_bits == plan.peer_effective_bits == (300 * 4.5 + 100 * 16) / 400
    assert plan.stored_bits_per_weight == (300 * 4.5 + 100 * 16 + 128) / 400
    assert plan.stored_bytes == round((300 * 4.5 + 100 * 16 + 128) / 8)
    assert plan.predicted_loss == 2.0


def test_cells_without_a_score_are_not_taken():
    nan = float("nan")
    tables = make_tables([[1.0, nan, nan], [1.0, 2.0, nan]], [4, 4])

    assert reachable_bits(*tables) == ((8 + 4.5) / 2, 16.0)
    assert solve(*tables, 6.25).assignment == {"g000": "fp8", "g001": "nvfp4"}


def test_asking_for_exactly_the_bits_of_a_plan_finds_it():
    sensitivity, costs = random_tables(5, 50)
    for budget in (4.7, 5.1, 6.3, 9.9):
        plan = solve(sensitivity, costs, budget)
        again = solve(sensitivity, costs, plan.effective_bits)
        assert again.predicted_loss == plan.predicted_loss


def test_floor_and_ceiling_can_be_asked_for_as_printed():
    allowed = np.array([[True, True, False, False], [True, False, True, False]])
    tables = make_tables([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [4, 8], allowed=allowed)
    floor, ceiling = reachable_bits(*tables)

    assert floor == 13 / 3
    assert solve(*tables, floor).assignment == {"g000": "nvfp4", "g001": "w4a8_awq"}
    assert solve(*tables, float(f"{floor:.4f}")).effective_bits == floor
    assert solve(*tables, float(f"{ceiling:.4f}")).effective_bits == 8


@pytest.mark.parametrize("budget", [4.3332, 8.0002, 0.0, -1.0, float("nan"), float("inf")])
def test_budgets_out_of_reach_name_floor_and_ceiling(budget):
    allowed = np.array([[True, True, False, False], [True, False, True, False]])
    tables = make_tables([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [4, 8], allowed=allowed)

    with pytest.raises(
        BudgetInfeasibleError,
        match=r"effective bits is outside what the allowed formats reach: from 4.3333 \(every "
        r"group in its smallest format\) to 8.0000 \(every group in its largest\)",
    ):
        solve(*tables, budget)
    with pytest.raises(BudgetInfeasibleError, match=r"from 4.3333 .* to 8.0000"):
        check_budget(tables[1], budget)


@pytest.mark.parametrize("budget", [4.3333, 13 / 3, 6.0, 8.0])
def test_budgets_within_reach_pass_before_anything_is_scored(budget):
    allowed = np.array([[True, True, False, False], [True, False, True, False]])
    _, costs = make_tables([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [4, 8], allowed=allowed)

    check_budget(costs, budget)


def test_a_search_without_groups_is_refused():
    sensitivity, costs = make_tables(np.empty((0, 3)), [])

    for call in (lambda: check_budget(costs, 8), lambda: solve(sensitivity, costs, 8)):
        with pytest.raises(InputError, match=r"at least one group to decide, got none; exclude"):
            call()


def test_infinite_scores_are_refused():
    with pytest.raises(
        InputError,
        match=r"scores must be finite, got an infinite one for group 'g001' in nvfp4; look for "
        r"infinite weights or activations in that group, or forbid the format there with --rule",
    ):
        solve(*make_tables([[1.0, 1.0, 1.0], [1.0, float("inf"), 1.0]], [4, 4]), 8)


def test_a_group_without_any_format_is_refused():
    allowed = np.array([[True] * 4, [False, True, False, False]])
    tables = make_tables([[1.0] * 3, [1.0, float("nan"), 1.0]], [4, 4], allowed=allowed)

    with pytest.raises(
        InputError,
        match=r"every group must have a format that it may take, got none for 'g001'; allow none",
    ):
        solve(*tables, 8)


def test_tables_that_do_not_belong_together_are_refused():
    sensitivity, costs = make_tables([[1.0] * 3, [1.0] * 3], [4, 4])
    other, _ = make_tables([[1.0] * 3], [4])
    fewer = SensitivityTable(
        groups=sensitivity.groups,
        formats=("fp8", "nvfp4"),
        contributions=sensitivity.contributions[:, :, :2],
        unit="relative",
        estimator="test",
    )

    with pytest.raises(InputError, match=r"got none for 'g001' \(near: g000\); score the same"):
        solve(other, costs, 8)
    with pytest.raises(InputError, match=r"got none for 'w4a8_awq' \(scored: fp8, nvfp4\); score"):
        solve(fewer, costs, 8)


def test_interval_is_students_t_of_the_sequences():
    contributions = np.array([1.0, 2.0, 6.0])[:, None, None] * np.ones((1, 1, 3))
    plan = solve(*make_tables([[0.0] * 3], [4], contributions=contributions), 8)

    assert plan.assignment == {"g000": "w4a8_awq"}
    assert plan.predicted_loss == 3.0
    # mean 3, standard deviation sqrt(7), t(0.975, 2) = 4.302653; no loss is below zero.
    assert plan.predicted_loss_interval == pytest.approx((0.0, 3 + 4.302653 * (7 / 3) ** 0.5))


def test_one_sequence_leaves_the_interval_open():
    plan = solve(*make_tables([[1.0] * 3], [4]), 8)

    assert plan.predicted_loss_interval == (0.0, float("inf"))
    assert solve(*make_tables([[1.0] * 3], [4]), 16).predicted_loss_interval == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_out_of_time_the_plan_fits_and_its_bound_is_true(seed):
    sensitivity, costs = random_tables(seed, 60)
    plan = solve(sensitivity, costs, 5.5, time_limit_seconds=0.0)
    exact = solve(sensitivity, costs, 5.5)

    assert plan.effective_bits <= 5.5
    assert plan.bound <= exact.predicted_loss <= plan.predicted_loss
    assert plan.gap == pytest.approx(1 - plan.bound / plan.predicted_loss, abs=1e-12)


@pytest.mark.usefixtures("lists_too_long")
@pytest.mark.parametrize("seed", range(5))
def test_without_an_answer_from_highs_the_relaxation_still_bounds(monkeypatch, seed):
    nothing = _highs.HighsAnswer(values=None, bound=float("-inf"))
    sensitivity, costs = random_tables(seed, 60)
    exact = solve(sensitivity, costs, 5.5)
    monkeypatch.setattr(_highs, "minimise", lambda *args, **kwargs: nothing)
    plan = solve(sensitivity, costs, 5.5)

    assert plan.effective_bits <= 5.5
    assert plan.bound < exact.predicted_loss <= plan.predicted_loss
    assert 0 < plan.gap < 0.05


def test_a_given_assignment_is_priced_and_bounded():
    sensitivity, costs = random_tables(2, 60)
    exact = solve(sensitivity, costs, 5.5)
    plan = plan_from_assignment(sensitivity, costs, exact.assignment, 5.5)

    assert plan.predicted_loss == exact.predicted_loss
    assert plan.effective_bits == exact.effective_bits
    assert plan.bound <= exact.bound <= exact.predicted_loss
    assert plan.gap < 0.05


@pytest.mark.parametrize("budget", [4.3, 6.0, 20.0, float("inf")])
def test_a_bound_of_a_poor_assignment_is_below_the_optimum(budget):
    sensitivity, costs = random_tables(2, 20)
    poorest = dict.fromkeys(costs.groups, "w4a8_awq")
    plan = plan_from_assignment(sensitivity, costs, poorest, budget)

    best = solve(sensitivity, costs, min(budget, 16.0)).predicted_loss
    assert plan.bound <= best * (1 + 1e-12) + 1e-15
    assert plan.gap == pytest.approx(1 - plan.bound / plan.predicted_loss)


def test_assignments_that_cannot_be_are_refused():
    allowed = np.array([[True, True, False, True], [True] * 4])
    tables = make_tables([[1.0] * 3, [1.0] * 3], [4, 4], allowed=allowed)

    with pytest.raises(
        InputError, match=r"stay within its budget, got 16.0000 effective bits for a budget of 5;"
    ):
        plan_from_assignment(*tables, {"g000": "none", "g001": "none"}, 5)
    with pytest.raises(InputError, match=r"stay within its budget, got 16.0000 .* of nan;"):
        plan_from_assignment(*tables, {"g000": "none", "g001": "none"}, float("nan"))
    with pytest.raises(
        InputError, match=r"group 'g000' cannot take w4a8_awq .*; take one of fp8, nvfp4, none"
    ):
        plan_from_assignment(*tables, {"g000": "w4a8_awq", "g001": "none"})


def test_uniform_plans_fall_back_to_the_nearest_format():
    allowed = np.array([[True] * 4, [True, True, False, True], [False, False, False, True]])
    allowed = np.vstack([allowed, [[False, True, False, False]]])
    tables = make_tables([[1.0, 2.0, 3.0]] * 4, [4] * 4, allowed=allowed)

    assert list(uniform_plan(*tables, "w4a8_awq").assignment.values()) == [
        "w4a8_awq",
        "nvfp4",
        "none",
        "nvfp4",
    ]
    assert list(uniform_plan(*tables, "fp8").assignment.values()) == ["fp8", "fp8", "none", "nvfp4"]
    assert uniform_plan(*tables, "none").budget_bits == (16 * 3 + 4.5) / 4
    with pytest.raises(
        InputError, match=r"take a format of the search \(fp8, nvfp4, w4a8_awq, none\), got 'int4'"
    ):
        uniform_plan(*tables, "int4")


def test_nothing_reaches_standard_output_from_c(capfd):
    with _highs.quiet_stdout():
        ctypes.CDLL(None).printf(b"leak\n")
    print("kept")

    assert capfd.readouterr().out == "kept\n"


def test_output_printed_before_and_after_is_kept():
    script = (
        "import ctypes; from autoq.search._highs import quiet_stdout; c = ctypes.CDLL(None)\n"
        "c.printf(b'before '); c.fflush(None)\n"
        "with quiet_stdout(): c.printf(b'leak ')\n"
        "c.printf(b'after')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)

    assert done.stdout == b"before after"


def test_standard_output_is_restored_after_an_error(capfd):
    with contextlib.suppress(RuntimeError), _highs.quiet_stdout():
        raise RuntimeError
    print("kept")

    assert capfd.readouterr().out == "kept\n"


def test_solving_leaves_standard_output_to_the_caller(capfd):
    plan = solve(*random_tables(0, 120), 5.2)
    print(json.dumps({"bits": plan.effective_bits}))

    assert json.loads(capfd.readouterr().out) == {"bits": plan.effective_bits}
