"""What measured plans say of cells: right where it can be checked, and doubtful where it should."""

from __future__ import annotations

import numpy as np
import pytest

from autoq.search._refine_observations import Observations, Prior
from autoq.search._refine_posterior import Posterior

GROUPS, FORMATS, SEQUENCES = 12, 3, 24
ROWS = np.arange(GROUPS)


def prior(losses, errors=None):
    types = ROWS % 4
    return Prior.of(losses, np.zeros(losses.shape) if errors is None else errors, types, types)


def tables(seed, sigma=0.8):
    rng = np.random.default_rng(seed)
    predicted = rng.lognormal(0.0, 0.7, (GROUPS, FORMATS))
    return rng, predicted, predicted * rng.lognormal(0.0, sigma, predicted.shape)


def total(losses, columns):
    return losses[ROWS, columns].sum()


def measured(losses, plans, noise=None):
    noise = np.zeros((len(plans), SEQUENCES)) if noise is None else noise
    return Observations(
        columns=tuple(plans),
        losses=tuple(total(losses, plan) + row for plan, row in zip(plans, noise, strict=True)),
    )


@pytest.mark.parametrize(("unit", "constant"), [(1.0, 0.0), (30.0, 1e3)], ids=["nats", "other"])
def test_additive_losses_are_learnt(unit, constant):
    """More exact measurements than unknowns: plans never measured are predicted.

    The unit of the objective may be another than the scores', and it may have a constant part.
    """
    rng, predicted, true = tables(0)
    plans = rng.integers(0, FORMATS, (80, GROUPS))
    observed = measured(unit * true + constant / GROUPS, plans)
    found = Posterior(prior(predicted), observed).expected
    others = rng.integers(0, FORMATS, (50, GROUPS))
    expected = [total(found, plan) - total(found, plans[0]) for plan in others]
    actual = [unit * (total(true, plan) - total(true, plans[0])) for plan in others]
    blind = [unit * (total(predicted, plan) - total(predicted, plans[0])) for plan in others]

    # 80 linear equations for 24 unknown differences; what is not additive is assumed to be small.
    assert np.abs(np.subtract(expected, actual)).max() < 0.05 * np.abs(actual).max()
    assert np.abs(np.subtract(blind, actual)).max() > 0.2 * np.abs(actual).max()


def test_layers_of_a_type_share_what_was_learnt():
    """Every group but 7 and 6 is changed alone; those of 7's type lose four times as much."""
    _, predicted, _ = tables(1)
    true = predicted.copy()
    true[3::4] *= 4.0
    reference = np.zeros(GROUPS, dtype=np.int64)
    plans = [reference] + [np.where(row == ROWS, 1, 0) for row in ROWS if row not in (6, 7)]
    found = Posterior(prior(predicted), measured(true, plans)).expected
    risen = (found[:, 1] - found[:, 0]) / (predicted[:, 1] - predicted[:, 0])

    # Measured exactly but for a remainder that is small beside the losses themselves.
    assert risen[[3, 11]] == pytest.approx(4.0, rel=0.2)
    assert risen[[0, 1, 2, 4, 5, 8, 9, 10]] == pytest.approx(1.0, rel=0.2)
    assert risen[7] > 1.5 * risen[6]


def test_noisy_measurements_count_less():
    """The same measured means: where sequences disagree, the prediction is kept rather."""
    rng, predicted, true = tables(2)
    plans = rng.integers(0, FORMATS, (20, GROUPS))
    noise = rng.standard_normal((len(plans), SEQUENCES))
    noise -= noise.mean(axis=1, keepdims=True)
    noise[0] = 0.0
    sure = Posterior(prior(predicted), measured(true, plans))
    doubtful = Posterior(prior(predicted), measured(true, plans, 100.0 * noise))
    actual = np.array([total(true, plan) - total(true, plans[0]) for plan in plans[1:]])
    blind = np.array([total(predicted, plan) - total(predicted, plans[0]) for plan in plans[1:]])

    def distance(posterior, target):
        return np.abs(posterior.plan_differences() - target).mean()

    assert distance(sure, actual) < 0.2 * distance(doubtful, actual)
    assert distance(doubtful, blind) < distance(sure, blind)


def test_hard_sequences_do_not_decide_alone():
    """Losses and their noise rise with the sequence's difficulty, which varies by factors.

    The plain mean over sequences is noisier: it is compared in how it orders the plans.
    """
    better = 0
    for seed in range(10):
        rng, _, true = tables(seed, sigma=0.3)
        plans = rng.integers(0, FORMATS, (30, GROUPS))
        difficulty = rng.lognormal(0.0, 1.2, SEQUENCES)
        noise = rng.lognormal(0.0, 0.3, (30, SEQUENCES))
        observed = Observations(
            columns=tuple(plans),
            losses=tuple(
                total(true, plan) * difficulty * row for plan, row in zip(plans, noise, strict=True)
            ),
        )
        actual = [total(true, plan) for plan in plans[1:]]
        weighted = [each.mean() for each in observed.differences()]
        plain = [losses.mean() for losses in observed.losses[1:]]
        better += np.corrcoef(weighted, actual)[0, 1] > np.corrcoef(plain, actual)[0, 1]

    assert better >= 8


def test_objectives_that_can_be_negative_are_taken_plainly():
    losses = (np.array([-1.0, 2.0, 3.0]), np.array([0.5, 2.5, 3.5]))
    observed = Observations(columns=(np.zeros(1, dtype=np.int64),) * 2, losses=losses)

    assert observed.differences()[0].tolist() == [1.5, 0.5, 0.5]


def test_draws_are_narrow_where_it_was_measured():
    rng, predicted, true = tables(3)
    plans = rng.integers(0, FORMATS, (60, GROUPS))
    plans[:, 6:] = 0  # only half of the groups are ever changed
    posterior = Posterior(prior(predicted), measured(true, plans))
    draws = np.array([posterior.draw(rng, 1.0) for _ in range(200)])
    # What measured plans have in common does not matter: differences within a group do.
    spread = np.log(draws / draws[:, :, :1]).std(axis=0)[:, 1:]

    assert spread[:6].max() < spread[6:].min()
    middle = np.median(np.log(draws), axis=0)
    # 200 draws: their median is within 4 standard errors of the middle of a normal distribution.
    errors = 4 * 1.2533 * np.log(draws).std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(middle - np.log(posterior.expected)) < errors + 1e-9).all()


def test_the_same_seed_draws_the_same():
    rng, predicted, true = tables(4)
    observed = measured(true, rng.integers(0, FORMATS, (10, GROUPS)))

    def draw(seed):
        return Posterior(prior(predicted), observed).draw(np.random.default_rng(seed), 0.5)

    assert (draw(1) == draw(1)).all()
    assert (draw(1) != draw(2)).any()


def test_trials_stopped_early_count_with_what_they_have():
    rng, predicted, true = tables(5)
    plans = rng.integers(0, FORMATS, (30, GROUPS))
    whole = measured(true, plans)
    difficulty = rng.lognormal(0.0, 0.5, SEQUENCES)
    part = Observations(
        columns=whole.columns,
        losses=tuple(
            (losses * difficulty)[: SEQUENCES if row % 2 == 0 else 8]
            for row, losses in enumerate(whole.losses)
        ),
    )
    found = Posterior(prior(predicted), part).plan_differences()
    actual = np.array([total(true, plan) - total(true, plans[0]) for plan in plans[1:]])

    assert np.corrcoef(found, actual)[0, 1] > 0.95


def test_losses_that_are_not_positive_count_as_their_error():
    losses = np.array([[-1.0, 2.0], [0.0, np.nan]])
    errors = np.array([[0.5, 0.2], [0.0, np.nan]])
    classes = np.zeros(2, dtype=np.int64)
    found = Prior.of(losses, errors, classes, classes)

    assert found.losses.tolist() == [[0.25, 2.0], [0.0, 0.0]]
    # log(1 + (error / loss)^2): the variance of a log-normal with that mean and deviation.
    assert found.spread[0] == pytest.approx(np.log1p([4.0, 0.01]))
    assert found.spread[1].tolist() == [0.0, 0.0]
