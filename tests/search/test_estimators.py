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
from autoq.search.estimator_names import ESTIMATOR_NAMES
from autoq.search.estimators import (
    DEFAULT_ESTIMATOR,
    ESTIMATORS,
    Diagonal,
    Factored,
    ForwardOnly,
    QuantizedPoint,
    SequenceProjection,
    TokenProjection,
    _factors,
    make_estimator,
)
from autoq.search.estimators.factored import score_new_format
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
    if kind is TokenProjection:
        options.setdefault("added_variance", 0.0)  # all tokens
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


def tokens_at_point(model, x, calibration, point, reference, labels):
    """Brute force at an operating point: (h . dy, g . dy), float64 [layer][format or none][S, T].

    h: gradient of the divergence from `reference`; g: of the loss with the given label direction.
    """
    layers = {"first": model.first, "second": model.second}

    def seen(name, fmt, values):
        weight = layers[name].weight.detach()
        if fmt == "none":
            return values, weight
        scales = calibration[name, fmt]
        matrix = fake_quantize_weight(weight, FORMATS[fmt], scales, scale_dtype=torch.bfloat16)
        return fake_quantize_input(values, FORMATS[fmt], scales), matrix

    with torch.no_grad():
        changed, matrix = seen("first", point["first"], x)
        before = changed @ matrix.t() + model.first.bias
    before.requires_grad_(True)
    hidden = torch.tanh(before)
    changed, matrix = seen("second", point["second"], hidden.detach())
    # Straight through: rounding changes values, and passes gradients.
    output = (hidden + (changed - hidden).detach()) @ matrix.t() + model.second.bias
    output.retain_grad()
    found = []
    for loss in (0.5 * (reference - output).square().sum(), (output * labels).sum()):
        before.grad = output.grad = None
        loss.backward(retain_graph=True)
        rows = []
        for name, values, gradient in (
            ("first", x, before.grad),
            ("second", hidden.detach(), output.grad),
        ):
            now, now_matrix = seen(name, point[name], values)
            row = []
            for fmt in (*FORMAT_NAMES, "none"):
                then, then_matrix = seen(name, fmt, values)
                change = then.double() @ then_matrix.double().t()
                change -= now.double() @ now_matrix.double().t()
                row.append((gradient.double() * change).sum(-1))
            rows.append(row)
        found.append(rows)
    return found, 0.5 * (reference - output).double().square().sum(-1).mean(-1).detach()


def at_point(model, x, direction):
    output = model(x)
    return BatchLoss((output * direction).sum(), SEQUENCES, TOKENS, output)


@pytest.mark.parametrize(
    "point", [None, {"first": "fp8", "second": "none"}], ids=["smallest", "given"]
)
def test_scores_at_a_quantised_point_are_those_of_brute_force(stack, point):
    model, x, calibration = stack
    direction = draw(5)
    estimator = estimator_of(QuantizedPoint, model, calibration, point=point)
    raw = estimator.score_batch(0, partial(at_point, model, x, direction))
    assert raw.shape == (SEQUENCES, 2, 5)
    # w4a8_awq stores 4.25 bits, nvfp4 4.5.
    named = point or {"first": "w4a8_awq", "second": "w4a8_awq"}
    with torch.no_grad():
        reference = model(x)
    (first, second), divergence = tokens_at_point(
        model, x, calibration, named, reference, direction
    )
    np.testing.assert_allclose(raw[:, 0, -1], divergence.numpy(), rtol=1e-3, atol=1e-9)
    linear = expected_of(first, lambda p: p.mean(-1))
    quadratic = expected_of(second, lambda p: 0.5 * p.square().mean(-1))
    expected = linear + quadratic
    np.testing.assert_allclose(raw[..., :-1], expected, rtol=2e-3, atol=2e-3 * abs(expected).max())

    final = estimator.finish(raw)
    assert final.shape == (SEQUENCES, 2, 3)
    scores = final.mean(axis=0)
    assert (scores >= 0).all()
    if point is None:
        column = FORMAT_NAMES.index("w4a8_awq")
        # What is predicted for the point is what was measured there.
        np.testing.assert_allclose(scores[:, column].sum(), divergence.mean(), rtol=1e-3)
        back = np.clip(-expected[..., -1].mean(axis=0), 0, None)
        share = back / back.sum() * float(divergence.mean())
        wanted = np.clip(expected[..., :-1].mean(axis=0) + share[:, None], 0, None)
        np.testing.assert_allclose(scores, wanted, rtol=5e-3, atol=5e-3 * wanted.max())


def test_a_point_must_be_usable_and_needs_an_output(stack):
    model, x, calibration = stack
    with pytest.raises(InputError, match="must give first a format that it can take, got mxfp8"):
        estimator_of(QuantizedPoint, model, calibration, point={"first": "mxfp8"})
    with pytest.raises(InputError, match="draws labels once, so draws must be 1, got 2"):
        estimator_of(QuantizedPoint, model, calibration, draws=2)
    own = estimator_of(QuantizedPoint, model, calibration)
    with pytest.raises(InputError, match="compares outputs, and a loss of your own shows none"):
        own.score_batch(0, lambda: BatchLoss(model(x).sum(), SEQUENCES, TOKENS))


def moments_by_hand(model, x, direction):
    """(inputs, output gradients) of both layers, float64 [rows, features]."""
    model = copy.deepcopy(model)
    first = model.first(x)
    second = model.second(torch.tanh(first))
    gradients = torch.autograd.grad((second * direction).sum(), [first, second])
    inputs = [x, torch.tanh(first).detach()]
    return [
        (a.flatten(0, 1).double(), g.flatten(0, 1).double())
        for a, g in zip(inputs, gradients, strict=True)
    ]


def test_factored_scores_are_traces_of_second_moments(stack, monkeypatch):
    model, _, calibration = stack
    data = [draw(1), draw(7)]
    directions = [draw(2), draw(3)]
    rows = SEQUENCES * TOKENS * 2
    estimator = estimator_of(Factored, model, calibration)
    raw = [
        estimator.score_batch(index, partial(loss_along, model, data[index], directions[index]))
        for index in range(2)
    ]
    final = estimator.finish(np.concatenate(raw))
    by_batch = [moments_by_hand(model, *pair) for pair in zip(data, directions, strict=True)]
    for layer, name in enumerate(("first", "second")):
        inputs = torch.cat([batch[layer][0] for batch in by_batch])
        gradients = torch.cat([batch[layer][1] for batch in by_batch])
        weight = getattr(model, name).weight.detach()
        for column, fmt in enumerate(FORMAT_NAMES):
            scales = calibration[name, fmt]
            matrix = fake_quantize_weight(weight, FORMATS[fmt], scales, scale_dtype=torch.bfloat16)
            error = (matrix - weight).double()
            second = inputs.t() @ inputs / rows
            curvature = gradients.t() @ gradients / rows
            trace = torch.trace(curvature @ error @ second @ error.t())
            change = fake_quantize_input(inputs.float(), FORMATS[fmt], scales).double() - inputs
            moved = (change * (gradients @ weight.double())).sum(1).square().mean()
            expected = 0.5 * float(trace + moved)
            np.testing.assert_allclose(final.mean(axis=0)[layer, column], expected, rtol=2e-3)
    assert (final.std(axis=0) > 0).all()

    # Going on from the state of the first batch gives the same bits.
    early, late = (estimator_of(Factored, model, calibration) for _ in range(2))
    early.score_batch(0, partial(loss_along, model, data[0], directions[0]))
    late.load_state({name: array.copy() for name, array in early.state().items()})
    late.score_batch(1, partial(loss_along, model, data[1], directions[1]))
    assert np.array_equal(late.finish(np.concatenate(raw)), final)

    # Diagonals where memory does not suffice for whole matrices.
    monkeypatch.setattr(_factors, "FACTOR_BYTES", 0)
    small = estimator_of(Factored, model, calibration)
    raw_small = [
        small.score_batch(index, partial(loss_along, model, data[index], directions[index]))
        for index in range(2)
    ]
    assert (
        sum(a.nbytes for a in small.state().values() if a.ndim == 2 and a.shape[0] == a.shape[1])
        == 0
    )
    inputs = torch.cat([batch[0][0] for batch in by_batch]).square().sum(0) / rows
    gradients = torch.cat([batch[0][1] for batch in by_batch]).square().sum(0) / rows
    matrix = fake_quantize_weight(
        model.first.weight.detach(),
        FORMATS["nvfp4"],
        calibration["first", "nvfp4"],
        scale_dtype=torch.bfloat16,
    )
    error = (matrix - model.first.weight.detach()).double()
    diagonal = 0.5 * float((gradients[:, None] * error.square() * inputs).sum())
    part = small.finish(np.concatenate(raw_small)) - np.concatenate(raw_small)
    np.testing.assert_allclose(part.mean(axis=0)[0, 1], diagonal, rtol=2e-3)


class Repeated(nn.Module):
    """A linear that runs twice, another that shares its first input, and one behind them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.beside, self.last = (nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, x):
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))) + self.beside(x))


def test_rows_are_kept_with_their_own_gradients_where_a_module_runs_again():
    model, x, direction = Repeated(), draw(1), draw(2)
    model_map = discover(model)
    calibration = calibrate(
        model,
        model_map,
        FORMAT_NAMES,
        [x],
        model,
        run_small=lambda: model(x[:1]),
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
    )
    estimator = estimator_of(Factored, model, calibration)
    estimator.score_batch(0, partial(loss_along, model, x, direction))
    found = score_new_format(
        "fp8",
        estimator.results(),
        model,
        model_map,
        calibration,
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
    )

    # Both runs' inputs are leaves here, so that each has the gradient of its own run.
    scales, weight = calibration["twice", "fp8"], model.twice.weight.detach().double()
    inputs = [x, torch.tanh(model.twice(x)).detach()]
    outputs = [model.twice(x), None]
    outputs[1] = model.twice(torch.tanh(outputs[0]))
    loss = (model.last(torch.tanh(outputs[1]) + model.beside(x)) * direction).sum()
    gradients = [g.flatten(0, 1).double() for g in torch.autograd.grad(loss, outputs)]
    rows = [values.flatten(0, 1).double() for values in inputs]
    tokens = SEQUENCES * TOKENS
    moved = sum(
        ((fake_quantize_input(a.float(), FORMATS["fp8"], scales).double() - a) * (g @ weight))
        .sum(1)
        .square()
        .sum()
        for a, g in zip(rows, gradients, strict=True)
    )
    matrix = fake_quantize_weight(
        model.twice.weight.detach(), FORMATS["fp8"], scales, scale_dtype=torch.bfloat16
    )
    error = matrix.double() - weight
    second = sum(a.t() @ a for a in rows) / (2 * tokens)
    curvature = sum(g.t() @ g for g in gradients) / tokens
    trace = torch.trace(curvature @ error @ second @ error.t())
    row = [group.slots for group in model_map.groups].index(("twice",))
    assert found[row] == pytest.approx(0.5 * float(trace + moved / tokens), rel=2e-3)


@pytest.mark.parametrize("kind", [Factored, TokenProjection], ids=lambda kind: kind.name)
def test_a_state_that_was_given_out_stays_as_it_was(stack, kind):
    model, x, calibration = stack
    estimator = estimator_of(kind, model, calibration)
    estimator.score_batch(0, partial(loss_along, model, x, draw(2)))
    state = estimator.state()
    before = {name: np.array(values) for name, values in state.items()}
    estimator.score_batch(1, partial(loss_along, model, draw(5), draw(3)))

    assert before
    for name, values in state.items():
        np.testing.assert_array_equal(values, before[name], err_msg=name)
    assert any(not np.array_equal(values, before[n]) for n, values in estimator.state().items())


def test_a_new_format_is_scored_from_the_stored_factors_alone(stack):
    model, _, calibration = stack
    data, direction = draw(1), draw(2)
    known = {key: scales for key, scales in calibration.items() if key[1] == "fp8"}
    estimator = Factored(
        model,
        discover(model),
        ("fp8",),
        known,
        container=Container.MODELOPT,
        scale_dtype=torch.bfloat16,
        dtype=torch.float32,
    )
    estimator.score_batch(0, partial(loss_along, model, data, direction))
    everything = estimator_of(Factored, model, calibration)
    whole = everything.finish(
        everything.score_batch(0, partial(loss_along, model, data, direction))
    )
    for column, name in enumerate(FORMAT_NAMES):
        found = score_new_format(
            name,
            estimator.results(),
            model,
            discover(model),
            calibration,
            container=Container.MODELOPT,
            scale_dtype=torch.bfloat16,
        )
        # All ten rows of the batch are among the sampled ones.
        np.testing.assert_allclose(found, whole.mean(axis=0)[:, column], rtol=1e-4)


def test_the_names_that_need_no_torch_are_those_of_the_classes() -> None:
    assert set(ESTIMATORS) == ESTIMATOR_NAMES
