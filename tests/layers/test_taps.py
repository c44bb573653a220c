"""Taps: every product of every architecture passes the handler, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from autoq.errors import ModelError
from autoq.layers.taps import install_taps, tapped
from autoq.models import SlotKind, discover, forward_logits, slot_weight
from autoq.testing.tiny_models import TINY_ARCHITECTURES, make_tiny_model

MIXTURES = ("mixtral", "qwen3_moe")
every_architecture = pytest.mark.parametrize("name", TINY_ARCHITECTURES)


def token_ids():
    return torch.randint(4, 260, (2, 6), generator=torch.Generator().manual_seed(0))


def own_forwards(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


class Recorder:
    """A handler that computes the product and remembers it."""

    def __init__(self):
        self.calls = []

    def __call__(self, call, inputs):
        output = call.compute(inputs)
        self.calls.append((call, inputs, output))
        return output


def routed_experts(model, model_map):
    """(experts module, expert) pairs that the router chose."""
    chosen = set()

    def remember(path):
        def hook(_module, args):
            chosen.update((path, expert) for expert in args[1].unique().tolist())

        return hook

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(remember(path))
        for path in {s.module for s in model_map.slots.values() if s.kind is SlotKind.EXPERT}
    ]
    forward_logits(model, token_ids())
    for hook in hooks:
        hook.remove()
    return chosen


@every_architecture
@torch.no_grad()
def test_every_slot_passes_the_handler_and_outputs_keep_their_bits(name):
    model = make_tiny_model(name, dtype=torch.float32)
    model_map = discover(model)
    routed = routed_experts(model, model_map)
    expected = forward_logits(model, token_ids())
    recorder = Recorder()
    with tapped(model, model_map.slots.values(), recorder):
        assert len(own_forwards(model)) == len({s.module for s in model_map.slots.values()})
        found = forward_logits(model, token_ids())
    assert torch.equal(found, expected)
    assert {call.slot.name for call, _, _ in recorder.calls} == {
        slot.name
        for slot in model_map.slots.values()
        if slot.kind is not SlotKind.EXPERT or (slot.module, slot.expert) in routed
    }
    for call, inputs, output in recorder.calls:
        matrix = slot_weight(model, call.slot)
        assert torch.equal(call.weight, matrix)
        assert call.weight.data_ptr() == matrix.data_ptr()
        assert inputs.shape[-1] == call.slot.in_features
        assert output.shape[-1] == call.slot.out_features
        # By hand, without the call's help.
        product = inputs.double() @ matrix.double().t()
        product += 0 if call.bias is None else call.bias.double()
        torch.testing.assert_close(output.double(), product, rtol=1e-5, atol=1e-5)


@every_architecture
@torch.no_grad()
def test_what_the_handler_returns_is_what_the_model_goes_on_with(name):
    model = make_tiny_model(name, dtype=torch.float32)
    model_map = discover(model)
    # The last slot can be an expert without tokens.
    chosen = [s for s in model_map.slots.values() if s.kind is not SlotKind.EXPERT][-1]
    expected = forward_logits(model, token_ids())
    with tapped(model, [chosen], lambda call, inputs: 2 * call.compute(inputs)):
        doubled = forward_logits(model, token_ids())
    assert not torch.equal(doubled, expected)
    owner = model.get_submodule(chosen.module)
    slot_weight(model, chosen).mul_(2)
    if owner.bias is not None:
        owner.bias.mul_(2)
    assert torch.equal(forward_logits(model, token_ids()), doubled)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@torch.no_grad()
def test_forwards_come_back_after_the_context_and_after_an_exception(name):
    model = make_tiny_model(name, dtype=torch.float32)
    model_map = discover(model)
    expected = forward_logits(model, token_ids())

    def fail(_call, _inputs):
        raise RuntimeError("in the handler")

    with (
        pytest.raises(RuntimeError, match="in the handler"),
        tapped(model, model_map.slots.values(), fail),
    ):
        forward_logits(model, token_ids())
    assert own_forwards(model) == []
    assert torch.equal(forward_logits(model, token_ids()), expected)


@torch.no_grad()
def test_removing_brings_back_what_was_there_before():
    model = make_tiny_model("llama", dtype=torch.float32)
    model_map = discover(model)
    slots = list(model_map.slots.values())
    expected = forward_logits(model, token_ids())
    outer, inner = Recorder(), Recorder()
    remove_outer = install_taps(model, slots, outer)
    with tapped(model, slots[:2], inner):
        forward_logits(model, token_ids())
    assert [call.slot.name for call, _, _ in inner.calls] == [slot.name for slot in slots[:2]]
    assert {call.slot.name for call, _, _ in outer.calls} == {slot.name for slot in slots[2:]}
    outer.calls.clear()
    forward_logits(model, token_ids())
    assert {call.slot.name for call, _, _ in outer.calls} == set(model_map.slots)
    remove_outer()
    assert own_forwards(model) == []
    assert torch.equal(forward_logits(model, token_ids()), expected)


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_token_rows_select_the_rows_of_the_experts_inputs(name):
    model = make_tiny_model(name, dtype=torch.float32)
    model_map = discover(model)
    hidden_of = {}
    for path in {s.module for s in model_map.slots.values() if s.kind is SlotKind.EXPERT}:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _module, args, path=path: hidden_of.update({path: args[0]})
        )
    recorder = Recorder()
    with tapped(model, model_map.slots.values(), recorder):
        forward_logits(model, token_ids())
    rows_of = {}
    visits = 0
    for call, inputs, _ in recorder.calls:
        if call.slot.kind is not SlotKind.EXPERT:
            assert call.token_rows is None
            continue
        assert call.token_count == token_ids().numel()
        assert call.token_rows.shape == (inputs.shape[0],)
        key = (call.slot.module, call.slot.expert)
        if call.slot.parameter == "gate_up_proj":
            assert torch.equal(inputs, hidden_of[call.slot.module][call.token_rows])
            rows_of[key] = call.token_rows
            visits += len(call.token_rows)
        else:
            assert torch.equal(call.token_rows, rows_of[key])
    layers = len(hidden_of)
    assert visits == layers * token_ids().numel() * 2  # two experts per token
    # Rows that come in order would hide a wrong order.
    assert any((rows.diff() < 0).any() for rows in rows_of.values())


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_experts_that_hide_their_products_are_refused(name):
    model = make_tiny_model(name, dtype=torch.float32)
    model_map = discover(model)
    model.set_experts_implementation("batched_mm")
    forward_logits(model, token_ids())  # the implementation itself works
    experts = r"model\.layers\.0\.mlp\.experts"
    text = rf"experts of {experts} .* hides .*; call model\.set_experts_implementation\('eager'\)"
    with (
        pytest.raises(ModelError, match=text),
        tapped(model, model_map.slots.values(), Recorder()),
    ):
        forward_logits(model, token_ids())
    assert own_forwards(model) == []


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@torch.no_grad()
def test_a_copy_of_a_tapped_model_works_on_its_own_weights(name):
    model = make_tiny_model(name, dtype=torch.float32)
    model_map = discover(model)
    expected = forward_logits(model, token_ids())
    with tapped(model, model_map.slots.values(), lambda call, inputs: call.compute(inputs)):
        copied = copy.deepcopy(model)
        assert torch.equal(forward_logits(copied, token_ids()), expected)
        for slot in model_map.slots.values():
            slot_weight(copied, slot).zero_()
        assert torch.equal(forward_logits(model, token_ids()), expected)
        assert not torch.equal(forward_logits(copied, token_ids()), expected)
    assert own_forwards(model) == []


def test_gradients_pass_through():
    layer = nn.Linear(4, 3)
    model = nn.Sequential(layer)
    inputs = torch.randn(2, 4, requires_grad=True)
    expected = torch.autograd.grad(model(inputs).square().sum(), [inputs, layer.weight])
    with tapped(model, discover(model).slots.values(), lambda call, x: call.compute(x)):
        found = torch.autograd.grad(model(inputs).square().sum(), [inputs, layer.weight])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
