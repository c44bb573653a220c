"""The scoring pass: batch by batch, resumable, with a way out where gradients do not reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from autoq.progress import Advance
from autoq.search.estimators import Estimator, ForwardOnly
from autoq.search.sensitivity import BatchLoss, NoGradientError

Scores = NDArray[np.float64]

STATE_BYTES_PER_BATCH = 16 << 20
"""A state that is larger is kept after every few batches only: it is written as a whole."""


class BatchStore(Protocol):
    """Where the results of batches are kept."""

    def estimator(self) -> str | None:
        """The estimator that took the place of the one asked for, if one did."""
        ...

    def switch_to(self, estimator: str) -> None:
        """Forget all batches, and remember that another estimator makes them from now on."""
        ...

    def batches(self) -> dict[int, Scores]:
        """The batches that are there, 0 to n - 1."""
        ...

    def put(self, index: int, scores: Scores, seconds: float) -> None:
        """Keep a batch; the same again changes nothing."""
        ...

    def state(self, batches: int) -> tuple[int, Mapping[str, NDArray[Any]]]:
        """The newest state after at most so many batches, and after how many it is; 0: none."""
        ...

    def put_state(self, batches: int, state: Mapping[str, NDArray[Any]]) -> None:
        """Keep the state after the first `batches` batches, before the last of them is put."""
        ...


@dataclass
class BatchesInMemory:
    """Results of batches that nobody will continue."""

    name: str | None = None
    scores: dict[int, Scores] = field(default_factory=dict)

    def estimator(self) -> str | None:
        """See `BatchStore`."""
        return self.name

    def switch_to(self, estimator: str) -> None:
        """See `BatchStore`."""
        self.name = estimator
        self.scores.clear()

    def batches(self) -> dict[int, Scores]:
        """See `BatchStore`."""
        return self.scores

    def put(self, index: int, scores: Scores, seconds: float) -> None:
        """See `BatchStore`."""
        del seconds
        self.scores[index] = scores

    def state(self, batches: int) -> tuple[int, Mapping[str, NDArray[Any]]]:
        """See `BatchStore`."""
        del batches
        return 0, {}

    def put_state(self, batches: int, state: Mapping[str, NDArray[Any]]) -> None:
        """See `BatchStore`."""
        del batches, state


@dataclass(frozen=True)
class ScoringPass:
    """One pass over the batches of a task."""

    make: Callable[[str], Estimator]  # name -> estimator, with the options of the search
    batches: int
    loss: Callable[[int], BatchLoss]
    store: BatchStore
    advance: Advance
    note: Callable[[str], None]
    enough: Callable[[Estimator, int, Scores], bool] | None = None
    exclusion: str = "--exclude"  # what the caller's option is called that leaves out a layer

    def run(self, name: str) -> tuple[Estimator, Scores]:
        """Score with the estimator called `name`, or without gradients if there are none.

        Returns:
            The estimator that scored, and the final contributions [sequences, groups, formats].
        Raises:
            ModelError: the model cannot be scored.
        """
        estimator = self.make(self.store.estimator() or name)
        try:
            return estimator, self._scored(estimator)
        except NoGradientError as error:
            if not estimator.needs_backward:
                raise
            self.note(
                f"{error.text(self.exclusion)}; until then every group is measured by itself, with forward passes "
                f"alone ({ForwardOnly.name}), on {ForwardOnly.sequences_wanted} sequences"
            )
        self.store.switch_to(ForwardOnly.name)
        fallback = self.make(ForwardOnly.name)
        return fallback, self._scored(fallback)

    def _scored(self, estimator: Estimator) -> Scores:
        stored = dict(self.store.batches())
        start = len(stored)
        self.advance(start)
        if estimator.state():
            start, state = self.store.state(start)
            estimator.load_state(state)
        collected = [stored[index] for index in range(start)]
        while len(collected) < self.batches and not self._is_enough(estimator, collected):
            index = len(collected)
            collected.append(self._batch(estimator, index))
            if index not in stored:
                self.advance()
        return estimator.finish(np.concatenate(collected))

    def _batch(self, estimator: Estimator, index: int) -> Scores:
        started = time.perf_counter()
        scores = estimator.score_batch(index, partial(self.loss, index))
        state = estimator.state()
        if state and self._keeps_state(state, index + 1):
            self.store.put_state(index + 1, state)
        self.store.put(index, scores, time.perf_counter() - started)
        return scores

    def _keeps_state(self, state: Mapping[str, NDArray[Any]], batches: int) -> bool:
        size = sum(array.nbytes for array in state.values())
        return batches % max(1, size // STATE_BYTES_PER_BATCH) == 0

    def _is_enough(self, estimator: Estimator, collected: list[Scores]) -> bool:
        if not collected:
            return False
        sequences = sum(len(scores) for scores in collected)
        wanted = estimator.sequences_wanted
        if wanted is not None and sequences >= wanted:
            return True
        return self.enough is not None and self.enough(
            estimator, len(collected), np.concatenate(collected)
        )
