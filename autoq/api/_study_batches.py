"""The batches of a scoring pass in a study store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoq.errors import UnknownNameError
from autoq.studies import StudyStore

if TYPE_CHECKING:
    from autoq.api.scoring import Scores

FINAL = "contributions"
"""Array of the stage that holds the final contributions, where they are not the batches'."""

_SWITCHED = "estimator"
_STATE = "state/"
_AFTER = "batches"


class StudyBatches:
    """Results of batches as rows of the store, states as arrays of the stage.

    Two states are kept by turns. One is written before its batch is, so whenever the process
    dies, the state of the batches that are there is there, too, or an older one.
    """

    def __init__(self, store: StudyStore, study_id: int, stage: str) -> None:
        self._store = store
        self._study_id = study_id
        self._stage = stage
        self._state_after: dict[int, int] | None = None  # place -> batches; read when needed

    def estimator(self) -> str | None:
        """See `BatchStore`."""
        named = stored_array(self._store, self._study_id, self._stage, _SWITCHED)
        return None if named is None else named.tobytes().decode()

    def switch_to(self, estimator: str) -> None:
        """See `BatchStore`."""
        self._store.reset_stage(self._study_id, self._stage)
        self._store.begin_stage(self._study_id, self._stage)
        name = np.frombuffer(estimator.encode(), dtype=np.uint8)
        self._store.put_array(self._study_id, self._stage, _SWITCHED, name)

    def batches(self) -> dict[int, Scores]:
        """See `BatchStore`."""
        return self._store.score_batches(self._study_id)

    def put(self, index: int, scores: Scores, seconds: float) -> None:
        """See `BatchStore`."""
        self._store.put_score_batch(self._study_id, index, scores, seconds)

    def state(self, batches: int) -> tuple[int, Mapping[str, NDArray[Any]]]:
        """See `BatchStore`."""
        arrays = self._arrays()
        # A state after a batch that never came counts as none: it is the first to be overwritten.
        self._state_after = {p: n if n <= batches else 0 for p, n in _states(arrays).items()}
        usable = {n: place for place, n in self._state_after.items() if n}
        if not usable:
            return 0, {}
        prefix = f"{_STATE}{usable[max(usable)]}/"
        found = {
            name.removeprefix(prefix): array
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        return int(found.pop(_AFTER)), found

    def put_state(self, batches: int, state: Mapping[str, NDArray[Any]]) -> None:
        """See `BatchStore`."""
        if self._state_after is None:
            self._state_after = _states(self._arrays())
        older = min((0, 1), key=self._state_after.__getitem__)
        prefix = f"{_STATE}{older}/"
        named = {f"{prefix}{name}": array for name, array in state.items()}
        named[f"{prefix}{_AFTER}"] = np.asarray(batches)
        self._store.put_arrays(self._study_id, self._stage, named)
        self._state_after[older] = batches

    def finish(self, scores: Scores, results: Mapping[str, NDArray[Any]]) -> None:
        """Keep what the pass gave; until the states are dropped, a killed search ends it again."""
        kept = dict(results)
        if not self._are_the_batches(scores):
            kept[FINAL] = scores
        if kept:
            self._store.put_arrays(self._study_id, self._stage, kept)

    def drop_states(self) -> None:
        """Free what the states take: nobody goes on with the pass any more."""
        states = [name for name in self._arrays() if name.startswith(_STATE)]
        self._store.put_arrays(self._study_id, self._stage, dict.fromkeys(states, np.zeros(0)))

    def _are_the_batches(self, scores: Scores) -> bool:
        batches = self.batches()
        joined = np.concatenate([batches[index] for index in sorted(batches)])
        return np.array_equal(joined, scores, equal_nan=True)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return self._store.arrays(self._study_id, self._stage)


def stored_array(store: StudyStore, study_id: int, stage: str, name: str) -> NDArray[Any] | None:
    """One array of a stage, None where there is none; the others may be large, and are not read."""
    try:
        return store.get_array(study_id, stage, name)
    except UnknownNameError:
        return None


def stored_contributions(store: StudyStore, study_id: int, stage: str) -> Scores:
    """What a scoring pass gave, [sequences, groups, formats]."""
    final = stored_array(store, study_id, stage, FINAL)
    if final is not None:
        return final
    batches = store.score_batches(study_id)
    return np.concatenate([batches[index] for index in sorted(batches)])


def _states(arrays: Mapping[str, NDArray[Any]]) -> dict[int, int]:
    """Place of a state -> after how many batches it is; 0 where there is none."""
    after = {place: arrays.get(f"{_STATE}{place}/{_AFTER}") for place in (0, 1)}
    return {place: int(n) if n is not None and n.size else 0 for place, n in after.items()}
