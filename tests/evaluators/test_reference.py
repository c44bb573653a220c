"""The original's outputs: each computed once if they fit, within the bound if not."""

import pytest
import torch

from autoq.evaluators import ReferenceOutputs


class Original:
    """Remembers which batches it was run on, and how many outputs are alive at most."""

    def __init__(self):
        self.runs = []

    def __call__(self, part):
        self.runs.append([int(ids[0, 0]) for ids in part])
        return [ids + 100 for ids in part]


def measured(outputs, original, batches, shift):
    found = list(outputs.pairs(original, lambda ids: ids + shift))
    assert len(found) == len(batches)
    for batch, (ids, expected, changed) in zip(batches, found, strict=True):
        assert ids is batch
        assert torch.equal(expected, ids + 100)
        assert torch.equal(changed, ids + shift)


@pytest.mark.parametrize(
    ("memory_bytes", "first", "again"),
    [
        (200, [[0, 1, 2, 3, 4]], []),  # all fit
        (160, [[0, 1], [2, 3], [4]], [[2, 3], [4]]),  # half of the bound holds two for good
        (70, [[0], [1], [2], [3], [4]], [[0], [1], [2], [3], [4]]),  # room for one: none is held
        (10, [[0], [1], [2], [3], [4]], [[0], [1], [2], [3], [4]]),
    ],
)
def test_the_original_runs_no_more_than_it_must(memory_bytes, first, again):
    batches = [torch.full((1, 2), index) for index in range(5)]
    outputs = ReferenceOutputs(batches, bytes_per_batch=40, memory_bytes=memory_bytes)
    original = Original()
    measured(outputs, original, batches, 7)
    assert original.runs == first
    original.runs.clear()
    measured(outputs, original, batches, 8)
    assert original.runs == again


def test_no_batches_give_no_pairs():
    original = Original()
    assert list(ReferenceOutputs([], bytes_per_batch=40).pairs(original, lambda ids: ids)) == []
    assert original.runs == []
