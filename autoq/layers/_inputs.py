"""Quantising the input that several layers share once.

The queries, keys and values of an attention, and the two halves of a gated MLP, read one tensor
under one scale: what the first of them quantised serves the others, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from autoq.formats import FORMATS, FormatName, QuantFormat
from autoq.layers._types import Container, LayerCalibration
from autoq.layers.quantize import branch_product, fake_quantize_input
from autoq.layers.taps import MatrixCall
from autoq.models import SlotKind, SlotName, WeightSlot


class SimulatedProducts:
    """A `MatrixHandler`: products with the inputs that the slots' formats leave."""

    def __init__(
        self,
        slots: Mapping[SlotName, WeightSlot],
        formats: Mapping[SlotName, FormatName],
        calibration: Mapping[tuple[SlotName, FormatName], LayerCalibration],
        container: Container,
    ) -> None:
        """
        Args:
            formats: of the slots that products are asked of; not `none`.
        """
        self._container = container
        self._codings = {
            name: (FORMATS[fmt], calibration[name, fmt]) for name, fmt in formats.items()
        }
        self._kinds = _kinds([slots[name] for name in formats], self._codings, container)
        self._readers = Counter(self._kinds.values())
        self._held: _Held | None = None

    def __call__(self, call: MatrixCall, inputs: Tensor) -> Tensor:
        """The product with what is left of the input, and that of a branch of low rank."""
        product = call.compute(self._quantized(call.slot.name, inputs))
        _, calibration = self._codings[call.slot.name]
        branch = branch_product(inputs, calibration)
        return product if branch is None else product + branch

    def _quantized(self, name: SlotName, inputs: Tensor) -> Tensor:
        kind, held = self._kinds.get(name), self._held
        if held is None or not held.serves(inputs, kind):
            self._held = None  # first: two inputs at once would cost memory
            fmt, calibration = self._codings[name]
            values = fake_quantize_input(inputs, fmt, calibration, container=self._container)
            # Tensors of inference mode do not tell whether they were written to.
            if kind is None or self._readers[kind] < 2 or inputs.is_inference():
                return values
            held = _Held(inputs, inputs._version, kind, values, self._readers[kind])
        held.readers_left -= 1
        self._held = held if held.readers_left else None
        return held.values


@dataclass(slots=True)
class _Held:
    """An input, and what was made of it, until its last reader has come."""

    inputs: Tensor
    version: int  # of what is in the tensor
    kind: int
    values: Tensor
    readers_left: int

    def serves(self, inputs: Tensor, kind: int | None) -> bool:
        return kind == self.kind and inputs is self.inputs and inputs._version == self.version


def _kinds(
    slots: list[WeightSlot],
    codings: Mapping[SlotName, tuple[QuantFormat, LayerCalibration]],
    container: Container,
) -> dict[SlotName, int]:
    """A number for slots beside others whose inputs are quantised alike; equal for those.

    Experts are left out: each reads tokens of its own.
    """
    numbers = count()
    found: dict[SlotName, int] = {}
    firsts: dict[tuple[object, ...], list[tuple[Tensor | None, int]]] = {}
    for slot in slots:
        if slot.kind is SlotKind.EXPERT:
            continue
        fmt, calibration = codings[slot.name]
        parent = slot.module.rpartition(".")[0]
        alike = firsts.setdefault(
            (parent, fmt.activation_in(container), calibration.input_amax), []
        )
        scale = calibration.pre_quant_scale
        number = next((number for other, number in alike if _same(other, scale)), None)
        if number is None:
            number = next(numbers)
            alike.append((scale, number))
        found[slot.name] = number
    return found


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return first is second or torch.equal(first, second)
