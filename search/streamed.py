"""Scoring a model of which one block at a time is in memory, to the bits of `score_batch`.

Some batches go through the model side by side: forward, block by block, with what each block gives
kept; then what stands behind the blocks, and the loss of every batch; then back through the blocks,
each computed again from its input, with the gradient at its output. So a block's weights are read
twice for all of these batches, and the graph is never that of more than one block and one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.errors import InputError, ModelError
from autoq.formats import FormatName
from autoq.memory import large_blocks_given_back_at_once
from autoq.models.block_stream import StreamedModel, hidden_of, with_hidden
from autoq.models.kept_tensors import KeptTensors
from autoq.search._batch_loss import BatchLoss, NoGradientError, check_loss
from autoq.search.sensitivity import SensitivityScorer, StartedBatch

_GRADIENT = -1
"""Stands for a block's number where the gradients are kept at which backward goes on."""


class StreamedScorer:
    """An estimator whose model is streamed; otherwise as `autoq.search.estimators.Estimator`."""

    def __init__(
        self,
        scorer: SensitivityScorer,
        model: StreamedModel,
        batches: Sequence[Tensor],
        loss: Callable[[int], BatchLoss],
        *,
        together: int,
        kept: KeptTensors,
        error_bytes: int = 0,
    ) -> None:
        """
        Args:
            scorer: of the same model, on the meta device.
            batches: token ids, int64 [sequences, tokens] each.
            loss: number of a batch -> the summed loss; runs the model.
            together: how many batches go through the model side by side.
            kept: for what blocks give: of so many batches, of all blocks.
            error_bytes: bound on the errors of weights that are kept from batch to batch.
        Raises:
            InputError: the estimator does not score block by block, labels are drawn more than
                once, or a layer lies in no block.
        """
        _refuse(scorer, model)
        self.name, self.unit = scorer.name, scorer.unit
        self.labels, self.formats = scorer.labels, scorer.formats
        self.needs_backward, self.sequences_wanted = True, scorer.sequences_wanted
        self._scorer, self._model, self._kept = scorer, model, kept
        self._batches, self._loss, self._together = batches, loss, together
        self._error_bytes = error_bytes
        self._scored: dict[int, StartedBatch] = {}
        self._first = _first_with_slots(model)

    def score_batch(self, index: int, loss: Callable[[], BatchLoss]) -> NDArray[np.float64]:
        """Contributions of one batch, [sequences, groups, formats]; batches come in order.

        Args:
            loss: not asked; see `__init__`.
        Raises:
            ModelError: as `SensitivityScorer.score_batch`, or the model cannot be run block by
                block.
            OSError: what blocks give cannot be kept.
        """
        del loss
        try:
            if index not in self._scored:
                self._scored.clear()
                self._score(range(index, min(index + self._together, len(self._batches))))
            return self._scorer.contributions(self._scored.pop(index))
        except NoGradientError as error:
            raise ModelError(
                f"{error}; or search without a bound on memory, where such models are measured "
                "with forward passes alone"
            ) from error

    def _score(self, indices: range) -> None:
        self._kept.clear()  # whatever a pass left that failed
        started = {index: self._scorer.start(index) for index in indices}
        with large_blocks_given_back_at_once(), self._scorer.showing_products():
            for number in range(self._model.blocks):
                self._forward(number, started)
            self._behind_the_blocks(started)
            for number in reversed(range(self._first, self._model.blocks)):
                self._backward(number, started)
        self._model.forget_outside()
        self._kept.clear()
        self._scored = started

    @torch.no_grad()
    def _forward(self, number: int, started: Mapping[int, StartedBatch]) -> None:
        with self._model.block(number):
            for index, batch in started.items():
                before = self._kept.get((number - 1, index)) if number else None
                with self._scorer.working_on(batch):
                    output = self._model.output_of(number, self._batches[index], before)
                self._kept.put((number, index), output)

    def _behind_the_blocks(self, started: Mapping[int, StartedBatch]) -> None:
        """The loss of every batch, and its gradient at what the last block gave."""
        for index, batch in started.items():
            last = self._kept.take((self._model.blocks - 1, index))
            hidden = hidden_of(last).requires_grad_(True)
            with self._model.ending_with(with_hidden(last, hidden)), self._scorer.working_on(batch):
                loss = self._loss(index)
                check_loss(loss)
                batch.reach.check_graph(loss.total)
                batch.projections.sequences = loss.sequences
                batch.loss = replace(loss, total=loss.total.detach(), output=None, redraw=None)
                with batch.reach.going_back():
                    loss.total.backward()  # type: ignore[no-untyped-call]
            del loss
            self._kept.put((_GRADIENT, index), hidden.grad)
        self._model.forget_outside()

    def _backward(self, number: int, started: Mapping[int, StartedBatch]) -> None:
        self._scorer.keep_errors(self._error_bytes)
        with self._model.block(number):
            for index, batch in started.items():
                gradient = self._kept.take((_GRADIENT, index))
                before = self._kept.take((number - 1, index)) if number else None
                if gradient is None:  # nothing comes back to here; `contributions` says so
                    self._kept.put((_GRADIENT, index), None)
                    continue
                with self._scorer.working_on(batch), batch.reach.going_back():
                    found = self._gradient_before(number, index, before, gradient)
                self._kept.put((_GRADIENT, index), found)
            self._scorer.keep_errors(0)

    def _gradient_before(
        self, number: int, index: int, before: Any, gradient: Tensor
    ) -> Tensor | None:
        """The gradient at what the block before gave; None where there is none."""
        handed_on = _leaves(before) if number > self._first else []
        output = hidden_of(self._model.output_of(number, self._batches[index], before))
        if not output.requires_grad:
            return None
        torch.autograd.backward(output, gradient)
        if any(leaf.grad is not None for leaf in handed_on[1:]):
            raise ModelError(
                "a model that is scored block by block must hand on nothing but hidden states from "
                f"block to block, and {self._model.map.blocks[number]} uses something else of the "
                "block before; search without a bound on memory"
            )
        return handed_on[0].grad if handed_on else None

    # What is beyond the scores of a batch is the estimator's own.

    def state(self) -> Mapping[str, NDArray[Any]]:
        """See `Estimator`."""
        return self._scorer.state()

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """See `Estimator`."""
        self._scorer.load_state(state)

    def keep_batches_apart(self) -> bool:
        """They go through the model together, in one process."""
        return False

    def addition(self) -> Mapping[str, NDArray[Any]]:
        """See `Estimator`; batches are not kept apart."""
        return {}

    def add(self, addition: Mapping[str, NDArray[Any]]) -> None:
        """See `Estimator`; batches are not kept apart."""

    def finish(self, contributions: NDArray[np.float64]) -> NDArray[np.float64]:
        """See `Estimator`."""
        return self._scorer.finish(contributions)

    def results(self) -> Mapping[str, NDArray[Any]]:
        """See `Estimator`."""
        return self._scorer.results()


def refuse_unstreamed_estimator(name: FormatName | str, streams: bool) -> None:
    """
    Raises:
        InputError: the estimator does not score block by block.
    """
    if not streams:
        raise InputError(
            "an estimator must score block by block where memory is bounded, and "
            f"{name} needs the whole model; leave --estimator or --max-memory out"
        )


def _refuse(scorer: SensitivityScorer, model: StreamedModel) -> None:
    refuse_unstreamed_estimator(scorer.name, scorer.goes_block_by_block)
    if scorer.draws != 1:
        raise InputError(
            f"labels must be drawn once where memory is bounded, and draws is {scorer.draws}; give "
            "draws 1, or leave the bound out"
        )
    refuse_outside_blocks(model)


def refuse_outside_blocks(model: StreamedModel) -> None:
    """
    Raises:
        InputError: a layer that is searched lies in no block.
    """
    inside = tuple(f"{path}." for path in model.map.blocks)
    outside = [slot for slot in model.map.slots.values() if not slot.module.startswith(inside)]
    if outside:
        raise InputError(
            "layers that are searched block by block must lie in one of the model's blocks, and "
            f"{outside[0].name} does not; leave it out with --exclude, or leave the bound on memory "
            "out"
        )


def _first_with_slots(model: StreamedModel) -> int:
    """The first block that is searched: backward ends there."""
    modules = [slot.module for slot in model.map.slots.values()]
    searched = (
        number
        for number, path in enumerate(model.map.blocks)
        if any(module.startswith(f"{path}.") for module in modules)
    )
    return next(searched, 0)


def _leaves(before: Any) -> list[Tensor]:
    """The tensors in what a block gave, hidden states first, made to take gradients."""
    parts = before if isinstance(before, tuple | list) else [before]
    return [
        part.requires_grad_(True)
        for part in parts
        if isinstance(part, Tensor) and part.is_floating_point()
    ]
