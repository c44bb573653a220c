"""Products with one and the same input: gathered as backward shows them, projected as one.

The members of a fusion set (q, k and v; gate and up) read the same input, and their projections are
added. So their gradients are put side by side and their errors one upon the other: one matrix
product, one pass over the inputs in each format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.formats import FORMATS, FormatName
from autoq.layers import LayerCalibration
from autoq.layers.quantize import Container
from autoq.models import ModelMap, SlotName, WeightSlot
from autoq.search._projections import Calibrations, Rows, same_tensor


class SharedInput:
    """The products of one input that backward has shown so far, one of a slot at most."""

    def __init__(
        self, members: Sequence[SlotName], inputs: Tensor, accumulator: Tensor, positions: Rows
    ) -> None:
        """
        Args:
            members: the slots whose products may come.
            inputs: the rows that are projected, [rows, in_features].
            accumulator: float32 [formats, sampled tokens], to add the projections to.
            positions: of the rows among the sampled tokens.
        """
        self.inputs = inputs
        self.accumulator = accumulator
        self.positions = positions
        self._members = members
        self._slots: dict[SlotName, WeightSlot] = {}
        self._output_gradients: dict[SlotName, Tensor] = {}
        self._input_gradient: Tensor | None = None

    def takes(self, slot: WeightSlot, inputs: Tensor) -> bool:
        """Whether the slot's product belongs to these, and is not there yet."""
        awaited = slot.name in self._members and slot.name not in self._slots
        return awaited and same_tensor(self.inputs, inputs)

    def add(self, slot: WeightSlot, output_gradient: Tensor, input_gradient: Tensor) -> None:
        """Add a product; gradients are [rows, out_features] and [rows, in_features]."""
        self._slots[slot.name] = slot
        self._output_gradients[slot.name] = output_gradient
        # In float32, as the sum over the members would be otherwise.
        so_far, gradient = self._input_gradient, input_gradient.float()
        self._input_gradient = gradient if so_far is None else so_far + gradient

    @property
    def is_complete(self) -> bool:
        """Whether all products are there."""
        return len(self._slots) == len(self._members)

    @property
    def slots(self) -> tuple[WeightSlot, ...]:
        """Whose products are there, in the order of the fusion set."""
        return tuple(self._slots[name] for name in self._members if name in self._slots)

    @property
    def has_all_tokens(self) -> bool:
        """Whether the rows are all sampled tokens, in their order."""
        return isinstance(self.positions, slice)

    def output_gradient(self) -> Tensor:
        """The gradients at the outputs of `slots` side by side."""
        gradients = [self._output_gradients[slot.name] for slot in self.slots]
        return gradients[0] if len(gradients) == 1 else torch.cat(gradients, dim=1)

    def input_gradient(self) -> Tensor:
        """The gradient at the input by way of `slots`, float32.

        Raises:
            InputError: there are none.
        """
        if self._input_gradient is None:
            raise InputError("a shared input must have a product, got none; add one first")
        return self._input_gradient


@dataclass(frozen=True, slots=True)
class ProjectedRows:
    """The rows of an input whose errors are projected on gradients."""

    inputs: Tensor  # [rows, in_features]
    output_gradient: Tensor  # [rows, sum of out_features]
    input_gradient: Tensor  # float32 [rows, in_features]
    positions: Rows  # among the sampled tokens
    weights: Tensor | None = None  # float32 [rows], of projections; None: all 1

    @classmethod
    def all_of(cls, shared: SharedInput) -> ProjectedRows:
        """Every row, each once."""
        gradients = shared.output_gradient(), shared.input_gradient()
        return cls(shared.inputs, *gradients, shared.positions)

    def taken(self, rows: Tensor, weights: Tensor) -> ProjectedRows:
        """Some of all tokens.

        Args:
            rows: int64, ascending.
            weights: of their projections, float32.
        """
        # index_select is five times as fast as indexing with brackets, on CPUs.
        return ProjectedRows(
            self.inputs.index_select(0, rows),
            self.output_gradient.index_select(0, rows),
            self.input_gradient.index_select(0, rows),
            rows,
            weights,
        )

    def weighted(self, projections: Tensor) -> Tensor:
        """What projections [rows] add to the sums of their tokens."""
        return projections if self.weights is None else projections * self.weights


def shared_by(model_map: ModelMap, most_weights: int) -> dict[SlotName, tuple[SlotName, ...]]:
    """Member of a fusion set -> the set, where its matrices are small enough to be one.

    Args:
        most_weights: in all matrices of a set together.
    """
    return {
        name: names
        for group in model_map.groups
        for names in group.fusion_sets
        if sum(model_map.slots[name].weights for name in names) <= most_weights
        for name in names
    }


def formats_with_equal_inputs(
    slot: SlotName,
    formats: Iterable[FormatName],
    calibration: Calibrations,
    container: Container,
) -> list[list[FormatName]]:
    """The formats that a slot can take, together with those that quantise its input alike."""
    found: list[list[FormatName]] = []
    for name in formats:
        if (slot, name) not in calibration:
            continue
        for names in found:
            known = names[0], calibration[slot, names[0]]
            if _quantises_inputs_alike(known, (name, calibration[slot, name]), container):
                names.append(name)
                break
        else:
            found.append([name])
    return found


def _quantises_inputs_alike(
    first: tuple[FormatName, LayerCalibration],
    second: tuple[FormatName, LayerCalibration],
    container: Container,
) -> bool:
    (name, mine), (other, theirs) = first, second
    return (
        FORMATS[name].activation_in(container) == FORMATS[other].activation_in(container)
        and mine.input_amax == theirs.input_amax
        and _equal(mine.pre_quant_scale, theirs.pre_quant_scale)
    )


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)
