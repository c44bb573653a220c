"""The quantised key/value cache: its numbers, where it is seen, and the way back."""

import dataclasses
import math

import pytest
import torch
import transformers

from autoq.errors import InputError, ModelError, UnknownNameError
from autoq.formats.kv_cache import KV_CACHE_FORMATS, kv_cache_refusal
from autoq.layers import Container
from autoq.layers.cached_layer import CachedLayer
from autoq.layers.kv_cache import (
    CacheSimulation,
    attention_modules,
    cache_scale,
    cached_layers,
    fake_quantize_cache,
)
from autoq.layers.simulate import SimulatedModel
from autoq.models import discover, forward_logits
from autoq.testing.tiny_models import make_family_model, make_tiny_model

TOKENS = 7
QUANTIZED = ("fp8", "int8", "nvfp4")
LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def token_ids(sequences=2, tokens=TOKENS):
    return torch.randint(4, 260, (sequences, tokens), generator=torch.Generator().manual_seed(0))


def layers_of(model):
    return cached_layers(model, lambda: forward_logits(model, token_ids()))


def calibrated(model, amax=1.5):
    return [
        dataclasses.replace(layer, key_amax=amax, value_amax=2 * amax) for layer in layers_of(model)
    ]


@torch.no_grad()
def logits(model):
    return forward_logits(model, token_ids())


# Numbers, computed by hand


def test_fp8_rounds_to_e4m3_under_one_scale():
    x = torch.tensor([17.0, 1.0625, 1.1875, -0.3, 500.0, 2.0**-10])
    expected = torch.tensor([16.0, 1.0, 1.25, -0.3125, 448.0, 0.0])
    assert torch.equal(fake_quantize_cache(x, "fp8", cache_scale("fp8", 448.0)), expected)
    assert torch.equal(fake_quantize_cache(x / 4, "fp8", cache_scale("fp8", 112.0)), expected / 4)


def test_int8_rounds_ties_to_even_and_saturates():
    x = torch.tensor([0.5, 1.5, 2.5, -2.5, 126.6, 200.0, -127.4, -127.6, -300.0])
    expected = torch.tensor([0.0, 2.0, 2.0, -2.0, 127.0, 127.0, -127.0, -128.0, -128.0])
    assert torch.equal(fake_quantize_cache(x, "int8", cache_scale("int8", 127.0)), expected)
    assert torch.equal(fake_quantize_cache(x / 2, "int8", cache_scale("int8", 63.5)), expected / 2)


def test_nvfp4_has_a_scale_for_every_16_elements_of_a_head():
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    rounded = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    small = torch.tensor(values + [-value for value in values])
    expected = torch.tensor(rounded + [-value for value in rounded])
    # Under a top scale of 1 the blocks' scales are 1 and 2, for largest magnitudes of 6 and 12.
    x = torch.cat([small, 2 * small])
    found = fake_quantize_cache(x, "nvfp4", cache_scale("nvfp4", 6.0 * 448.0))
    assert torch.equal(found, torch.cat([expected, 2 * expected]))


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_nothing_cached_in_calibration_leaves_a_scale_of_one(fmt):
    assert torch.equal(
        fake_quantize_cache(torch.zeros(2, 16), fmt, cache_scale(fmt, 0.0)), torch.zeros(2, 16)
    )
    if fmt != "nvfp4":
        assert torch.equal(
            fake_quantize_cache(torch.ones(16), fmt, cache_scale(fmt, 0.0)), torch.ones(16)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_dtype_and_shape_stay(fmt, dtype):
    x = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = fake_quantize_cache(x, fmt, cache_scale(fmt, float(x.abs().max())))
    assert found.dtype == dtype
    assert found.shape == x.shape
    # Half the widest gap of each element, at the largest magnitude: E4M3 32 of 448, INT8 1 of 127,
    # E2M1 2 of 6 whose block scale may be 1/16 too small.
    gaps = {"fp8": 16 / 448, "int8": 0.5 / 127, "nvfp4": (1 + 6 / 16) / 6}
    bound = gaps[fmt] * float(x.abs().max()) * 1.02  # results are rounded to `dtype` again
    assert 0 < float((found.float() - x.float()).abs().max()) <= bound


def test_what_cannot_be_is_refused():
    with pytest.raises(UnknownNameError, match="key/value cache format"):
        fake_quantize_cache(torch.ones(16), "fp4", cache_scale("fp4", 1.0))
    for amax in (-1.0, math.nan, math.inf):
        with pytest.raises(InputError):
            fake_quantize_cache(torch.ones(16), "int8", cache_scale("int8", amax))
    layer = CachedLayer(name="attn", key_heads=2, key_dim=24, value_heads=2, value_dim=32)
    assert "divisible by 16, and keys of attn have 24" in layer.misfit("nvfp4")
    assert layer.misfit("fp8") is None
    assert layer.elements == 2 * 24 + 2 * 32


def test_containers_say_what_they_cannot_state():
    modelopt, compressed = Container.MODELOPT, Container.COMPRESSED_TENSORS
    stated = {
        container: [name for name in KV_CACHE_FORMATS if kv_cache_refusal(name, container) is None]
        for container in Container
    }
    assert stated == {modelopt: ["fp8", "nvfp4", "none"], compressed: ["fp8", "int8", "none"]}
    assert "transformers alone" in kv_cache_refusal("int8", modelopt)


# What is seen


def test_layers_and_their_sizes():
    model = make_tiny_model("llama")
    found = layers_of(model)
    assert tuple(layer.name for layer in found) == LAYERS
    config = model.config
    heads, size = config.num_key_value_heads, config.head_dim
    assert all(
        (e.key_heads, e.key_dim, e.value_heads, e.value_dim) == (heads, size) * 2 for e in found
    )


@pytest.mark.parametrize(
    "family", ["gpt2", "falcon", "phi3", "gemma3", "opt", "bloom", "mpt", "qwen3_moe", "gpt_neox"]
)
@torch.no_grad()
def test_families_are_seen_and_unchanged_where_nothing_is_quantised(family):
    model = make_family_model(family, dtype=torch.float32)
    before = logits(model)
    found = layers_of(model)
    assert len(found) == model.config.get_text_config().num_hidden_layers
    assert torch.equal(logits(model), before)
    simulation = CacheSimulation.calibrated(
        model, {layer.name: "nvfp4" for layer in found}, calibrated(model, amax=4.0)
    )
    simulation.install()
    assert not torch.equal(logits(model), before)
    simulation.remove()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("t5", "has an encoder"),
        ("bert", "continue text"),
        ("mamba", "no keys and values"),
        ("deepseek_v3", "one latent vector"),
    ],
)
def test_models_without_a_cache_of_keys_and_values_are_refused(family, words):
    model = make_family_model(family)
    with pytest.raises(ModelError, match=words):
        cached_layers(model, lambda: forward_logits(model, token_ids()))


def test_convolutions_that_keep_their_state_in_the_cache_are_left_alone():
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            full_attn_idxs=[1],
        )
    )
    found = layers_of(model)
    assert [layer.name for layer in found] == ["model.layers.1.self_attn"]


# Simulation


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention_by_hand(attention, hidden, cos, sin, change):
    """A Llama attention in plain steps, with `change` between cache and products."""
    sequences, tokens, _ = hidden.shape
    size = attention.head_dim

    def heads(projection):
        return projection(hidden).view(sequences, tokens, -1, size).transpose(1, 2)

    queries, keys = (
        rotated(heads(attention.q_proj), cos, sin),
        rotated(heads(attention.k_proj), cos, sin),
    )
    keys, values = change(keys, heads(attention.v_proj))
    repeats = queries.shape[1] // keys.shape[1]
    result = torch.empty_like(queries)
    for head in range(queries.shape[1]):
        scores = queries[:, head] @ keys[:, head // repeats].mT / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -math.inf)
        result[:, head] = scores.softmax(-1) @ values[:, head // repeats]
    return attention.o_proj(result.transpose(1, 2).reshape(sequences, tokens, -1))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("fmt", QUANTIZED)
@torch.no_grad()
def test_simulation_equals_an_attention_computed_by_hand(fmt, kernel):
    model = make_tiny_model("llama", dtype=torch.float32)
    model.set_attn_implementation(kernel)
    attention = model.model.layers[1].self_attn
    seen = {}

    def keep(_, args, kwargs, output):
        seen.update(
            kwargs, hidden=kwargs.get("hidden_states", args[0] if args else None), output=output[0]
        )

    handle = attention.register_forward_hook(keep, with_kwargs=True)
    layers = calibrated(model)
    simulation = CacheSimulation.calibrated(model, {LAYERS[1]: fmt}, layers)
    simulation.install()
    logits(model)
    simulation.remove()
    handle.remove()
    cos, sin = (part[:, None] for part in seen["position_embeddings"])
    _, layer = layers

    def change(keys, values):
        return (
            fake_quantize_cache(keys, fmt, cache_scale(fmt, layer.key_amax)),
            fake_quantize_cache(values, fmt, cache_scale(fmt, layer.value_amax)),
        )

    expected = attention_by_hand(attention, seen["hidden"], cos, sin, change)
    plain = attention_by_hand(attention, seen["hidden"], cos, sin, lambda *cached: cached)
    # Sums in another order move float32 by 1e-6 of the result; keys next to the middle of two codes
    # are the same bits in both, so none goes elsewhere.
    torch.testing.assert_close(seen["output"], expected, rtol=1e-5, atol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-3


@torch.no_grad()
def test_a_layer_that_is_not_named_keeps_its_cache():
    model = make_tiny_model("llama", dtype=torch.float32)
    before = logits(model)
    simulation = CacheSimulation.calibrated(model, dict.fromkeys(LAYERS, "none"), calibrated(model))
    simulation.install()
    assert torch.equal(logits(model), before)


@torch.no_grad()
def test_generating_token_by_token_gives_what_one_pass_gives():
    model = make_tiny_model("llama", dtype=torch.float32)
    simulation = CacheSimulation.calibrated(model, dict.fromkeys(LAYERS, "fp8"), calibrated(model))
    simulation.install()
    ids = token_ids(sequences=1)
    whole = forward_logits(model, ids)
    cache, steps = None, []
    for position in range(TOKENS):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    # One token at a time sums in another order.
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_simulated_model_takes_it_along_and_gives_it_back():
    model = make_tiny_model("llama", dtype=torch.float32)
    before = logits(model)
    model_map = discover(model)
    simulated = SimulatedModel(
        model, model_map.slots, {}, {}, container=Container.MODELOPT, scale_dtype=torch.bfloat16
    )
    simulated.set_kv_cache(
        CacheSimulation.calibrated(model, dict.fromkeys(LAYERS, "int8"), calibrated(model))
    )
    quantised = logits(model)
    assert not torch.equal(quantised, before)
    with simulated.paused():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), quantised)
    simulated.restore()
    assert torch.equal(logits(model), before)
    assert not any(
        model.get_submodule(name)._forward_pre_hooks for name in attention_modules(model)
    )
