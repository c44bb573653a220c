"""Scores of cache formats: equal to plain autograd, true to measured KL; choices: by brute force."""

import itertools

import numpy as np
import pytest
import torch

from autoq.calibration.kv_cache import calibrate_cache
from autoq.errors import InputError, ModelError
from autoq.formats.kv_cache import KV_CACHE_FORMATS
from autoq.layers.cached_layer import CachedLayer
from autoq.layers.kv_cache import (
    CacheSimulation,
    cache_scale,
    cached_layers,
    fake_quantize_cache,
    watched_cache,
)
from autoq.models import discover, forward_logits
from autoq.search import SensitivityTable
from autoq.search._batch_loss import BatchLoss
from autoq.search.cache_choice import choose_cache
from autoq.search.kv_cache import CacheScorer
from autoq.search.objectives import divergence_of, fisher_noise_loss
from autoq.testing.tiny_models import make_tiny_model

FORMATS = ("fp8", "int8", "nvfp4")
SEQUENCES, TOKENS = 3, 9


def token_ids(seed=0, sequences=SEQUENCES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 260, (sequences, TOKENS), generator=generator)


def noise_loss(model, ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return BatchLoss(fisher_noise_loss(forward_logits(model, ids), generator), *ids.shape)


def calibrated(model, batches):
    layers = cached_layers(model, lambda: forward_logits(model, batches[0]))
    return calibrate_cache(model, layers, batches, lambda ids: forward_logits(model, ids))


def made(name="llama"):
    model = make_tiny_model(name, dtype=torch.float32)
    ids = token_ids()
    return model, ids, calibrated(model, [ids])


def test_calibration_finds_the_largest_key_and_value_of_all_batches():
    model = make_tiny_model("llama", dtype=torch.float32)
    batches = [token_ids(seed) for seed in range(3)]
    kept = {}

    def keep(name, keys, values):
        kept.setdefault(name, []).append((float(keys.abs().max()), float(values.abs().max())))
        return keys, values

    layers = calibrated(model, batches)
    with watched_cache(model, [layer.name for layer in layers], keep), torch.no_grad():
        for ids in batches:
            forward_logits(model, ids)
    for layer in layers:
        assert layer.key_amax == max(key for key, _ in kept[layer.name])
        assert layer.value_amax == max(value for _, value in kept[layer.name])


def test_a_cache_with_nan_is_refused_by_name():
    model = make_tiny_model("llama", dtype=torch.float32)
    layers = cached_layers(model, lambda: forward_logits(model, token_ids()))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"value of model.layers.1.self_attn is NaN"):
        calibrate_cache(model, layers, [token_ids()], lambda ids: forward_logits(model, ids))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_scores_equal_those_of_plain_autograd(name):
    model, ids, layers = made(name)
    found = CacheScorer(model, discover(model), layers, (*FORMATS, "none")).score_batch(
        lambda: noise_loss(model, ids)
    )
    assert found.shape == (SEQUENCES, len(layers), len(FORMATS))
    kept = {}

    def keep(layer, keys, values):
        kept[layer] = keys, values
        keys.retain_grad()
        values.retain_grad()
        return keys, values

    with watched_cache(model, [layer.name for layer in layers], keep):
        noise_loss(model, ids).total.backward()
    for row, layer in enumerate(layers):
        keys, values = kept[layer.name]
        for column, fmt in enumerate(FORMATS):
            expected = np.zeros(SEQUENCES)
            for sequence, token in itertools.product(range(SEQUENCES), range(TOKENS)):
                change = 0.0
                for cached, amax in ((keys, layer.key_amax), (values, layer.value_amax)):
                    error = (
                        fake_quantize_cache(cached, fmt, cache_scale(fmt, amax)) - cached.detach()
                    )
                    change += float((cached.grad * error)[sequence, :, token].sum())
                expected[sequence] += 0.5 * change**2 / TOKENS
            # float32 sums of a hundred terms of either sign, in another order.
            np.testing.assert_allclose(found[:, row, column], expected, rtol=2e-3)


def test_a_model_with_frozen_parameters_is_scored_and_left_as_it_was():
    model, ids, layers = made()
    scorer = CacheScorer(model, discover(model), layers, FORMATS)
    first = scorer.score_batch(lambda: noise_loss(model, ids))
    model.requires_grad_(False)
    assert np.array_equal(scorer.score_batch(lambda: noise_loss(model, ids)), first)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scores_predict_the_divergence():
    model, ids, layers = made()
    scorer = CacheScorer(model, discover(model), layers, FORMATS)
    draws = [
        scorer.score_batch(lambda seed=seed: noise_loss(model, ids, seed)) for seed in range(40)
    ]
    predicted = np.mean(draws, axis=(0, 1)).sum(axis=0)
    with torch.no_grad():
        before = forward_logits(model, ids)
    for column, fmt in enumerate(FORMATS):
        simulation = CacheSimulation.calibrated(
            model, {layer.name: fmt for layer in layers}, layers
        )
        simulation.install()
        with torch.no_grad():
            measured = float(divergence_of("logits")(before, forward_logits(model, ids)).mean())
        simulation.remove()
        # 27 tokens: cross terms between tokens and layers, which are left out, do not average away.
        assert predicted[column] == pytest.approx(measured, rel=0.5)


def test_a_layer_that_cannot_take_a_format_has_no_score():
    model, ids, layers = made()
    heads = layers[0].key_heads * layers[0].key_dim
    odd = CachedLayer(
        name=layers[0].name,
        key_heads=heads // 8,
        key_dim=8,
        value_heads=heads // 8,
        value_dim=8,
        key_amax=1.0,
        value_amax=1.0,
    )
    found = CacheScorer(model, discover(model), [odd, layers[1]], FORMATS).score_batch(
        lambda: noise_loss(model, ids)
    )
    assert np.isnan(found[:, 0, 2]).all()
    assert np.isfinite(np.delete(found.reshape(SEQUENCES, -1), 2, axis=1)).all()


# Choosing


def table_of(layers, seed=0):
    generator = np.random.default_rng(seed)
    scale = np.array([1.0, 0.5, 8.0])
    return SensitivityTable(
        groups=tuple(layer.name for layer in layers),
        formats=FORMATS,
        contributions=generator.random((4, len(layers), 3)) * scale,
        unit="nats_per_token",
        estimator="made up",
    )


def layers_of(*sizes):
    return [
        CachedLayer(
            name=f"layer{number}", key_heads=heads, key_dim=32, value_heads=heads, value_dim=16
        )
        for number, heads in enumerate(sizes)
    ]


def mean_bits(layers, assignment):
    total = sum(
        layer.elements * KV_CACHE_FORMATS[name].bits
        for layer, name in zip(layers, assignment, strict=True)
    )
    return total / sum(layer.elements for layer in layers)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4.5, 5.3, 8.0, 9.7, 16.0])
@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_choice_is_the_best_of_all(scope, bits, seed):
    layers = layers_of(1, 2, 4, 8)
    table = table_of(layers, seed)
    offered = (*FORMATS, "none")
    scores = np.concatenate([table.scores(), np.zeros((4, 1))], axis=1)
    every = itertools.product(range(4), repeat=4)
    if scope == "model":
        every = [(column,) * 4 for column in range(4)]
    losses = {
        columns: sum(scores[row, column] for row, column in enumerate(columns))
        for columns in every
        if mean_bits(layers, [offered[column] for column in columns]) <= bits
    }
    plan = choose_cache(table, layers, offered, bits, scope)
    assert plan.predicted_loss == pytest.approx(min(losses.values()), rel=1e-9, abs=1e-12)
    assert plan.bound <= plan.predicted_loss * (1 + 1e-9)
    chosen = [plan.assignment[layer.name] for layer in layers]
    assert plan.effective_bits == pytest.approx(mean_bits(layers, chosen))
    assert plan.effective_bits <= bits + 1e-9
    # One choice per layer is never worse than one for all.
    if scope == "layer":
        assert (
            plan.predicted_loss
            <= choose_cache(table, layers, offered, bits, "model").predicted_loss
        )


def test_what_is_not_offered_is_not_taken():
    layers = layers_of(1, 1)
    plan = choose_cache(table_of(layers), layers, ("nvfp4", "fp8"), 8.0, "layer")
    assert set(plan.assignment.values()) == {"fp8"}
    assert choose_cache(table_of(layers), layers, ("nvfp4",), 16.0, "model").effective_bits == 4.5


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_impossible_wishes_are_refused(scope):
    layers = layers_of(1, 2)
    odd = [*layers, CachedLayer(name="odd", key_heads=1, key_dim=24, value_heads=1, value_dim=24)]
    with pytest.raises(InputError, match=r"at least 8 for a cache in fp8, int8, got 7"):
        choose_cache(table_of(layers), layers, ("fp8", "int8"), 7, scope)
    with pytest.raises(InputError, match="at least one quantised format, got none"):
        choose_cache(table_of(layers), layers, ("none",), 16, scope)
    with pytest.raises(InputError, match="keys of odd have 24; offer fp8"):
        choose_cache(table_of(odd), odd, ("nvfp4",), 8, scope)
    with pytest.raises(InputError, match="no key/value cache format named 'fp4'"):
        choose_cache(table_of(layers), layers, ("fp4",), 8, scope)
    with pytest.raises(InputError, match=r"--kv-bits must be at least"):
        choose_cache(table_of(layers), layers, ("nvfp4",), float("nan"), scope)
