"""Quantised weights are kept within their bound, and are what quantising again would give."""

from __future__ import annotations

import pytest
import torch

from autoq.layers.weight_cache import WeightCache


def weights(value: float) -> torch.Tensor:
    return torch.full((4, 8), value)  # 128 bytes


def test_what_was_put_comes_back_and_is_a_copy():
    cache = WeightCache(1000)
    original = weights(1.0)
    cache.put("a", "fp8", original)
    original.zero_()
    assert torch.equal(cache.get("a", "fp8"), weights(1.0))
    assert cache.get("a", "nvfp4") is None
    assert cache.get("b", "fp8") is None


def test_the_bound_holds_and_the_longest_unused_goes_first():
    cache = WeightCache(300)  # room for two
    cache.put("a", "fp8", weights(1.0))
    cache.put("b", "fp8", weights(2.0))
    cache.get("a", "fp8")
    cache.put("c", "fp8", weights(3.0))
    assert cache.bytes_held == 256
    assert cache.get("b", "fp8") is None
    assert torch.equal(cache.get("a", "fp8"), weights(1.0))
    assert torch.equal(cache.get("c", "fp8"), weights(3.0))


@pytest.mark.parametrize("memory_bytes", [0, 127])
def test_what_never_fits_is_not_kept(memory_bytes):
    cache = WeightCache(memory_bytes)
    cache.put("a", "fp8", weights(1.0))
    assert cache.bytes_held == 0
    assert cache.get("a", "fp8") is None
