"""Forward passes that begin in the middle give the bits of whole ones, and only where they can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoq.layers.prefix import PrefixReuse, is_exact
from autoq.models.forward import forward_logits
from autoq.testing.tiny_models import make_tiny_model


class Chain(nn.Module):
    """Four layers, counted as they run."""

    def __init__(self, order=(0, 1, 2, 3)):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.order = order
        self.runs = [0] * 4
        for index, layer in enumerate(self.layers):
            layer.register_forward_hook(lambda *_, index=index: self._count(index))

    def _count(self, index):
        self.runs[index] += 1

    def forward(self, inputs):
        for index in self.order:
            inputs = torch.tanh(self.layers[index](inputs))
        return inputs


BLOCKS = [f"layers.{index}" for index in range(4)]
INPUTS = torch.linspace(-1, 1, 24).reshape(3, 8)
BLOCK_BYTES = INPUTS.numel() * 4


@pytest.fixture
def chain():
    model = Chain()
    with torch.no_grad():
        yield model


def reuse_of(model, memory_bytes=1 << 20):
    return PrefixReuse(model, BLOCKS, memory_bytes=memory_bytes)


def test_a_known_prefix_is_not_computed_again_and_the_rest_is(chain):
    reuse = reuse_of(chain)
    reuse.run("batch", [1, 2, 3, 4], lambda: chain(INPUTS))
    chain.layers[2].weight.mul_(2.0)  # another format in the third block
    expected = chain(INPUTS)
    before = reuse.blocks_skipped
    found = reuse.run("batch", [1, 2, 5, 6], lambda: chain(INPUTS))
    assert torch.equal(found, expected)
    assert reuse.blocks_skipped - before == 2


def test_other_batches_and_other_prefixes_are_computed(chain):
    reuse = reuse_of(chain)
    reuse.run("batch", [1, 2, 3, 4], lambda: chain(INPUTS))
    assert torch.equal(reuse.run("other", [1, 2, 3, 4], lambda: chain(-INPUTS)), chain(-INPUTS))
    assert torch.equal(reuse.run("batch", [9, 8, 7, 6], lambda: chain(-INPUTS)), chain(-INPUTS))
    assert reuse.blocks_skipped == 0


def test_what_was_used_longest_ago_goes_when_memory_is_full(chain):
    reuse = reuse_of(chain, memory_bytes=4 * BLOCK_BYTES)  # the last block is never kept
    reuse.run("first", [1, 2, 3, 4], lambda: chain(INPUTS))
    reuse.run("second", [1, 2, 3, 4], lambda: chain(-INPUTS))  # leaves one entry of the first
    assert torch.equal(reuse.run("second", [1, 2, 3, 5], lambda: chain(-INPUTS)), chain(-INPUTS))
    assert reuse.blocks_skipped == 3
    assert torch.equal(reuse.run("first", [1, 2, 3, 5], lambda: chain(INPUTS)), chain(INPUTS))


def test_what_is_preferred_stays_however_much_else_comes(chain):
    reuse = reuse_of(chain, memory_bytes=4 * BLOCK_BYTES)  # the last block is never kept
    reuse.run("batch", [1, 2, 3, 4], lambda: chain(INPUTS))
    reuse.prefer([1, 2, 3, 4])
    for other in range(10, 90, 10):  # nothing in common, three outputs each
        reuse.run("batch", [other, other + 1, other + 2, other + 3], lambda: chain(INPUTS))
    assert reuse.blocks_skipped == 0
    assert torch.equal(reuse.run("batch", [1, 2, 3, 5], lambda: chain(INPUTS)), chain(INPUTS))
    assert reuse.blocks_skipped == 3


def test_what_is_preferred_no_longer_makes_room(chain):
    reuse = reuse_of(chain, memory_bytes=3 * BLOCK_BYTES)
    reuse.run("batch", [1, 2, 3, 4], lambda: chain(INPUTS))
    reuse.prefer([1, 2, 3, 4])
    reuse.prefer([7, 8, 9, 10])
    reuse.run("batch", [7, 8, 9, 10], lambda: chain(INPUTS))
    reuse.run("batch", [7, 8, 9, 11], lambda: chain(INPUTS))
    assert reuse.blocks_skipped == 3


def test_preferred_outputs_replace_each_other_where_not_all_fit(chain):
    reuse = reuse_of(chain, memory_bytes=2 * BLOCK_BYTES)
    reuse.prefer([1, 2, 3, 4])
    reuse.run("batch", [1, 2, 3, 4], lambda: chain(INPUTS))
    assert torch.equal(reuse.run("batch", [1, 2, 3, 5], lambda: chain(INPUTS)), chain(INPUTS))
    assert reuse.blocks_skipped == 3  # the latest two are there: the third block's is enough


@pytest.mark.parametrize("memory_bytes", [0, BLOCK_BYTES - 1])
def test_without_room_nothing_is_kept(chain, memory_bytes):
    reuse = reuse_of(chain, memory_bytes)
    for _ in range(2):
        assert torch.equal(reuse.run(0, [1, 2, 3, 4], lambda: chain(INPUTS)), chain(INPUTS))
    assert reuse.blocks_skipped == 0


def test_blocks_have_their_own_forward_again_after_a_failure(chain):
    reuse = reuse_of(chain)
    reuse.run(0, [1, 2, 3, 4], lambda: chain(INPUTS))

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        reuse.run(0, [1, 2, 3, 5], fail)
    assert "forward" not in vars(chain.layers[0])
    assert torch.equal(chain(INPUTS), Chain()(INPUTS))


@pytest.mark.parametrize(
    ("order", "exact"),
    [
        ((0, 1, 2, 3), True),
        ((3, 2, 1, 0), False),
        ((0, 1, 0, 2, 3), False),
        ((0, 1, 2, 3, 0), False),
    ],
)
def test_models_that_use_blocks_otherwise_are_found_out(order, exact):
    model = Chain(order)
    with torch.no_grad():
        assert is_exact(model, BLOCKS, lambda: model(INPUTS)) is exact


def test_a_model_that_writes_into_its_blocks_outputs_is_found_out():
    class InPlace(Chain):
        def forward(self, inputs):
            for layer in self.layers:
                inputs = layer(inputs).tanh_()
            return inputs

    model = InPlace()
    with torch.no_grad():
        assert not is_exact(model, BLOCKS, lambda: model(INPUTS))


def test_a_model_of_one_block_has_no_middle():
    model = Chain()
    assert not is_exact(model, BLOCKS[:1], lambda: model(INPUTS))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "mixtral", "bert", "t5"])
def test_architectures_are_exact_or_refused(name):
    """Whatever the answer, using it gives the right bits; decoders of today's kind are exact."""
    from autoq.models.discovery import discover

    model = make_tiny_model(name, dtype=torch.float32)
    ids = torch.arange(24).reshape(2, 12) + 5
    with torch.no_grad():
        exact = is_exact(model, discover(model).blocks, lambda: forward_logits(model, ids))
    assert exact or name == "t5"
