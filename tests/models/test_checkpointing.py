from functools import partial

import pytest
import torch
from torch import nn

from autoq.models import checkpointed_blocks, discover, forward_logits
from autoq.models.checkpointing import ActivationBudget
from autoq.testing.tiny_models import TINY_ARCHITECTURES, make_tiny_model


def input_gradient(model, ids):
    """Gradient of a loss with respect to the outputs of the token embedding."""
    outputs = []
    table = model.get_input_embeddings().weight
    hooks = [
        module.register_forward_hook(lambda m, i, out: outputs.append(out.requires_grad_()))
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is table
    ]
    try:
        loss = forward_logits(model, ids).float().log_softmax(-1)[..., 7].sum()
        return torch.autograd.grad(loss, outputs)
    finally:
        for hook in hooks:
            hook.remove()


def frozen(name):
    return make_tiny_model(name, dtype=torch.float32).requires_grad_(False)


def token_ids():
    return torch.randint(4, 260, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_gradients_are_those_without_checkpointing(name, train):
    model = frozen(name)
    blocks = discover(model).blocks
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    model.train(train)
    expected = input_gradient(model, token_ids())
    with checkpointed_blocks(model, blocks):
        found = input_gradient(model, token_ids())
    assert len(found) == len(expected) == (2 if name == "t5" else 1)
    for a, b in zip(found, expected, strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_dropout_in_train_mode_draws_alike_in_both_passes():
    block = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).train()
    model = nn.ModuleDict({"block": block})
    inputs = torch.randn(8, 64, requires_grad=True)
    torch.manual_seed(0)
    expected = torch.autograd.grad(block(inputs).square().sum(), inputs)[0]
    with checkpointed_blocks(model, ["block"]):
        torch.manual_seed(0)
        loss = block(inputs).square().sum()
        torch.rand(10)
        found = torch.autograd.grad(loss, inputs)[0]
    assert torch.equal(found, expected)


def count_calls(model, path):
    calls = []
    module = model.get_submodule(path)
    original = module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    return calls


def test_blocks_run_again_in_backward_and_only_with_gradients():
    model = frozen("llama")
    calls = count_calls(model, "model.layers.1.mlp.down_proj")
    with checkpointed_blocks(model, discover(model).blocks):
        with torch.no_grad():
            forward_logits(model, token_ids())
        assert len(calls) == 1
        input_gradient(model, token_ids())
    assert len(calls) == 3
    input_gradient(model, token_ids())
    assert len(calls) == 4


def test_forward_is_restored_after_an_error():
    model = frozen("llama")
    layers = model.model.layers
    own = layers[1].forward
    layers[1].forward = own
    with pytest.raises(ZeroDivisionError), checkpointed_blocks(model, discover(model).blocks):
        assert layers[0].forward is not None and "forward" in vars(layers[0])
        raise ZeroDivisionError
    assert "forward" not in vars(layers[0])
    assert vars(layers[1])["forward"] is own


def test_saved_memory():
    """Between blocks only their inputs are kept: far fewer tensors are saved for backward."""
    model = frozen("llama")

    def saved_bytes():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.__setitem__(t.data_ptr(), t.numel() * t.element_size()) or t,
            lambda t: t,
        ):
            embeddings = model.get_input_embeddings()(token_ids()).requires_grad_()
            output = model(inputs_embeds=embeddings, use_cache=False).logits
        assert output.requires_grad
        return sum(sizes.values())

    without = saved_bytes()
    with checkpointed_blocks(model, discover(model).blocks):
        assert saved_bytes() < without / 2


@pytest.mark.parametrize("name", TINY_ARCHITECTURES)
def test_blocks_that_fit_the_budget_run_once_and_gradients_stay(name):
    model = frozen(name)
    blocks = discover(model).blocks
    expected = input_gradient(model, token_ids())
    runs = dict.fromkeys(blocks, 0)

    def count(path, *_):
        runs[path] += 1

    for path in blocks:
        model.get_submodule(path).register_forward_pre_hook(partial(count, path))
    budget = ActivationBudget(1 << 30)
    for _ in range(2):
        with checkpointed_blocks(model, blocks, budget):
            found = input_gradient(model, token_ids())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert set(runs.values()) == {2}


def test_only_as_many_blocks_as_fit_keep_their_insides():
    model = frozen("llama")
    blocks = discover(model).blocks
    assert len(blocks) == 2
    inside = []
    for path in blocks:
        model.get_submodule(path).mlp.register_forward_pre_hook(lambda *_: inside.append(1))

    def runs(budget):
        inside.clear()
        with checkpointed_blocks(model, blocks, budget):
            input_gradient(model, token_ids())
        return len(inside)

    block = model.model.layers[0]
    hidden = torch.randn(2, 32, 128, requires_grad=True)
    rotary = model.model.rotary_emb(hidden, torch.arange(32)[None])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(hidden, position_embeddings=rotary)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    size = sum(n for address, n in storages.items() if address not in own)
    for limit, blocks_kept in ((0, 0), (size // 2, 0), (size * 3 // 2, 1), (size * 3, 2)):
        budget = ActivationBudget(limit)
        runs(budget)  # measures, by a run of its own
        assert runs(budget) == 4 - blocks_kept


def chain(widths):
    """Blocks one after the other; each keeps its input and two tensors [8, width] for backward."""

    def block(width):
        return nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 16), nn.Tanh())

    blocks = nn.ModuleDict({f"block{index}": block(width) for index, width in enumerate(widths)})
    return blocks.eval().requires_grad_(False), list(blocks)


def runs_of_blocks(model, names, budget, passes=2):
    """How often the inside of each block ran in the last of some forwards and backwards."""
    runs = dict.fromkeys(names, 0)
    hooks = [
        model[name][0].register_forward_hook(
            lambda *_, name=name: runs.__setitem__(name, runs[name] + 1)
        )
        for name in names
    ]
    for _ in range(passes):
        runs.update(dict.fromkeys(names, 0))
        with checkpointed_blocks(model, names, budget):
            hidden = torch.zeros(8, 16, requires_grad=True)
            for name in names:
                hidden = model[name](hidden)
            hidden.sum().backward()
    for hook in hooks:
        hook.remove()
    return list(runs.values())


def bytes_kept(width):
    """Tanh keeps its output, and nothing else is kept under frozen weights: 8 rows of float32."""
    return 8 * 4 * (width + 16)


def test_it_is_the_last_blocks_that_keep_their_insides():
    model, names = chain([32] * 5)
    kept_by_two = ActivationBudget(2 * bytes_kept(32))
    assert runs_of_blocks(model, names, kept_by_two) == [2, 2, 2, 1, 1]
    assert runs_of_blocks(model, names, ActivationBudget(2 * bytes_kept(32) - 1)) == [2, 2, 2, 2, 1]


def test_blocks_of_several_sizes_stay_within_the_budget():
    model, names = chain([32, 32, 256, 64])
    for limit, expected in (
        (bytes_kept(64), [2, 2, 2, 1]),
        (bytes_kept(64) + bytes_kept(256), [2, 2, 1, 1]),
        (bytes_kept(64) + bytes_kept(256) + bytes_kept(32), [2, 1, 1, 1]),
    ):
        assert runs_of_blocks(model, names, ActivationBudget(limit)) == expected


def test_a_forward_that_runs_blocks_twice_stays_within_the_budget():
    model, names = chain([32, 32])
    budget = ActivationBudget(bytes_kept(32))
    assert runs_of_blocks(model, names, budget) == [2, 1]
    with checkpointed_blocks(model, names, budget):
        hidden = torch.zeros(8, 16, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            for name in names * 3:
                hidden = model[name](hidden)
    inside = [t for t in kept if t.shape == (8, 32)]
    assert len(inside) == 1


def test_dropout_in_train_mode_is_not_disturbed_by_measuring():
    block = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).train()
    model = nn.ModuleDict({"block": block})
    inputs = torch.randn(8, 64, requires_grad=True)
    torch.manual_seed(0)
    expected = torch.autograd.grad(block(inputs).square().sum(), inputs)[0]
    torch.manual_seed(0)
    with checkpointed_blocks(model, ["block"], ActivationBudget(1 << 30)):
        found = torch.autograd.grad(model["block"](inputs).square().sum(), inputs)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
