"""The scoring pass: batch by batch, resumable, with a way out where gradients do not reach."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from autoq.api.config import ScoringConfig
from autoq.api.task import LoadedModel
from autoq.models import ModelMap
from autoq.progress import Advance
from autoq.search._projections import Calibrations
from autoq.search.estimators import Estimator, ForwardOnly, make_estimator
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


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """What one batch gave, where batches are scored in any order."""

    scores: Scores
    addition: Mapping[str, NDArray[Any]]  # see `Estimator.addition`


Take: TypeAlias = Callable[[int, Callable[[], None]], ScoredBatch]
"""(number of a batch, what to call now and then while waiting) -> what the batch gave."""


class BatchHelpers(Protocol):
    """Who scores batches beside this process."""

    def dealing(
        self,
        estimator: str,
        batches: range,
        here: Callable[[int], ScoredBatch],
        note: Callable[[str], None],
    ) -> AbstractContextManager[Take]:
        """Have batches scored, until the context ends; they are asked for in their order.

        Args:
            estimator: name of the one that scores.
            batches: all that may be asked for.
            here: scores a batch in this process.
            note: told of helpers that were lost.
        """
        ...

    def report(self) -> list[dict[str, Any]]:
        """Who has scored how many batches, as plain data."""
        ...


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
    helpers: BatchHelpers | None = None  # who score batches beside this process

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
        with self._scoring(estimator, range(start, self.batches)) as score:
            while len(collected) < self.batches and not self._is_enough(estimator, collected):
                index = len(collected)
                collected.append(self._batch(estimator, index, score))
                if index not in stored:
                    self.advance()
        return estimator.finish(np.concatenate(collected))

    @contextmanager
    def _scoring(self, estimator: Estimator, batches: range) -> Iterator[Callable[[int], Scores]]:
        """How to score batches, which are asked for in their order."""

        def here(index: int) -> Scores:
            return estimator.score_batch(index, partial(self.loss, index))

        if self.helpers is None or not batches:
            yield here
        elif not estimator.keep_batches_apart():
            self.note(f"{estimator.name} sums up as it scores, so one process scores all batches")
            yield here
        else:

            def apart(index: int) -> ScoredBatch:
                return ScoredBatch(here(index), estimator.addition())

            with self.helpers.dealing(estimator.name, batches, apart, self.note) as take:

                def taken(index: int) -> Scores:
                    scored = take(index, partial(self.advance, 0))
                    estimator.add(scored.addition)
                    return scored.scores

                yield taken

    def _batch(self, estimator: Estimator, index: int, score: Callable[[int], Scores]) -> Scores:
        started = time.perf_counter()
        scores = score(index)
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


def make_scoring_estimator(
    name: str,
    loaded: LoadedModel,
    model_map: ModelMap,
    calibration: Calibrations,
    config: ScoringConfig,
) -> Estimator:
    """The estimator called `name`; the configured options were meant for the configured one."""
    own = name == config.estimator
    return make_estimator(
        name,
        loaded.model,
        model_map,
        config.formats,
        calibration,
        container=config.container,
        scale_dtype=loaded.storage_dtype,
        seed=config.seed,
        **({"row_fraction": config.row_fraction, "draws": config.draws} if own else {}),
    )
