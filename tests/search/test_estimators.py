"""Estimators beside the default: equal to their formulas, computed by autograd token by token."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from autoq.calibration import calibrate
from autoq.errors import InputError, UnknownNameError
from autoq.formats import FORMATS
from autoq.layers import fake_quantize_input, fake_quantize_weight
from autoq.layers.quantize import Container
from autoq.layers.simulate import SimulatedModel
from autoq.models import discover, forward_logits
from autoq.search.estimators import (
    DEFAULT_ESTIMATOR,
    ESTIMATORS,
    Diagonal,
    ForwardOnly,
    SequenceProjection,
    TokenProjection,
    make_estimator,
)
from autoq.search.objectives import next_token_loss, own_distribution_loss
from autoq.search.sensitivity import BatchLoss
from autoq.testing.tiny_models import make_tiny_model

FORMAT_NAMES = ("fp8", "nvfp4", "w4a8_awq")
SEQUENCES, TOKENS, FEATURES = 2, 5, 128


class Stack(nn.Module):
    """Two linears with something crooked in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def draw(seed):
    return torch.randn(SEQUENCES, TOKENS, FEATURES, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def stack():
    model, x = Stack(), draw(1)
    calibration = calibrate(
        model,
        discover(model),
        FORMAT_NAMES,
        [x],
        model,
        run_small=lambda: model(x[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
    )
    return model, x, calibration


def estimator_of(kind, model, calibration, **options):
    return kind(
        model,
        discover(model),
        FORMAT_NAMES,
        calibration,
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        dtype=torch.float32,
        **options,
    )


def loss_along(model, x, *directions):
    """A loss whose further draws go along other directions."""
    output = model(x)
    totals = [(output * direction).sum() for direction in directions]
    return BatchLoss(totals[0], SEQUENCES, TOKENS, output, totals.__getitem__)


def elementwise(model, x, calibration, direction):
    """g * dy of both layers by plain autograd, float64 [layer][format] of [S, T, out]."""
    model = copy.deepcopy(model)
    inputs = [x, torch.tanh(model.first(x)).detach()]
    first = model.first(x)
    second = model.second(torch.tanh(first))
    gradients = torch.autograd.grad((second * direction).sum(), [first, second])
    found = []
    for name, values, gradient in zip(("first", "second"), inputs, gradients, strict=True):
        weight, bias = getattr(model, name).weight.detach(), getattr(model, name).bias.detach()
        row = []
        for fmt in FORMAT_NAMES:
            scales = calibration[name, fmt]
            quantised = fake_quantize_weight(
                weight, FORMATS[fmt], scales, scale_dtype=torch.bfloat16
            )
            changed = fake_quantize_input(values, FORMATS[fmt], scales)
            change = changed.double() @ quantised.double().t() + bias
            change -= values.double() @ weight.double().t() + bias
            row.append(gradient.double() * change)
        found.append(row)
    return found


def expected_of(products, reduce):
    """[sequences, layers, formats] of a reduction of [S, T, out] to [S]."""
    table = [[reduce(values) for values in row] for row in products]
    return np.moveaxis(np.asarray([[cell.numpy() for cell in row] for row in table]), 2, 0)


FORMULAS = {
    TokenProjection: lambda e: 0.5 * e.sum(-1).square().sum(-1) / TOKENS,
    SequenceProjection: lambda e: 0.5 * e.sum((-1, -2)).square() / TOKENS,
    Diagonal: lambda e: 0.5 * e.square().sum((-1, -2)) / TOKENS,
}


@pytest.mark.parametrize("kind", list(FORMULAS), ids=lambda kind: kind.name)
def test_scores_follow_their_formula(stack, kind):
    model, x, calibration = stack
    direction = draw(2)
    options = {} if kind.labels == "data" else {"draws": 1}
    estimator = estimator_of(kind, model, calibration, **options)
    found = estimator.score_batch(0, lambda: loss_along(model, x, direction))
    expected = expected_of(elementwise(model, x, calibration, direction), FORMULAS[kind])
    assert found.shape == (SEQUENCES, 2, 3)
    np.testing.assert_allclose(found, expected, rtol=2e-3)
    others = [formula for other, formula in FORMULAS.items() if other is not kind]
    for formula in others:  # the formulas differ by far more than the tolerance
        other = expected_of(elementwise(model, x, calibration, direction), formula)
        assert abs(np.log(found / other)).mean() > 0.1


@pytest.mark.parametrize("kind", [TokenProjection, SequenceProjection], ids=lambda kind: kind.name)
def test_draws_of_labels_are_averaged_and_share_a_forward(stack, kind):
    model, x, calibration = stack
    directions = [draw(seed) for seed in (2, 3, 4)]
    forwards = []

    def loss():
        forwards.append(1)
        return loss_along(model, x, *directions)

    found = estimator_of(kind, model, calibration, draws=3).score_batch(0, loss)
    assert len(forwards) == 1
    single = [
        estimator_of(kind, model, calibration, draws=1).score_batch(
            0, partial(loss_along, model, x, direction)
        )
        for direction in directions
    ]
    np.testing.assert_allclose(found, np.mean(single, axis=0), rtol=1e-6)
    assert SequenceProjection.default_draws > TokenProjection.default_draws == 1


def test_draws_work_through_checkpointed_blocks():
    model = make_tiny_model("llama", dtype=torch.float32)
    ids = torch.randint(4, 260, (2, 8), generator=torch.Generator().manual_seed(0))
    calibration = calibrate(
        model,
        discover(model),
        FORMAT_NAMES,
        [ids],
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, ids[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
    )

    def total(output, seed):
        return own_distribution_loss(output, torch.Generator().manual_seed(seed))

    def loss(first=0):
        output = forward_logits(model, ids)
        again = partial(total, output)
        return BatchLoss(total(output, first), 2, 8, output, again)

    both = estimator_of(TokenProjection, model, calibration, draws=2).score_batch(0, loss)
    single = [
        estimator_of(TokenProjection, model, calibration).score_batch(0, partial(loss, seed))
        for seed in (0, 1)
    ]
    np.testing.assert_allclose(both, (single[0] + single[1]) / 2, rtol=1e-6)
    assert not np.allclose(single[0], single[1], rtol=0.01)


def test_next_token_loss_is_the_cross_entropy_of_the_data():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    log_p = logits.double().log_softmax(-1)
    causal = -sum(log_p[s, t, ids[s, t + 1]] for s in range(2) for t in range(2))
    same = -sum(log_p[s, t, ids[s, t]] for s in range(2) for t in range(3))
    torch.testing.assert_close(next_token_loss(logits, ids, shift=True), causal.float())
    torch.testing.assert_close(next_token_loss(logits, ids, shift=False), same.float())


def test_names_are_registered_and_wrong_ones_refused(stack):
    model, _, calibration = stack
    assert DEFAULT_ESTIMATOR in ESTIMATORS
    assert all(kind.name == name and kind.__doc__ for name, kind in ESTIMATORS.items())
    with pytest.raises(UnknownNameError, match=r"no estimator named 'diagnal' \(did you mean diag"):
        make_estimator(
            "diagnal",
            model,
            discover(model),
            FORMAT_NAMES,
            calibration,
            container=Container.MODELOPT,
            scale_dtype=torch.bfloat16,
        )


def test_options_that_mean_nothing_are_refused(stack):
    model, x, calibration = stack
    with pytest.raises(InputError, match="diagonal takes its labels from the data, so draws must"):
        estimator_of(Diagonal, model, calibration, draws=2)
    with pytest.raises(InputError, match="draws must be >= 1, got 0"):
        estimator_of(TokenProjection, model, calibration, draws=0)
    with pytest.raises(InputError, match=r"sequence_projection needs all tokens.*got 0\.5"):
        estimator_of(SequenceProjection, model, calibration, row_fraction=0.5)
    own = estimator_of(TokenProjection, model, calibration, draws=2)
    with pytest.raises(InputError, match="a loss of your own has no labels to draw"):
        own.score_batch(0, lambda: BatchLoss(model(x).sum(), SEQUENCES, TOKENS))


def kl_per_sequence(model, ids, change):
    """KL(original || changed) of every sequence, nats per token; `change` returns its undoing."""
    with torch.no_grad():
        before = forward_logits(model, ids).double().log_softmax(-1)
        undo = change()
        after = forward_logits(model, ids).double().log_softmax(-1)
        undo()
    return (before.exp() * (before - after)).sum(-1).mean(-1).numpy()


def test_forward_only_measures_each_group_alone():
    model = make_tiny_model("llama", dtype=torch.float32)
    ids = torch.randint(4, 260, (2, 8), generator=torch.Generator().manual_seed(0))
    model_map = discover(model)
    calibration = calibrate(
        model,
        model_map,
        FORMAT_NAMES,
        [ids],
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, ids[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
    )
    group = model_map.groups[1]
    del calibration[group.slots[0], "nvfp4"]

    def loss():
        output = forward_logits(model, ids)
        total = own_distribution_loss(output, torch.Generator().manual_seed(0))
        return BatchLoss(total, *ids.shape, output)

    estimator = estimator_of(ForwardOnly, model, calibration)
    found = estimator.score_batch(0, loss)
    assert found.shape == (2, len(model_map.groups), 3)
    assert estimator.unit == "nats_per_token"
    assert np.isnan(found[:, 1, FORMAT_NAMES.index("nvfp4")]).all()
    for row, column in ((0, 0), (1, 0), (2, 1), (5, 2), (7, 1)):
        chosen, name = model_map.groups[row], FORMAT_NAMES[column]

        def quantise(chosen=chosen, name=name):
            return SimulatedModel(
                model,
                model_map.slots,
                dict.fromkeys(chosen.slots, name),
                calibration,
                container=Container.MODELOPT,
                scale_dtype=torch.bfloat16,
            ).restore

        expected = kl_per_sequence(model, ids, quantise)
        np.testing.assert_allclose(found[:, row, column], expected, rtol=2e-3)


def test_forward_only_takes_a_loss_without_output(stack):
    model, x, calibration = stack
    direction = draw(2)
    estimator = estimator_of(ForwardOnly, model, calibration)
    found = estimator.score_batch(
        0, lambda: BatchLoss((model(x) * direction).square().sum(), SEQUENCES, TOKENS)
    )
    assert estimator.unit == "relative"
    assert (found[0] == found[1]).all()
    scales = calibration["second", "fp8"]
    weight = fake_quantize_weight(
        model.second.weight, FORMATS["fp8"], scales, scale_dtype=torch.bfloat16
    )
    with torch.no_grad():
        hidden = torch.tanh(model.first(x))
        changed = fake_quantize_input(hidden, FORMATS["fp8"], scales) @ weight.t()
        changed += model.second.bias
        grown = (changed * direction).square().sum() - (model(x) * direction).square().sum()
    expected = max(float(grown), 0.0) / (SEQUENCES * TOKENS)
    np.testing.assert_allclose(found[0, 1, 0], expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(InputError, match="samples neither tokens nor labels"):
        estimator_of(ForwardOnly, model, calibration, row_fraction=0.5)


def test_interactions_are_the_mean_products_of_projections(stack):
    model, x, calibration = stack
    directions = {0: draw(2), 1: draw(3)}
    estimator = estimator_of(TokenProjection, model, calibration)
    scores = []
    for index, direction in directions.items():
        scores.append(estimator.score_batch(index, partial(loss_along, model, x, direction)))
    gram = estimator.results()["interactions"]
    assert gram.shape == (2, 3, 2, 3)
    vectors = [
        torch.stack(
            [
                torch.stack([cell.sum(-1).flatten() for cell in row])
                for row in elementwise(model, x, calibration, direction)
            ]
        )
        for direction in directions.values()
    ]
    together = torch.cat(vectors, dim=2)  # [groups, formats, tokens]
    expected = torch.einsum("gft,hkt->gfhk", together, together) / together.shape[2]
    np.testing.assert_allclose(gram, expected.numpy(), rtol=2e-3, atol=2e-3 * float(expected.max()))
    own = gram.reshape(6, 6).diagonal().reshape(2, 3)
    np.testing.assert_allclose(own, 2 * np.concatenate(scores).mean(axis=0), rtol=1e-5)
    assert abs(gram[0, 0, 1, 0]) > 0

    # An estimator that goes on from the state of the first batch ends with the same bits.
    first, later = (estimator_of(TokenProjection, model, calibration) for _ in range(2))
    first.score_batch(0, partial(loss_along, model, x, directions[0]))
    later.load_state({name: array.copy() for name, array in first.state().items()})
    later.score_batch(1, partial(loss_along, model, x, directions[1]))
    assert np.array_equal(later.results()["interactions"], gram)
    silent = estimator_of(TokenProjection, model, calibration, interactions=False)
    assert not silent.state()
    assert not silent.results()


def test_interactions_of_sampled_tokens_are_those_of_all_on_average(stack):
    model, x, calibration = stack
    loss = partial(loss_along, model, x, draw(2))
    whole = estimator_of(TokenProjection, model, calibration)
    whole.score_batch(0, loss)
    samples = []
    for seed in range(40):
        sampled = estimator_of(TokenProjection, model, calibration, row_fraction=0.4, seed=seed)
        sampled.score_batch(0, loss)
        samples.append(sampled.results()["interactions"])
    error = np.std(samples, axis=0, ddof=1) / np.sqrt(len(samples))
    expected = whole.results()["interactions"]
    assert (abs(np.mean(samples, axis=0) - expected) <= 4.5 * error + 1e-12).all()
