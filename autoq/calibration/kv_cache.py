"""Largest magnitudes of what a model caches: the scales of a quantised key/value cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.layers.cached_layer import CachedLayer
from autoq.layers.kv_cache import layer_of, unseen_cache, watched_cache


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
    magnitudes = CacheMagnitudes(model, [layer.name for layer in layers])
    with magnitudes.recorded():
        for batch in batches:
            run(batch)
            after_batch()
    return tuple(magnitudes.of(layer) for layer in layers)


class CacheMagnitudes:
    """The largest magnitudes of what attentions hand to their caches while somebody runs them."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """
        Args:
            names: paths of attention modules, from `autoq.layers.kv_cache`.
        """
        self._model, self._names = model, names
        self._found: dict[str, CachedLayer] = {}

    @contextmanager
    def recorded(self, inside: str = "") -> Iterator[None]:
        """Record while the context holds.

        Args:
            inside: beginning of the paths to watch; the others do not run.
        Raises:
            ModelError: a key or a value is NaN or infinite; names the layer.
        """
        names = [name for name in self._names if name.startswith(inside)]
        with watched_cache(self._model, names, self._record):
            yield

    def layers(self) -> tuple[CachedLayer, ...]:
        """Every layer that was seen, in the order in which they first ran.

        Raises:
            ModelError: there is none.
        """
        if not self._found:
            raise unseen_cache(self._model)
        return tuple(self._found.values())

    def of(self, layer: CachedLayer) -> CachedLayer:
        """A layer with its largest magnitudes; zeros where it never ran."""
        found = self._found.get(layer.name, layer)
        return replace(layer, key_amax=found.key_amax, value_amax=found.value_amax)

    def _record(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        before = self._found.get(name) or layer_of(self._model, name, keys, values)
        self._found[name] = replace(
            before,
            key_amax=max(before.key_amax, _amax(name, "key", keys)),
            value_amax=max(before.value_amax, _amax(name, "value", values)),
        )
        return keys, values


def _amax(name: str, what: str, cached: Tensor) -> float:
    found = float(cached.abs().amax())
    if not found < float("inf"):  # NaN is not, either
        raise ModelError(
            f"a {what} of {name} is NaN or Inf on calibration data; run the model in a wider dtype "
            "(--dtype float32)"
        )
    return found
