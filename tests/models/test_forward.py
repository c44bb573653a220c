from functools import partial

import pytest
import torch
from torch import nn

from autoq.errors import ModelError
from autoq.models import discover, forward_logits, is_causal, output_kind
from autoq.models.forward import forward_layers, layers_see_all
from autoq.testing.tiny_models import TINY_ARCHITECTURES, VOCABULARY_SIZE, make_tiny_model

NOT_CAUSAL = ("bert", "t5")


def token_ids(seed=0, tokens=24):
    return torch.randint(4, 260, (2, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
@torch.no_grad()
def test_logits_are_useful(name):
    """Finite, different between tokens, neither flat nor all on one token."""
    logits = forward_logits(make_tiny_model(name), token_ids()).float()
    assert logits.shape == (2, 24, VOCABULARY_SIZE)
    assert torch.isfinite(logits).all()
    assert logits.argmax(-1).unique().numel() >= 10
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert 1.0 < entropy < 5.5


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
@torch.no_grad()
def test_causal_means_later_tokens_do_not_matter(name):
    model = make_tiny_model(name, dtype=torch.float32)
    ids = token_ids()
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 256
    same = torch.allclose(
        forward_logits(model, ids)[:, :-1], forward_logits(model, changed)[:, :-1], atol=1e-5
    )
    assert is_causal(model) == same == (name not in NOT_CAUSAL)
    assert output_kind(model) == "logits"


@torch.no_grad()
def inputs_of_layers(model, run):
    """Path -> what each searched module in a block saw."""
    model_map = discover(model)
    inside = tuple(f"{path}." for path in model_map.blocks)
    modules = {slot.module for slot in model_map.slots.values() if slot.module.startswith(inside)}
    seen = {}

    def remember(path, _, args):
        seen[path] = args[0].clone()

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(remember, path))
        for path in modules
    ]
    try:
        run(model, token_ids())
    finally:
        for hook in hooks:
            hook.remove()
    assert seen.keys() == modules
    return seen


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
@torch.no_grad()
def test_layers_see_the_same_without_the_logits(name):
    model = make_tiny_model(name, dtype=torch.float32)
    expected = inputs_of_layers(model, forward_logits)
    found = inputs_of_layers(model, forward_layers)
    assert all(torch.equal(found[path], seen) for path, seen in expected.items())


@torch.no_grad()
def test_the_head_of_a_causal_model_sees_one_token_where_logits_are_not_wanted():
    model = make_tiny_model("llama")
    rows = []
    model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    forward_layers(model, token_ids())
    forward_logits(model, token_ids())
    assert rows == [1, 24]


def test_a_searched_head_does_not_see_all_tokens_without_the_logits():
    model = make_tiny_model("llama")
    assert layers_see_all(discover(model))
    assert not layers_see_all(discover(model, include=["lm_head"]))


def make_bert_decoder():
    """BERT as a language model: before its output head stands a dense layer, which is searched."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        is_decoder=True,
    )
    return transformers.BertLMHeadModel(config).eval()


def test_a_dense_layer_before_the_head_does_not_see_all_tokens_either():
    model = make_bert_decoder()
    model_map = discover(model)
    dense = "cls.predictions.transform.dense"
    assert dense in {slot.module for slot in model_map.slots.values()}
    rows = []
    model.get_submodule(dense).register_forward_pre_hook(
        lambda _, args: rows.append(args[0].shape[1])
    )
    forward_layers(model, token_ids())
    assert rows == [1]
    assert not layers_see_all(model_map)


def test_decoder_sees_the_tokens_shifted_right():
    model = make_tiny_model("t5")
    ids = token_ids()
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.int64), ids[:, :-1]], dim=1)
    expected = model(input_ids=ids, decoder_input_ids=shifted).logits
    assert torch.equal(forward_logits(model, ids), expected)


@torch.no_grad()
def test_model_without_head_gives_hidden_states():
    model = make_tiny_model("llama").model
    assert output_kind(model) == "hidden"
    assert not is_causal(model)
    assert forward_logits(model, token_ids()).shape == (2, 24, 128)


def test_models_without_token_output_are_refused():
    import transformers

    config = make_tiny_model("bert").config
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(ModelError, match="BertForSequenceClassification does not; choose"):
        forward_logits(model, token_ids())


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_gradient_reaches_every_weight(name):
    model = make_tiny_model(name)
    forward_logits(model, token_ids(tokens=64)).float().logsumexp(-1).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert [n for n in silent if "position" not in n and "token_type" not in n] == []


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_equal_seeds_give_equal_weights(name):
    first, second, other = (make_tiny_model(name, seed=seed) for seed in (3, 3, 4))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)


def test_making_a_model_leaves_the_global_random_state():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    make_tiny_model("llama")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_every_format_fits_every_linear(name):
    linears = [m for m in make_tiny_model(name).modules() if isinstance(m, nn.Linear)]
    assert all(linear.in_features % 128 == 0 for linear in linears)
