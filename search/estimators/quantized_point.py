"""Scores seen from a quantised model: how the divergence changes when one group leaves its format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.errors import InputError
from autoq.formats import FORMATS, NONE, FormatName
from autoq.kernels import scoring
from autoq.layers import LayerCalibration
from autoq.layers.products import linear
from autoq.layers.taps import MatrixCall
from autoq.models import Assignment, DecisionGroup, GroupName, WeightSlot, output_kind
from autoq.search._batch_loss import BatchLoss, check_loss
from autoq.search._branches import surplus_outputs, surplus_projections
from autoq.search._projections import QuantizedInputs, Rows
from autoq.search._scored_product import ScoredProduct, scoring_mode
from autoq.search.objectives import divergence_of
from autoq.search.sensitivity import SensitivityScorer


class QuantizedPoint(SensitivityScorer):
    """Expected change of KL(original || quantised) when a group leaves its format at a plan.

    At the original the gradient of the divergence is zero, and second-order estimates see each
    group alone. Here the model runs as a plan has it, the operating point. With h_t the gradient
    of the true divergence at a layer's output there, g_t that of the loss under labels drawn from
    the quantised model, and dy_t(f) the output's change when the group goes from its format to f,

        D(f) = sum over t of h_t . dy_t(f) + half the sum over t of (g_t . dy_t(f))^2

    per token: the first-order term has the interaction with everything else that the plan
    quantises. Gradients pass rounding unchanged ("straight through").

    Scores add up to a prediction, so they are made absolute: the divergence measured at the point
    is divided among the groups in proportion to what each would give back by staying as it was,
    max(-D(none), 0), and D(f) is added. So the prediction for the point is what was measured
    there, and differences between formats are those that were found. Cells whose mean is below 0
    are raised to 0.

    A batch costs a forward of the original, one of the quantised model, and two backwards.
    """

    name: ClassVar[str] = "quantized_point"

    def __init__(
        self,
        *args: Any,
        row_fraction: float = 1.0,
        draws: int | None = None,
        point: Assignment | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            point: a format, or "none", for every group; None takes each group's smallest.
        Raises:
            InputError: `draws` is not 1, or the point gives a group a format that it cannot take.
        """
        if draws not in (None, 1):
            raise InputError(f"{self.name} draws labels once, so draws must be 1, got {draws}")
        super().__init__(*args, row_fraction=row_fraction, draws=1, **options)
        self._point = self._checked(point) if point is not None else self._smallest()
        self._divergence = divergence_of(output_kind(self._model))
        self._first_order = False

    @property
    def _columns(self) -> tuple[FormatName, ...]:
        return (*self.formats, NONE)

    def _smallest(self) -> dict[GroupName, FormatName]:
        return {group.name: self._smallest_of(group) for group in self._map.groups}

    def _smallest_of(self, group: DecisionGroup) -> FormatName:
        def bits(name: FormatName) -> int:
            slots = [self._map.slots[slot] for slot in group.slots]
            return sum(
                FORMATS[name].storage_bits(s.out_features, s.in_features).effective_bits
                for s in slots
            )

        usable = [name for name in self.formats if self._can_take(group, name)]
        return min(usable, key=bits, default=NONE)

    def _can_take(self, group: DecisionGroup, name: FormatName) -> bool:
        return all((slot, name) in self._calibration for slot in group.slots)

    def _checked(self, point: Assignment) -> dict[GroupName, FormatName]:
        for group in self._map.groups:
            name = point.get(group.name, NONE)
            if name != NONE and not self._can_take(group, name):
                raise InputError(
                    f"the point must give {group.name} a format that it can take, got {name}"
                )
        return {group.name: point.get(group.name, NONE) for group in self._map.groups}

    def score_batch(self, index: int, loss: Callable[[], BatchLoss]) -> NDArray[np.float64]:
        """Changes of the divergence, and the divergence itself, of one batch.

        Returns:
            float64 [sequences, groups, formats + 2]: the last columns are the change to "none",
            and the sequence's divergence at the point. `finish` makes scores of them.
        Raises:
            InputError: the loss is the user's own, and shows no output.
            ModelError: as for other estimators.
        """
        with torch.no_grad():
            original = self._output(loss())
        self._reach.begin()
        with scoring_mode(self._model, self._map, self._scored_product, self._activations):
            batch = loss()
            check_loss(batch)
            divergence = self._divergence(original, self._output(batch)).flatten(1).mean(dim=1)
            tokens = batch.tokens_per_sequence
            gradient = BatchLoss(divergence.sum() * tokens, batch.sequences, tokens)
            self._first_order = True
            change = self._draw(index, 0, gradient, keep_graph=True)
            self._first_order = False
            change += self._draw(index, 0, batch, keep_graph=False)
        measured = divergence.detach().double().numpy(force=True)
        column = np.broadcast_to(measured[:, None, None], (*change.shape[:2], 1))
        return np.concatenate([change, column], axis=2)

    def _output(self, batch: BatchLoss) -> Tensor:
        if batch.output is None:
            raise InputError(f"{self.name} compares outputs, and a loss of your own shows none")
        return batch.output

    def _scored_product(self, call: MatrixCall, inputs: Tensor) -> Tensor:
        if self._current(call.slot) == NONE:
            return super()._scored_product(call, inputs)
        self._reach.ran(call.slot.name, inputs.shape[0])
        if not inputs.requires_grad:
            inputs = inputs.detach().requires_grad_(True)
        entry = self._calibration[call.slot.name, self._current(call.slot)]
        at_point = _ProductAtPoint(call, self._weight_at_point, self._inputs_at_point, entry)
        result: Tensor = ScoredProduct.apply(  # type: ignore[no-untyped-call]
            inputs, at_point, self._observe, self._dtype
        )
        return result

    def _current(self, slot: WeightSlot) -> FormatName:
        return self._point[self._group_of[slot.name]]

    def _weight_at_point(self, call: MatrixCall) -> Tensor:
        error = self._errors.get(call.slot, self._current(call.slot))
        return call.weight + error.to(call.weight.dtype)

    def _inputs_at_point(self, slot: WeightSlot, inputs: Tensor) -> Tensor:
        name = self._current(slot)
        quantized = QuantizedInputs(slot.name, inputs, self._container)
        return quantized.get(name, self._calibration[slot.name, name]).to(inputs.dtype)

    def _project(
        self,
        call: MatrixCall,
        accumulator: Tensor,
        positions: Rows,
        inputs: Tensor,
        output_gradient: Tensor,
        input_gradient: Tensor,
    ) -> None:
        quantized = self._quantized_inputs(call.slot, inputs)
        current = self._current(call.slot)
        from_inputs, from_error = self._seen(call.slot, current, quantized)
        for column, name in enumerate(self._columns):
            if name == current:
                continue
            if name != NONE and (call.slot.name, name) not in self._calibration:
                accumulator[column] = torch.nan
                continue
            to_inputs, to_error = self._seen(call.slot, name, quantized)
            change = scoring.project(
                output_gradient, to_error - from_error, to_inputs, from_inputs, input_gradient
            )
            change -= self._surplus(call.slot, name, quantized, output_gradient)
            change += self._surplus(call.slot, current, quantized, output_gradient)
            accumulator[column, positions] += change

    def _surplus(
        self,
        slot: WeightSlot,
        name: FormatName,
        inputs: QuantizedInputs,
        output_gradient: Tensor,
    ) -> Tensor | float:
        if name == NONE:
            return 0.0
        calibration = self._calibration[slot.name, name]
        changed = inputs.get(name, calibration)
        found = surplus_projections([calibration], output_gradient, changed, inputs.exact)
        return 0.0 if found is None else found

    def _seen(
        self, slot: WeightSlot, name: FormatName, inputs: QuantizedInputs
    ) -> tuple[Tensor, Tensor]:
        """What a format makes of a slot's inputs, and its weight's error."""
        if name == NONE:
            zero = torch.zeros((), dtype=self._dtype, device=inputs.exact.device)
            return inputs.exact, zero.expand(slot.out_features, slot.in_features)
        calibration = self._calibration[slot.name, name]
        return inputs.get(name, calibration), self._errors.get(slot, name)

    def _per_token(self, sums: Tensor) -> Tensor:
        if self._first_order:
            return sums.mean(dim=2).mul_(2.0)  # scores are halved afterwards
        return sums.square_().mean(dim=2)

    def finish(self, contributions: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores that add up to a prediction; see the class."""
        change, to_none = contributions[..., :-2], contributions[..., -2]
        measured = contributions[:, 0, -1]
        returned = np.clip(-to_none.mean(axis=0), 0.0, None)
        total = returned.sum()
        share = returned / total if total > 0 else np.full(len(returned), 1 / len(returned))
        scores = change + (measured[:, None] * share)[..., None]
        return np.asarray(scores - np.minimum(scores.mean(axis=0), 0.0))


class _ProductAtPoint:
    """A product as the operating point computes it, in the place of a `MatrixCall`."""

    def __init__(
        self,
        call: MatrixCall,
        weight_of: Callable[[MatrixCall], Tensor],
        quantize: Callable[[WeightSlot, Tensor], Tensor],
        calibration: LayerCalibration,
    ) -> None:
        self.slot = call.slot
        self.token_rows = call.token_rows
        self.token_count = call.token_count
        self._call = call
        self._weight_of = weight_of
        self._quantize = quantize
        self._calibration = calibration

    @property
    def weight(self) -> Tensor:
        """Made when it is used: the graph holds all products, and must not hold a second model."""
        return self._weight_of(self._call)

    def compute_detached(self, inputs: Tensor) -> Tensor:
        """See `MatrixCall.compute_detached`."""
        rows = inputs.flatten(0, -2)
        changed = self._quantize(self.slot, rows)
        output = linear(changed.reshape(inputs.shape), self.weight, self._call.bias)
        surplus = surplus_outputs(self._calibration, changed, rows)
        return output if surplus is None else output - surplus.view_as(output).to(output.dtype)
