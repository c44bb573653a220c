"""Largest magnitudes of what a model caches: the scales of a quantised key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.layers.kv_cache import CachedLayer, watched_cache


@torch.no_grad()
def calibrate_cache(
    model: nn.Module,
    layers: Sequence[CachedLayer],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[CachedLayer, ...]:
    """The layers with the largest magnitude of their keys, and of their values, over all batches.

    Args:
        layers: from `cached_layers`.
        run: runs the model on one batch.
        after_batch: called when a batch is done.
    Raises:
        ModelError: a key or a value is NaN or infinite; names the layer.
    """
    largest = {layer.name: (0.0, 0.0) for layer in layers}

    def record(name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        key_amax, value_amax = largest[name]
        largest[name] = (
            max(key_amax, _amax(name, "key", keys)),
            max(value_amax, _amax(name, "value", values)),
        )
        return keys, values

    with watched_cache(model, largest, record):
        for batch in batches:
            run(batch)
            after_batch()
    return tuple(
        replace(layer, key_amax=largest[layer.name][0], value_amax=largest[layer.name][1])
        for layer in layers
    )


def _amax(name: str, what: str, cached: Tensor) -> float:
    found = float(cached.abs().amax())
    if not found < float("inf"):  # NaN is not, either
        raise ModelError(
            f"a {what} of {name} is NaN or Inf on calibration data; run the model in a wider dtype "
            "(--dtype float32)"
        )
    return found
