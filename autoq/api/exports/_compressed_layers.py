"""Which layers `compress` quantises, and why others stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from autoq.api.exports.exporting import inexpressible
from autoq.errors import InputError
from autoq.formats import FORMATS, NONE, Container, FormatName, QuantFormat
from autoq.models import GroupName, ModelMap, SlotName


@dataclass(frozen=True, slots=True)
class ChosenLayers:
    """Which layers take the format, and why others do not."""

    slot_formats: dict[SlotName, FormatName]
    left: dict[GroupName, str]


def chosen_layers(
    model: nn.Module, model_map: ModelMap, fmt: QuantFormat, container: Container
) -> ChosenLayers:
    """Every layer that can take the format in that container.

    Raises:
        InputError: no layer can take the format.
    """
    unusable = inexpressible(model, model_map, [fmt.name], container, together=True)
    left = {group: reason for (group, _), reason in unusable.items()}
    chosen = [group for group in model_map.groups if group.name not in left]
    if not chosen:
        why = next(iter(left.values()), "the model has none that can be quantised")
        raise InputError(f"some layer must be able to take {fmt.name}, and none is: {why}")
    formats = {slot: fmt.name for group in chosen for slot in group.slots}
    return ChosenLayers({slot: formats.get(slot, NONE) for slot in model_map.slots}, left)


def asked_in_vain(model_map: ModelMap, include: Sequence[str]) -> dict[str, str]:
    """Layers that are left out whatever is included, such as tied heads, if they were asked for."""
    return {
        str(slot.name): slot.reason
        for slot in model_map.excluded
        if any(fnmatchcase(slot.name, pattern) for pattern in include)
    }


def effective_bits(model_map: ModelMap, choice: ChosenLayers) -> float:
    """Bits per weight over the layers that could be quantised, block scales included."""
    slots = model_map.slots
    bits = sum(
        FORMATS[fmt].storage_bits(slots[name].out_features, slots[name].in_features).effective_bits
        for name, fmt in choice.slot_formats.items()
    )
    return bits / sum(slot.weights for slot in slots.values())
