"""How much the loss grows when one decision group is quantised: all formats, one backward pass.

For a layer y = x W^T whose output has the loss gradient g, quantising its weight and its input
changes the output of token t by dy_t. The score of a group is half the sum over tokens of
(g_t . dy_t)^2, members of the group summed before squaring. With labels drawn from the model
itself g g^T averages to the Fisher matrix, and the score is the second-order estimate of the
KL divergence to the original, correlations between tokens left out.

The projection needs no quantised forward: with x' = x + dx and W' = W + dW

    g . dy = (g dW) . x' + (g W) . dx

and g W is what backward computes anyway. So a further format costs one matrix product on the
tokens that are sampled, and the differences are small numbers from the start instead of the
difference of two large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.formats import NONE, FormatName
from autoq.layers.quantize import Container
from autoq.layers.taps import MatrixCall, MatrixHandler, tapped
from autoq.models import ModelMap, SlotKind, SlotName, WeightSlot
from autoq.models.checkpointing import checkpointed_blocks
from autoq.search._projections import (
    Calibrations,
    Projections,
    QuantizedInputs,
    Rows,
    WeightErrors,
    projection_dtype,
)

ESTIMATOR = "token_projection"
"""Name of the estimator, stored with its results."""

ROW_FRACTION = 1.0
"""Share of the tokens whose projections are computed; see docs/architecture.md for its effect."""


@dataclass(frozen=True, slots=True)
class BatchLoss:
    """The loss of one batch, and over how much it is summed."""

    total: Tensor  # scalar, summed over the tokens of the batch
    sequences: int
    tokens_per_sequence: int  # positions with a loss term


class SensitivityScorer:
    """Scores every group in every format, batch by batch."""

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
    ) -> None:
        """
        Args:
            formats: columns of the result; "none" is dropped.
            calibration: for every slot and format that the slot can take.
            scale_dtype: the dtype in which the checkpoint stores INT4 group scales.
            row_fraction: share of the tokens whose projections are computed, in (0, 1].
            dtype: in which gradients meet errors of weights; None takes `projection_dtype`.
        """
        self.formats = tuple(name for name in formats if name != NONE)
        self._model = model
        self._map = model_map
        self._calibration = calibration
        self._container = container
        self._dtype = dtype or projection_dtype(model)
        self._errors = WeightErrors(model, calibration, container, scale_dtype, self._dtype)
        self._row_fraction = row_fraction
        self._seed = seed
        self._group_of = model_map.group_of()
        self._leaders = _fusion_leaders(model_map)
        self._last_inputs: QuantizedInputs | None = None

    def score_batch(self, index: int, loss: Callable[[], BatchLoss]) -> NDArray[np.float64]:
        """Contributions of one batch.

        Args:
            index: number of the batch; seeds the choice of tokens.
            loss: runs the model and returns the summed loss, with its graph.
        Returns:
            float64 [sequences, groups, formats]; NaN where a group cannot take a format.
        Raises:
            ModelError: the loss or a gradient is not finite, no gradient reaches a layer, or a
                layer's input rows are not the tokens of the sequences.
        """
        projections = Projections(self._row_fraction, self._seed * 1_000_003 + index)

        def handler(call: MatrixCall, inputs: Tensor) -> Tensor:
            if not inputs.requires_grad:
                # Parameters are frozen: what has no layer before it starts a graph of its own.
                inputs = inputs.detach().requires_grad_(True)
            result: Tensor = _ScoredProduct.apply(  # type: ignore[no-untyped-call]
                inputs, call, self._observer(call, projections)
            )
            return result

        with scoring_mode(self._model, self._map, handler):
            batch = loss()
            if not bool(torch.isfinite(batch.total)):
                raise ModelError(
                    "the loss is NaN or Inf on calibration data; run the model in a wider dtype "
                    "(--dtype float32) or mend its weights"
                )
            projections.sequences = batch.sequences
            batch.total.backward()  # type: ignore[no-untyped-call]
        self._last_inputs = None
        self._check_observed(projections)
        return self._contributions(projections, batch)

    def _observer(self, call: MatrixCall, projections: Projections) -> _Observer:
        def observe(inputs: Tensor, output_gradient: Tensor, input_gradient: Tensor) -> None:
            total_rows, rows, positions = projections.sampled(call, inputs)
            self._project(
                call,
                projections.accumulator(
                    self._group_of[call.slot.name], total_rows, len(self.formats), inputs.device
                ),
                positions,
                inputs[rows],
                output_gradient[rows],
                input_gradient[rows],
            )
            projections.observed.add(call.slot.name)

        return observe

    def _project(
        self,
        call: MatrixCall,
        accumulator: Tensor,
        positions: Rows,
        inputs: Tensor,
        output_gradient: Tensor,
        input_gradient: Tensor,
    ) -> None:
        """Add g . dy of the sampled rows to the group's accumulator [formats, sampled tokens]."""
        quantized_inputs = self._quantized_inputs(call.slot, inputs)
        output_gradient = output_gradient.to(self._dtype)
        for column, name in enumerate(self.formats):
            calibration = self._calibration.get((call.slot.name, name))
            if calibration is None:
                accumulator[column] = torch.nan
                continue
            # An expert's rows are different tokens, so no position comes twice.
            accumulator[column, positions] += self._errors.project(
                call.slot,
                name,
                output_gradient,
                quantized_inputs.get(name, calibration),
                quantized_inputs.exact,
                input_gradient,
            )

    def _quantized_inputs(self, slot: WeightSlot, inputs: Tensor) -> QuantizedInputs:
        """Quantised inputs are shared by the members of a fusion set, which come in a row."""
        last = self._last_inputs
        leader = self._leaders.get(slot.name, slot.name)
        if last is None or last.leader != leader or not torch.equal(last.inputs, inputs):
            last = QuantizedInputs(leader, inputs, self._container)
            self._last_inputs = last
        return last

    def _check_observed(self, projections: Projections) -> None:
        for slot in self._map.slots.values():
            # An expert that no token was routed to has no gradient, rightly.
            if slot.name not in projections.observed and slot.kind is not SlotKind.EXPERT:
                raise ModelError(
                    f"no gradient reaches {slot.name}, so its sensitivity is unknown; exclude it "
                    f"with --exclude '{slot.name}'"
                )

    def _contributions(self, projections: Projections, batch: BatchLoss) -> NDArray[np.float64]:
        result = np.zeros((batch.sequences, len(self._map.groups), len(self.formats)))
        index = {group.name: position for position, group in enumerate(self._map.groups)}
        for (group, total_rows), accumulator in projections.sums.items():
            squares = accumulator.double().square_().reshape(len(self.formats), batch.sequences, -1)
            rows_per_sequence = total_rows / batch.sequences
            per_token = squares.mean(dim=2) * (rows_per_sequence / batch.tokens_per_sequence)
            result[:, index[group]] += 0.5 * per_token.t().numpy(force=True)
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


_Observer: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]


class _ScoredProduct(torch.autograd.Function):
    """inputs @ weight.T + bias, whose backward also shows inputs and gradients to an observer.

    The inputs travel through the saved tensors, so that activation checkpointing frees and
    recomputes them like any other.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, call: MatrixCall, observe: _Observer) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.call = call
        ctx.observe = observe
        return call.compute(inputs)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        input_gradient = output_gradient @ ctx.call.weight
        ctx.observe(
            inputs.flatten(0, -2), output_gradient.flatten(0, -2), input_gradient.flatten(0, -2)
        )
        return input_gradient, None, None


@contextmanager
def scoring_mode(model: nn.Module, model_map: ModelMap, handler: MatrixHandler) -> Iterator[None]:
    """Gradients to activations only, blocks checkpointed, every slot's product in `handler`."""
    with ExitStack() as stack:
        stack.enter_context(_frozen_parameters(model))
        stack.enter_context(tapped(model, model_map.slots.values(), handler))
        stack.enter_context(checkpointed_blocks(model, model_map.blocks))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


def _fusion_leaders(model_map: ModelMap) -> dict[SlotName, SlotName]:
    """Member of a fusion set -> the set's first member."""
    return {
        name: names[0]
        for group in model_map.groups
        for names in group.fusion_sets
        for name in names
    }
