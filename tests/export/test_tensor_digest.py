"""What tells a tensor that was read back from the one that was written."""

from __future__ import annotations

import pytest
import torch

from autoq.export._shards import _WORD_BYTES, _WORDS_AT_ONCE, tensor_digest

STRETCH_BYTES = _WORDS_AT_ONCE * _WORD_BYTES
LENGTHS = [1, 7, 8, 9, STRETCH_BYTES - 1, STRETCH_BYTES, STRETCH_BYTES + 1, 3 * STRETCH_BYTES + 5]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_kind_of_place_counts(length: int) -> None:
    tensor = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1)).byte()
    places = {0, length // 2, length - 1, length // 8 * 8 - 1, STRETCH_BYTES - 1, STRETCH_BYTES}
    found = {tensor_digest(tensor)}
    for place in {place for place in places if 0 <= place < length}:
        for bit in range(8):
            changed = tensor.clone()
            changed[place] ^= 1 << bit
            found.add(tensor_digest(changed))
    assert len(found) == 1 + 8 * len({place for place in places if 0 <= place < length})


@pytest.mark.parametrize("bit", range(8))
def test_the_same_bit_in_two_places_counts(bit: int) -> None:
    """Flips that would cancel in a plain sum, those of the words' highest bits first of all."""
    tensor = torch.zeros(STRETCH_BYTES, dtype=torch.uint8)
    found = {tensor_digest(tensor)}
    for first, second in [(7, 15), (7, 8007), (3, 11), (0, 8), (1, 6)]:
        changed = tensor.clone()
        changed[first] ^= 1 << bit
        changed[second] ^= 1 << bit
        found.add(tensor_digest(changed))
    assert len(found) == 6


def test_order_shape_dtype_and_length_count() -> None:
    ones = torch.arange(1024, dtype=torch.int64)
    others = [
        ones.flip(0),
        ones.view(32, 32),
        ones.view(torch.float64),
        ones[:-1],
        torch.cat([ones, torch.zeros(1, dtype=torch.int64)]),
    ]
    assert len({tensor_digest(tensor) for tensor in [ones, *others]}) == 1 + len(others)


def test_places_in_memory_do_not_count() -> None:
    tensor = torch.randn(64, 65)
    shifted = torch.empty(64 * 65 * 4 + 3, dtype=torch.uint8)[3:]
    shifted.copy_(tensor.view(-1).view(torch.uint8))
    assert tensor_digest(tensor.t().contiguous().t()) == tensor_digest(tensor)
    assert tensor_digest(shifted) == tensor_digest(tensor.view(-1).view(torch.uint8))
    assert tensor_digest(torch.empty(0, 4)) != tensor_digest(torch.empty(0, 5))
