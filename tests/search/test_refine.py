"""Refinement proposes plans that are new, allowed and worth their evaluation."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from autoq.errors import BudgetInfeasibleError, InputError
from autoq.formats import FormatName
from autoq.models import GroupName
from autoq.search import Budget, Resource, effective_bits, solve
from autoq.search._refine_layers import layer_classes
from autoq.search.refine import (
    EVERY_STRATEGY,
    FrontRefinement,
    Refinement,
    Source,
    Trial,
    measured_front,
)
from tests.search.refining import World, drive, trial_of
from tests.search.tables import LATENCY, between, every_choice, several_tables

BITS = 5.0


def middle(_name, low, high):
    """A sampler without ideas."""
    return (low + high) / 2


def refinement_of(tables, budgets=BITS, **options):
    start = solve(*tables, budgets)
    return Refinement(*tables, budgets, start, **{"trials": 30, **options})


@pytest.fixture(scope="module")
def world():
    """Forty groups whose predicted losses are wrong by a factor of e^0.7, typically."""
    return World.of(0, layers=10, sigma=0.7)


@pytest.fixture(scope="module")
def driven(world):
    """The refinement of it, and all its trials."""
    return drive(world, BITS, trials=40)


def test_the_start_is_first_and_no_plan_comes_twice(world, driven):
    refinement, finished = driven
    plans = [tuple(world.columns(trial.assignment)) for trial in finished]

    assert finished[0].source is Source.START
    assert finished[0].assignment == refinement.start.assignment
    assert len(finished) == 40
    assert len(set(plans)) == len(plans)
    assert {trial.source for trial in finished} == {Source.START, *EVERY_STRATEGY}


def test_half_of_what_is_possible_comes_back(world, driven):
    """Against the optimum of the true losses, which the solver proves."""
    _, finished = driven
    start, best = world.loss(finished[0].assignment), world.loss(world.best(BITS).assignment)
    found = world.loss(min(finished, key=lambda trial: trial.loss).assignment)

    assert start - best > 0.2 * start
    assert start - found >= 0.5 * (start - best)


@pytest.mark.slow
def test_half_comes_back_with_many_groups_and_very_wrong_scores():
    """196 groups, errors of a factor e, 100 evaluations: the median of three."""
    shares = []
    for seed in range(3):
        world = World.of(seed, layers=49, sigma=1.0)
        _, finished = drive(world, BITS, trials=100, seed=seed)
        start, best = world.loss(finished[0].assignment), world.loss(world.best(BITS).assignment)
        found = world.loss(min(finished, key=lambda trial: trial.loss).assignment)
        shares.append((start - found) / (start - best))

    assert np.median(shares) >= 0.5


def test_the_same_history_gives_the_same_proposal(world, driven):
    _, finished = driven
    shuffled = random.Random(0).sample(finished[:20], 20)
    running = [finished[20].assignment]
    answers = [
        refinement_of((world.sensitivity, world.costs), trials=40).propose(
            history, running, 21, middle
        )
        for history in (finished[:20], shuffled)
    ]

    assert answers[0] == answers[1]


def test_the_seed_and_the_number_decide_what_is_drawn(world, driven):
    _, finished = driven
    refinement = refinement_of((world.sensitivity, world.costs), strategies=[Source.SWAP])
    # A history whose expected losses lead to a plan that was not measured yet.
    history, expected = next(
        (finished[:count], found)
        for count in range(6, len(finished))
        if (found := refinement.propose(finished[:count], [], 12, middle)).details["width"] == 0.0
    )
    running = [expected.plan.assignment]
    drawn = [refinement.propose(history, running, number, middle) for number in (13, 14)]

    assert drawn[0].details["width"] > 0.0
    assert drawn[0].plan.assignment != drawn[1].plan.assignment
    other = refinement_of((world.sensitivity, world.costs), strategies=[Source.SWAP], seed=1)
    assert other.propose(history, [], 12, middle) == expected
    assert other.propose(history, running, 13, middle) != drawn[0]


def test_what_runs_elsewhere_is_not_proposed(world):
    refinement = refinement_of((world.sensitivity, world.costs))
    running = []
    for number in range(8):
        proposal = refinement.propose([], running, number, middle)
        assert proposal.plan.assignment not in running
        running.append(proposal.plan.assignment)
    assert running[0] == refinement.start.assignment


def test_plans_stay_within_all_budgets():
    sensitivity, costs = several_tables(1, 30, sequences=8)
    budgets = [Budget(resource=Resource.EFFECTIVE_BITS, limit=5.5), between(costs, LATENCY, 0.35)]
    refinement = refinement_of((sensitivity, costs), budgets)
    rng = np.random.default_rng(0)
    finished = []
    for number in range(14):
        proposal = refinement.propose(
            finished, [], number, lambda _, low, high: float(rng.uniform(low, high))
        )
        for budget in budgets:
            assert proposal.plan.takes[budget.resource] <= budget.limit
        assert proposal.plan.predicted_loss >= proposal.plan.bound
        losses = tuple(rng.lognormal(0.0, 0.1, 8))
        finished.append(
            Trial(
                number=number,
                source=proposal.source,
                assignment=proposal.plan.assignment,
                losses=losses,
            )
        )


@pytest.mark.parametrize("strategy", EVERY_STRATEGY, ids=str)
def test_every_strategy_works_alone(world, strategy):
    asked = []

    def suggest(name, low, high):
        asked.append(name)
        return middle(name, low, high)

    refinement = refinement_of((world.sensitivity, world.costs), strategies=[strategy])
    finished = []
    for number in range(5):
        proposal = refinement.propose(finished, [], number, suggest)
        finished.append(trial_of(world, proposal, number))

    assert [trial.source for trial in finished] == [Source.START] + [strategy] * 4
    # Four types of layers in four bands of depth, once for each trial.
    expected = 16 * 4 if strategy is Source.MULTIPLIERS else 0
    assert len(asked) == expected
    assert len(set(asked)) == expected / 4


def test_multipliers_change_what_they_name(world):
    """The first class loses sixteen times as much as the others: it gets more bits."""
    refinement = refinement_of((world.sensitivity, world.costs), strategies=[Source.MULTIPLIERS])
    start = trial_of(world, refinement.propose([], [], 0, middle), 0)
    name = "log2 score of mlp.up_proj, depth 1 of 4"

    def suggest(asked, low, high):
        return high if asked == name else low

    proposal = refinement.propose([start], [], 1, suggest)
    bits = dict(zip(world.costs.formats, (8.0, 4.5, 4.25, 16.0), strict=True))
    first = [group for group in world.costs.groups if group.endswith("up_proj")][:3]

    assert proposal.details["multipliers"][name.removeprefix("log2 score of ")] == 4.0
    for group in first:
        before, after = start.assignment[group], proposal.plan.assignment[group]
        assert bits[after] >= bits[before]
    assert any(proposal.plan.assignment[group] != start.assignment[group] for group in first)


def test_nothing_is_left_when_all_plans_are_known():
    """Five groups: plans that are optimal for some losses are proposed, then None."""
    sensitivity, costs = several_tables(5, 5, sequences=4)
    budget = between(costs, Resource.EFFECTIVE_BITS, 0.5)
    refinement = refinement_of((sensitivity, costs), budget, trials=200)
    rng = np.random.default_rng(0)
    finished = []
    while True:
        proposal = refinement.propose(
            finished, [], len(finished), lambda _, low, high: float(rng.uniform(low, high))
        )
        if proposal is None:
            break
        losses = (proposal.plan.predicted_loss, proposal.plan.predicted_loss * 1.1)
        finished.append(
            Trial(
                number=len(finished),
                source=proposal.source,
                assignment=proposal.plan.assignment,
                losses=losses,
            )
        )
    _, taken = every_choice(sensitivity, costs)
    allowed = (taken[Resource.EFFECTIVE_BITS] <= budget.limit).sum()

    assert 3 < len(finished) <= allowed


def test_failed_trials_are_neither_repeated_nor_believed(world, driven):
    refinement, finished = driven
    failed = [replace(trial, losses=()) if trial.number == 3 else trial for trial in finished[:10]]
    failed[4] = replace(failed[4], losses=(float("nan"),) * 32)
    proposal = refinement.propose(failed, [], 10, middle)

    assert proposal.plan.assignment not in [trial.assignment for trial in failed]
    assert all(trial.number not in (3, 4) for trial in refinement.finalists(failed))


def test_other_trials_serve_when_the_start_failed(world, driven):
    refinement, finished = driven
    history = [replace(finished[0], losses=()), *finished[1:10]]

    assert refinement.propose(history, [], 10, middle) is not None
    assert refinement.finalists(history) == []


def test_trials_on_other_sequences_are_refused(driven):
    refinement, finished = driven
    history = [*finished[:9], replace(finished[9], losses=finished[9].losses[:5])]
    with pytest.raises(InputError, match="the same sequences, got 5 in trial 9 and 32"):
        refinement.propose(history, [], 10, middle)

    stopped = [*history[:9], replace(history[9], complete=False)]
    assert refinement.propose(stopped, [], 10, middle) is not None


def test_finalists_are_few_complete_and_better_than_the_start(world, driven):
    refinement, finished = driven
    best = min(finished, key=lambda trial: trial.loss)
    finalists = refinement.finalists(finished)

    assert finalists[0] is finished[0]
    assert 2 <= len(finalists) <= 3
    assert best in finalists[1:]
    assert all(trial.loss < finished[0].loss for trial in finalists[1:])
    stopped = [replace(t, complete=t.number == 0, losses=t.losses[:32]) for t in finished]
    assert refinement.finalists(stopped) == stopped[:1]


def test_gains_below_the_noise_floor_are_no_finalists(world, driven):
    _, finished = driven
    start = finished[0].loss
    refinement = refinement_of((world.sensitivity, world.costs), noise_floor=start)

    assert refinement.finalists(finished) == finished[:1]
    assert refinement.finalists(finished[:2]) == finished[:1]
    assert refinement.finalists([]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "at least one trial, got 0"),
        ({"strategies": []}, "some of diverse, swap, multipliers, got none"),
        ({"strategies": [Source.START]}, "got start"),
    ],
    ids=["trials", "none", "start"],
)
def test_bad_options_are_refused(world, options, message):
    with pytest.raises(InputError, match=message):
        refinement_of((world.sensitivity, world.costs), **options)


def test_a_start_over_budget_is_refused(world):
    tables = world.sensitivity, world.costs
    with pytest.raises(InputError, match=r"within its budgets, got .* for a budget of 5"):
        Refinement(*tables, 5.0, solve(*tables, 6.0), trials=10)
    with pytest.raises(BudgetInfeasibleError):
        Refinement(*tables, 4.0, solve(*tables, 6.0), trials=10)


# The front


def test_front_proposals_take_the_suggested_bits(world):
    refinement = FrontRefinement(world.sensitivity, world.costs, (4.5, 7.0))
    targets = [4.6, 6.5, 5.0, 5.0, 6.9, 4.5, 5.5]
    finished = []
    for number, target in enumerate(targets):
        proposal = refinement.propose(
            finished,
            [],
            number,
            lambda name, low, high, target=target: {("effective_bits", 4.5, 7.0): target}[
                name, low, high
            ],
        )
        assert proposal.source is Source.FRONT
        assert target - 0.1 < proposal.plan.effective_bits <= target
        finished.append(trial_of(world, proposal, number))
    plans = [tuple(world.columns(trial.assignment)) for trial in finished]

    assert len(set(plans)) == len(targets)
    assert plans[0] == tuple(
        world.columns(solve(world.sensitivity, world.costs, 4.6, relative_gap=1e-4).assignment)
    )


def test_measured_front_is_what_nothing_beats(world):
    """Losses by hand: by rising bits, those that are below all before."""
    losses = {4.5: 9.0, 5.0: 7.0, 5.5: 8.0, 6.0: 7.0, 6.5: 2.0}
    trials = [
        Trial(
            number=number,
            source=Source.FRONT,
            assignment=solve(world.sensitivity, world.costs, bits).assignment,
            losses=(loss - 1.0, loss + 1.0),
        )
        for number, (bits, loss) in enumerate(losses.items())
    ]
    stopped = replace(trials[2], number=5, losses=(0.0,), complete=False)
    front = measured_front([*reversed(trials), stopped], world.costs)

    assert [trial.number for trial in front] == [0, 1, 4]
    taken = [effective_bits(world.costs, trial.assignment) for trial in front]
    assert taken == sorted(taken)


@pytest.mark.parametrize("bits", [(6.0, 5.0), (5.0, 5.0)], ids=["falling", "empty"])
def test_a_range_of_bits_must_rise(world, bits):
    with pytest.raises(InputError, match="must rise"):
        FrontRefinement(world.sensitivity, world.costs, bits)


# Layers


def test_layers_are_sorted_by_type_and_depth():
    names = [f"model.layers.{layer}.{kind}" for layer in range(8) for kind in ("attn.q", "mlp")]
    found = layer_classes([*map(GroupName, names), GroupName("lm_head")])

    assert found.class_names == (
        *(f"attn.q, depth {band} of 4" for band in (1, 2, 3, 4)),
        "lm_head",
        *(f"mlp, depth {band} of 4" for band in (1, 2, 3, 4)),
    )
    assert found.classes.tolist() == [0, 5, 0, 5, 1, 6, 1, 6, 2, 7, 2, 7, 3, 8, 3, 8, 4]
    assert found.types.tolist() == [0, 2] * 8 + [1]


def test_experts_are_one_type_and_many_types_have_few_bands():
    experts = layer_classes(
        [GroupName(f"layers.{n}.experts.{e}.up") for n in (0, 1) for e in (2, 3)]
    )
    assert experts.class_names == (
        "experts.*.up, depth 1 of 2",
        "experts.*.up, depth 2 of 2",
    )
    many = layer_classes([GroupName(f"h.{n}.kind{k}") for n in range(4) for k in range(20)])
    assert len(many.class_names) == 20
    assert layer_classes([FormatName("head")]).class_names == ("head",)
