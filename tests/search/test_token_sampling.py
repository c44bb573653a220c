"""Scores from the tokens that matter: least rows for a bound on the variance, and no bias."""

from functools import partial

import numpy as np
import pytest
import torch

from autoq.calibration import calibrate
from autoq.formats import CalibrationMethod
from autoq.layers.quantize import Container
from autoq.models import discover, forward_logits
from autoq.search._token_sampling import importance, inclusion_probabilities, sampled_rows
from autoq.search.estimators import FisherProjection, SequenceProjection
from autoq.search.objectives import fisher_noise_loss
from autoq.search.sensitivity import BatchLoss
from autoq.testing.tiny_models import make_tiny_model

FORMATS = ("nvfp4", "fp8")
SEQUENCES, TOKENS = 4, 32


def variance(size, probability):
    return (size.square() * (1 / probability - 1)).sum()


def test_probabilities_by_hand():
    """Sizes 1, 2, 4 and a bound of 3 / 21: w (t - w) below t adds to 3 at t = 8 / 3."""
    found = inclusion_probabilities(torch.tensor([4.0, 1.0, 2.0]).double(), 3 / 21, smallest=0.0)
    np.testing.assert_allclose(found, [1.0, 3 / 8, 6 / 8], rtol=1e-12)


@pytest.mark.parametrize("bound", [0.01, 0.1, 0.5, 2.0])
def test_the_bound_on_the_variance_is_met_with_the_fewest_rows(bound):
    generator = torch.Generator().manual_seed(0)
    size = torch.randn(400, generator=generator, dtype=torch.float64).pow_(4)
    found = inclusion_probabilities(size, bound, smallest=0.0)
    allowed = bound * size.square().sum()
    np.testing.assert_allclose(variance(size, found), allowed, rtol=1e-9)
    # Any other probabilities with as small a variance take more rows: moves of probability from
    # one row to another, to first order.
    inside = found < 1
    marginal = (size.square() / found.square())[inside]
    np.testing.assert_allclose(marginal, marginal[0].expand_as(marginal), rtol=1e-9)
    if not inside.all():
        assert (size[~inside].square().min() >= marginal[0] * (1 - 1e-9)).all()


def test_no_probability_is_below_the_smallest():
    size = torch.tensor([0.0, 1e-9, 1.0, 1.0]).double()
    found = inclusion_probabilities(size, 0.02, smallest=0.125)
    assert found[:2].tolist() == [0.125, 0.125]
    assert (found[2:] > 0.9).all()


@pytest.mark.parametrize(
    "size",
    [[0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0]],
    ids=["zeros", "nan", "inf"],
)
def test_all_rows_are_taken_where_sizes_say_nothing(size):
    assert inclusion_probabilities(torch.tensor(size).double()).tolist() == [1.0, 1.0]


def test_importance_by_hand():
    inputs = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    gradient = torch.tensor([[1.0], [2.0]])
    # |g|^2 = 1, 4, of mean 2.5; |g|^2 |x|^2 = 25, 4, of mean 14.5
    expected = [(1 / 2.5 + 25 / 14.5) / 2, (4 / 2.5 + 4 / 14.5) / 2]
    np.testing.assert_allclose(importance(inputs, gradient), expected, rtol=1e-6)


def test_rows_come_in_few_numbers_and_those_that_fill_up_count_nothing():
    """Of 16 rows 3 are sampled: 4 are taken, the fourth being the nearest to it."""
    uniform = torch.linspace(0.9, 0.15, 16).double()  # ..., 0.25, 0.2, 0.15
    probability = torch.full((16,), 0.22).double()
    probability[2] = 1.0
    rows, weights = sampled_rows(probability, uniform)
    assert rows.tolist() == [2, 13, 14, 15]
    np.testing.assert_allclose(weights, [1.0, 0.0, 0.22**-0.5, 0.22**-0.5], rtol=1e-6)


@pytest.fixture(scope="module")
def llama():
    model = make_tiny_model("llama", dtype=torch.float32)
    ids = torch.randint(4, 260, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    calibration = calibrate(
        model,
        discover(model),
        FORMATS,
        [ids],
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, ids[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        method=CalibrationMethod.MAX,
    )

    def loss():
        # Half of the tokens have next to no part in the loss.
        scale = torch.where(torch.arange(TOKENS) % 2 == 0, 1.0, 0.01)[:, None]
        generator = torch.Generator().manual_seed(0)
        total = fisher_noise_loss(forward_logits(model, ids) * scale, generator)
        return BatchLoss(total, SEQUENCES, TOKENS)

    return model, calibration, loss


def scorer_of(model, calibration, kind=FisherProjection, **options):
    return kind(
        model,
        discover(model),
        FORMATS,
        calibration,
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        dtype=torch.float32,
        **options,
    )


def projected_rows(scorer, loss):
    """How many rows every product with the error of a weight had, and the scores."""
    rows, project = [], scorer._errors.project

    def counted(slots, name, output_gradient, *inputs):
        rows.append(len(output_gradient))
        return project(slots, name, output_gradient, *inputs)

    scorer._errors.project = counted
    return rows, scorer.score_batch(0, loss)


def test_fewer_rows_are_projected_and_scores_keep_their_expectation(llama):
    model, calibration, loss = llama
    every, exact = projected_rows(scorer_of(model, calibration, added_variance=0.0), loss)
    assert set(every) == {SEQUENCES * TOKENS}
    draws = []
    for seed in range(32):
        scorer = scorer_of(model, calibration, added_variance=0.1, seed=seed)
        rows, found = projected_rows(scorer, loss)
        assert sum(rows) < 0.8 * sum(every)
        draws.append(found)
    draws = np.stack(draws)
    error = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    # Unbiased: within what 32 draws can be off.
    assert (abs(draws.mean(axis=0) - exact) < 4.5 * error + 1e-12).all()
    spread = draws.mean(axis=1).std(axis=0, ddof=1) / exact.mean(axis=0)
    # The bound of a tenth of the second moment, over as many tokens: a few per cent of a score.
    assert spread.max() < 0.2
    assert spread.min() > 0


def test_interactions_keep_their_size(llama):
    model, calibration, loss = llama
    every, sampled = (scorer_of(model, calibration, added_variance=share) for share in (0.0, 0.02))
    for scorer in (every, sampled):
        scorer.score_batch(0, loss)
    expected, found = (s.results()["interactions"] for s in (every, sampled))
    groups, formats = expected.shape[:2]
    own = np.einsum("gfgf->gf", expected)
    scale = np.sqrt(own[:, :, None, None] * own[None, None])  # Cauchy and Schwarz's bound
    assert expected.shape == (groups, formats, groups, formats)
    assert abs((found - expected) / scale).max() < 0.2
    assert abs((found - expected) / scale).mean() < 0.03


def test_experts_take_all_their_tokens():
    model = make_tiny_model("mixtral", dtype=torch.float32)
    ids = torch.randint(4, 260, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    calibration = calibrate(
        model,
        discover(model),
        FORMATS,
        [ids],
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, ids[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        method=CalibrationMethod.MAX,
    )

    def loss():
        generator = torch.Generator().manual_seed(0)
        total = fisher_noise_loss(forward_logits(model, ids), generator)
        return BatchLoss(total, SEQUENCES, TOKENS)

    every = scorer_of(model, calibration, added_variance=0.0).score_batch(0, loss)
    some = scorer_of(model, calibration, added_variance=0.5).score_batch(0, loss)
    experts = ["experts" in group.name for group in discover(model).groups]
    assert 0 < sum(experts) < len(experts)
    np.testing.assert_array_equal(some[:, experts], every[:, experts])
    assert (some[:, np.invert(experts)] != every[:, np.invert(experts)]).any()


def test_an_estimator_that_sums_over_tokens_takes_all(llama):
    model, calibration, loss = llama
    scorer = scorer_of(model, calibration, SequenceProjection, added_variance=0.5, draws=1)
    rows, _ = projected_rows(scorer, loss)
    assert set(rows) == {SEQUENCES * TOKENS}


def test_the_same_seed_takes_the_same_tokens(llama):
    model, calibration, loss = llama
    first, second, other = (
        scorer_of(model, calibration, seed=seed).score_batch(3, loss) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_a_later_batch_takes_the_tokens_that_it_would_take_after_others(llama):
    """The first batch of a scorer also runs blocks to see what they keep; that counts for nothing."""
    model, calibration, loss = llama
    first, second = (scorer_of(model, calibration) for _ in range(2))
    first.score_batch(0, loss)
    after, alone = first.score_batch(1, loss), second.score_batch(1, loss)
    rows, _ = projected_rows(scorer_of(model, calibration), loss)
    assert max(rows) < SEQUENCES * TOKENS
    assert np.array_equal(after, alone)
