"""The pass that estimators with gradients share: one forward, one backward, all formats at once.

Every product of an input with a slot's weight is replaced by one that shows its input, the
gradient at its output and the gradient at its input to the estimator while backward runs. What an
estimator makes of them, row by row and format by format, and how rows become a score, is its own;
see `autoq.search.estimators`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoq.errors import InputError, ModelError
from autoq.formats import NONE, FormatName
from autoq.layers.quantize import Container
from autoq.layers.taps import MatrixCall
from autoq.models import ModelMap, SlotName, WeightSlot
from autoq.models.checkpointing import ActivationBudget
from autoq.search._batch_loss import (
    BatchLoss,
    LabelSource,
    NoGradientError,
    check_loss,
    total_of_draw,
)
from autoq.search._projections import (
    Calibrations,
    Projections,
    QuantizedInputs,
    Rows,
    WeightErrors,
    projection_dtype,
    same_tensor,
)
from autoq.search._reach import GradientReach
from autoq.search._scored_product import ScoredProduct, scoring_mode, shown_products

__all__ = [
    "ROW_FRACTION",
    "SCORES_VERSION",
    "BatchLoss",
    "NoGradientError",
    "SensitivityScorer",
]

ROW_FRACTION = 1.0
"""Share of the tokens that are looked at, by lot; `_token_sampling` then takes those that matter."""

KEPT_ACTIVATION_BYTES = 64 << 20
"""Memory in which activations wait for backward; blocks beyond it are computed again there."""

SCORES_VERSION = 3
"""Counts changes of the bits of scores; studies with others are not continued."""


@dataclass(slots=True)
class StartedBatch:
    """A batch between the first block of its forward and the last of its backward."""

    projections: Projections
    reach: GradientReach
    loss: BatchLoss | None = None  # without graph and output, once its backward has begun


class SensitivityScorer(ABC):
    """Scores every group in every format, batch by batch, from gradients.

    Subclasses say what one row of a product contributes, and how rows become scores.
    """

    name: ClassVar[str]
    labels: ClassVar[LabelSource] = "model"
    unit: str = "nats_per_token"  # "relative" where scores rank, and are no divergence
    needs_backward: ClassVar[bool] = True
    default_draws: ClassVar[int] = 1
    sequences_wanted: ClassVar[int | None] = None  # None: all that there are
    goes_block_by_block: ClassVar[bool] = False  # see `start`

    def __init__(
        self,
        model: nn.Module,
        model_map: ModelMap,
        formats: Sequence[FormatName],
        calibration: Calibrations,
        *,
        container: Container,
        scale_dtype: torch.dtype,
        row_fraction: float = ROW_FRACTION,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        draws: int | None = None,
    ) -> None:
        """
        Args:
            formats: columns of the result; "none" is dropped.
            calibration: for every slot and format that the slot can take.
            scale_dtype: the dtype in which the checkpoint stores INT4 group scales.
            row_fraction: share of the tokens whose projections are computed, in (0, 1].
            dtype: in which gradients meet errors of weights; None takes `projection_dtype`.
            draws: of labels for every sequence, a backward each; None takes `default_draws`.
        Raises:
            InputError: `draws` is below 1, or labels come from the data and are not drawn.
        """
        self.formats = tuple(name for name in formats if name != NONE)
        self._model = model
        self._map = model_map
        self._calibration = calibration
        self._container = container
        self._dtype = dtype or projection_dtype(model)
        self._errors = WeightErrors(model, calibration, container, scale_dtype, self._dtype)
        self._errors.reserve(model_map.slots.values(), self.formats)
        self._row_fraction = row_fraction
        self._seed = seed
        self._group_of = model_map.group_of()
        self._group_index = {group.name: row for row, group in enumerate(model_map.groups)}
        self._leaders = fusion_leaders(model_map)
        self._last_inputs: QuantizedInputs | None = None
        self.draws = self.default_draws if draws is None else draws
        self._check_draws()
        self._projections = Projections(row_fraction, seed)
        self._reach = GradientReach(model_map)
        self._activations = ActivationBudget(KEPT_ACTIVATION_BYTES)

    @property
    def _columns(self) -> tuple[FormatName, ...]:
        """What rows are projected for; an estimator may need more than the formats."""
        return self.formats

    def score_batch(self, index: int, loss: Callable[[], BatchLoss]) -> NDArray[np.float64]:
        """Contributions of one batch.

        Args:
            index: number of the batch; seeds the choice of tokens.
            loss: runs the model and returns the summed loss, with its graph.
        Returns:
            float64 [sequences, groups, formats]; NaN where a group cannot take a format.
        Raises:
            NoGradientError: no gradient reaches a layer.
            ModelError: the loss or a gradient is not finite, the loss is constant, or a layer's
                input rows are not the tokens of the sequences.
        """
        self._reach.begin()
        with scoring_mode(self._model, self._map, self._scored_product, self._activations):
            batch = loss()
            check_loss(batch)
            result = sum(
                self._draw(index, draw, batch, keep_graph=draw + 1 < self.draws)
                for draw in range(self.draws)
            )
        return np.asarray(result / self.draws)

    def _draw(
        self, index: int, draw: int, batch: BatchLoss, *, keep_graph: bool
    ) -> NDArray[np.float64]:
        """Contributions under one draw of labels."""
        self._projections = Projections(self._row_fraction, self._batch_seed(index))
        self._projections.sequences = batch.sequences
        self._reach.backward(total_of_draw(batch, draw), keep_graph=keep_graph)
        self._end_backward()
        return self._contributions(self._projections, batch)

    # Scoring batches side by side, a block at a time, as `autoq.search.streamed` does it.

    def start(self, index: int) -> StartedBatch:
        """Begin with a batch; its forward and backward are somebody else's."""
        reach = GradientReach(self._map)
        reach.begin()
        return StartedBatch(Projections(self._row_fraction, self._batch_seed(index)), reach)

    @contextmanager
    def showing_products(self) -> Iterator[None]:
        """While it lasts every slot's product is shown, in forward and backward."""
        with shown_products(self._model, self._map, self._scored_product):
            yield

    @contextmanager
    def working_on(self, batch: StartedBatch) -> Iterator[None]:
        """What runs while this lasts is a part of the batch's forward or backward."""
        self._projections, self._reach = batch.projections, batch.reach
        yield
        self._end_backward()

    def keep_errors(self, most_bytes: int) -> None:
        """Forget the errors of weights that are kept, and keep no more than so much."""
        self._errors.keep(most_bytes)

    def contributions(self, batch: StartedBatch) -> NDArray[np.float64]:
        """What `score_batch` gives, of a batch whose backward is done; in the batches' order.

        Raises:
            NoGradientError, ModelError: as `score_batch`.
        """
        assert batch.loss is not None  # its backward is done
        batch.reach.check()
        return self._contributions(batch.projections, batch.loss)

    def _batch_seed(self, index: int) -> int:
        return self._seed * 1_000_003 + index

    def _end_backward(self) -> None:
        """Backward has shown all products."""
        self._last_inputs = None

    def _scored_product(self, call: MatrixCall, inputs: Tensor) -> Tensor:
        if not self._activations.measures:
            self._reach.ran(call.slot.name, inputs.shape[0])
        if not inputs.requires_grad:
            # Parameters are frozen: what has no layer before it starts a graph of its own.
            inputs = inputs.detach().requires_grad_(True)
        result: Tensor = ScoredProduct.apply(  # type: ignore[no-untyped-call]
            inputs, call, self._observe, self._dtype
        )
        return result

    def _observe(
        self, call: MatrixCall, inputs: Tensor, output_gradient: Tensor, input_gradient: Tensor
    ) -> None:
        with self._reach.observing(call.slot.name, output_gradient):
            self._observe_rows(call, inputs, output_gradient, input_gradient)

    def _observe_rows(
        self, call: MatrixCall, inputs: Tensor, output_gradient: Tensor, input_gradient: Tensor
    ) -> None:
        projections = self._projections
        total_rows, rows, positions = projections.sampled(call, inputs)
        self._project(
            call,
            projections.accumulator(
                self._group_of[call.slot.name], total_rows, len(self._columns), inputs.device
            ),
            positions,
            inputs[rows],
            output_gradient[rows],
            input_gradient[rows],
        )

    @abstractmethod
    def _project(
        self,
        call: MatrixCall,
        accumulator: Tensor,
        positions: Rows,
        inputs: Tensor,
        output_gradient: Tensor,
        input_gradient: Tensor,
    ) -> None:
        """Add what the sampled rows contribute to the group's sums; later at `_end_backward`.

        Args:
            accumulator: the sums, float32 [columns, sampled tokens].
            positions: of the rows among the sampled tokens.
            inputs: [rows, in_features].
            output_gradient: in the dtype of the errors of weights, [rows, out_features].
            input_gradient: that times the weight, [rows, in_features].
        """

    @abstractmethod
    def _per_token(self, sums: Tensor) -> Tensor:
        """From the sums over a group to its mean score per token.

        Args:
            sums: float64 [formats, sequences, sampled tokens]; may be overwritten.
        Returns:
            float64 [formats, sequences].
        """

    def _quantized_inputs(self, slot: WeightSlot, inputs: Tensor) -> QuantizedInputs:
        """Quantised inputs are shared by the members of a fusion set, which come in a row."""
        last = self._last_inputs
        leader = self._leaders.get(slot.name, slot.name)
        if last is None or last.leader != leader or not same_tensor(last.inputs, inputs):
            last = QuantizedInputs(leader, inputs, self._container)
            self._last_inputs = last
        return last

    def _contributions(self, projections: Projections, batch: BatchLoss) -> NDArray[np.float64]:
        result = np.zeros((batch.sequences, len(self._map.groups), len(self._columns)))
        for (group, total_rows), accumulator in projections.sums.items():
            rows_per_sequence = total_rows / batch.sequences
            sums = accumulator.double().reshape(len(self._columns), batch.sequences, -1)
            per_token = self._per_token(sums) * (rows_per_sequence / batch.tokens_per_sequence)
            result[:, self._group_index[group]] += 0.5 * per_token.t().numpy(force=True)
        self._check_finite(result)
        return result

    def _check_finite(self, contributions: NDArray[np.float64]) -> None:
        for position, group in enumerate(self._map.groups):
            for column, name in enumerate(self.formats):
                calibrated = (group.slots[0], name) in self._calibration
                if calibrated and not np.isfinite(contributions[:, position, column]).all():
                    raise ModelError(
                        f"a gradient at {group.name} is NaN or Inf on calibration data; run the "
                        "model in a wider dtype (--dtype float32)"
                    )

    def _check_draws(self) -> None:
        if self.draws < 1:
            raise InputError(f"draws must be >= 1, got {self.draws}")
        if self.draws > 1 and self.labels == "data":
            raise InputError(
                f"{self.name} takes its labels from the data, so draws must be 1, got {self.draws}"
            )

    # State and results beyond the scores; most estimators have none.

    def state(self) -> Mapping[str, NDArray[Any]]:
        """What was summed up over the batches so far, for `load_state` after an interruption."""
        return {}

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        del state  # nothing was summed up

    def keep_batches_apart(self) -> bool:
        """See `Estimator`; nothing is summed up."""
        return True

    def addition(self) -> Mapping[str, NDArray[Any]]:
        """What the last batch would have added to the state."""
        return {}

    def add(self, addition: Mapping[str, NDArray[Any]]) -> None:
        """Add what `addition` gave."""
        del addition  # nothing is summed up

    def finish(self, contributions: NDArray[np.float64]) -> NDArray[np.float64]:
        """The final contributions, [sequences, groups, formats].

        Args:
            contributions: what `score_batch` gave, of all batches in order.
        """
        return contributions

    def results(self) -> Mapping[str, NDArray[Any]]:
        """Arrays to store beside the scores, once all batches are scored."""
        return {}


def fusion_leaders(model_map: ModelMap) -> dict[SlotName, SlotName]:
    """Member of a fusion set -> the set's first member."""
    return {
        name: names[0]
        for group in model_map.groups
        for names in group.fusion_sets
        for name in names
    }
