"""What the pass over the key/value cache keeps, so that a killed one goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.api._study_batches import stored_array
from autoq.layers.cached_layer import CachedLayer
from autoq.studies import StudyStore

_MAGNITUDES = "magnitudes"


class CacheBatches:
    """Largest magnitudes of layers, and scores of batches, as arrays of the stage."""

    def __init__(self, store: StudyStore, study_id: int, stage: str) -> None:
        self._store, self._study_id, self._stage = store, study_id, stage
        self._scored: set[int] = set()

    @property
    def is_calibrated(self) -> bool:
        """Whether the magnitudes are there."""
        return self._array(_MAGNITUDES) is not None

    def put_magnitudes(self, layers: Sequence[CachedLayer]) -> None:
        """Keep what calibration found."""
        found = np.array([[layer.key_amax, layer.value_amax] for layer in layers])
        self._store.put_array(self._study_id, self._stage, _MAGNITUDES, found)

    def with_magnitudes(self, layers: Sequence[CachedLayer]) -> tuple[CachedLayer, ...]:
        """The same layers, in the same order, with what was kept of them."""
        found = self._array(_MAGNITUDES)
        assert found is not None
        return tuple(
            replace(layer, key_amax=float(keys), value_amax=float(values))
            for layer, (keys, values) in zip(layers, found, strict=True)
        )

    def has(self, batch: int) -> bool:
        """Whether a batch was scored."""
        return self._array(_name(batch)) is not None

    def put(self, batch: int, scores: NDArray[np.float64]) -> None:
        """Keep the scores of a batch."""
        self._store.put_array(self._study_id, self._stage, _name(batch), scores)
        self._scored.add(batch)

    def get(self, batch: int) -> NDArray[np.float64]:
        """Scores of a batch that was kept."""
        found = self._array(_name(batch))
        assert found is not None
        self._scored.add(batch)
        return found

    def drop(self) -> None:
        """Free what the batches take, as the last thing before the stage is done."""
        nothing = np.zeros(0)
        named = dict.fromkeys([_MAGNITUDES, *map(_name, sorted(self._scored))], nothing)
        self._store.put_arrays(self._study_id, self._stage, named)

    def _array(self, name: str) -> NDArray[Any] | None:
        found = stored_array(self._store, self._study_id, self._stage, name)
        return None if found is None or not found.size else found  # dropped ones are empty


def _name(batch: int) -> str:
    return f"batch {batch}"
