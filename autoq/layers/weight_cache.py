"""Quantised weights that were computed before, within a bound on memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from torch import Tensor

from autoq.formats import FormatName
from autoq.models import SlotName

Key: TypeAlias = tuple[SlotName, FormatName]


class WeightCache:
    """Dequantised weights by slot and format, in the model's own dtype and on its device.

    What was used longest ago goes first when there is no room.
    """

    def __init__(self, memory_bytes: int) -> None:
        """
        Args:
            memory_bytes: bound on all weights together; with 0 nothing is kept.
        """
        self._memory_bytes = memory_bytes
        self._weights: OrderedDict[Key, Tensor] = OrderedDict()
        self.bytes_held = 0

    def get(self, slot: SlotName, fmt: FormatName) -> Tensor | None:
        """The slot's weights in the format, [out_features, in_features]; not to be written to."""
        found = self._weights.get((slot, fmt))
        if found is not None:
            self._weights.move_to_end((slot, fmt))
        return found

    def put(self, slot: SlotName, fmt: FormatName, weight: Tensor) -> None:
        """Keep a copy of the weights, if there is room for them at all."""
        size = weight.numel() * weight.element_size()
        if size > self._memory_bytes or (slot, fmt) in self._weights:
            return
        while self.bytes_held + size > self._memory_bytes:
            _, oldest = self._weights.popitem(last=False)
            self.bytes_held -= oldest.numel() * oldest.element_size()
        self._weights[slot, fmt] = weight.clone()
        self.bytes_held += size
