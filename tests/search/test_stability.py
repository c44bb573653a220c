"""How sure a plan is: worked out by hand, with a solver that tries everything."""

from itertools import product

import numpy as np
import pytest

from autoq.errors import InputError
from autoq.search import Plan, SensitivityTable
from autoq.search.stability import is_checkpoint, plan_stability

FORMATS = ("small", "large")
SIZES = {"small": 4, "large": 8}


def table(contributions):
    values = np.asarray(contributions, dtype=np.float64)
    return SensitivityTable(
        groups=tuple(f"g{i}" for i in range(values.shape[1])),
        formats=FORMATS,
        contributions=values,
        unit="nats_per_token",
        estimator="by hand",
    )


def best_of_all(budget, seen=None):
    """A solver that looks at every assignment whose sizes add up to at most the budget."""

    def solve(sensitivity):
        scores = sensitivity.scores()
        plans = []
        for chosen in product(range(2), repeat=len(sensitivity.groups)):
            if sum(SIZES[FORMATS[c]] for c in chosen) <= budget:
                loss = sum(scores[row, c] for row, c in enumerate(chosen))
                plans.append((loss, chosen))
        loss, chosen = min(plans)
        if seen is not None:
            seen.append(chosen)
        return Plan(
            assignment={g: FORMATS[c] for g, c in zip(sensitivity.groups, chosen, strict=True)},
            budget_bits=6.0,
            effective_bits=6.0,
            peer_effective_bits=6.0,
            stored_bits_per_weight=6.0,
            stored_bytes=1,
            predicted_loss=float(loss),
            predicted_loss_interval=(0.0, 1.0),
            bound=float(loss),
            gap=0.0,
        )

    return solve


def test_sequences_that_agree_make_a_plan_certain():
    same = table([[[3.0, 1.0], [2.0, 1.5]]] * 8)
    found = plan_stability(same, best_of_all(12), 0.95)
    assert (found.confidence, found.sequences, found.sequences_needed) == (1.0, 8, 8)
    assert found.reaches(0.99)


def test_confidence_is_the_share_of_draws_that_the_plan_survives():
    # Half of the sequences want the one group large, half the other: by a hair the first.
    one, other = [[10.1, 1.0], [1.0, 0.0]], [[1.0, 0.0], [10.0, 1.0]]
    divided = table([one, other] * 4)
    seen = []
    found = plan_stability(divided, best_of_all(12, seen), 0.95)
    plan, *draws = seen
    assert plan == (1, 0)
    assert len(draws) == 200
    # A draw's own plan differs whenever the other sequences are in the majority, and as the
    # sums are far apart then, the plan misses the slack.
    survived = sum(chosen == plan for chosen in draws) / len(draws)
    assert found.confidence == pytest.approx(survived)
    assert 0.3 < found.confidence < 0.8
    assert not found.reaches(0.95)
    assert found.sequences_needed > 8


def test_a_wider_slack_confirms_more():
    noise = np.random.default_rng(3).uniform(0.5, 1.5, (16, 4, 2))
    unsure = table(noise * np.asarray([2.0, 1.0]))
    tight, wide = (
        plan_stability(unsure, best_of_all(24), 0.95, relative_slack=slack) for slack in (0.001, 1)
    )
    assert tight.confidence < wide.confidence == 1.0
    assert tight == plan_stability(unsure, best_of_all(24), 0.95, relative_slack=0.001)


def test_without_slack_only_the_optimum_itself_counts():
    same = table([[[3.0, 1.0], [2.0, 1.5]]] * 9)
    sure = plan_stability(same, best_of_all(12), 0.95, relative_slack=0)
    assert (sure.confidence, sure.sequences_needed) == (1.0, 9)

    one, other = [[10.1, 1.0], [1.0, 0.0]], [[1.0, 0.0], [10.0, 1.0]]
    seen = []
    unsure = plan_stability(table([one, other] * 4), best_of_all(12, seen), 0.95, relative_slack=0)
    plan, *draws = seen
    assert unsure.confidence == sum(chosen == plan for chosen in draws) / len(draws) < 0.95
    assert unsure.sequences_needed is None  # excess shrinks with more, and never to nothing

    with pytest.raises(InputError, match=r"relative_slack must be >= 0, got -0.1; try 0.02"):
        plan_stability(same, best_of_all(12), 0.95, relative_slack=-0.1)


def test_formats_that_cost_nothing_are_not_counted():
    """A group that stays as it is has no column."""

    def solve(sensitivity):
        plan = best_of_all(8)(sensitivity)
        return Plan(
            **{
                name: getattr(plan, name)
                for name in Plan.__dataclass_fields__
                if name not in ("assignment", "predicted_loss")
            },
            assignment={"g0": "none"},
            predicted_loss=0.0,
        )

    found = plan_stability(table([[[3.0, 1.0]]] * 8), solve, 0.9)
    assert found.confidence == 1.0


def test_a_pass_looks_whenever_its_batches_have_doubled():
    looks = [batches for batches in range(1, 40) if is_checkpoint(batches, 4 * batches)]
    assert looks == [2, 4, 8, 16, 32]
    assert not is_checkpoint(4, 4)  # too few sequences to draw from
