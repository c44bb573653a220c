"""Plain data of model maps, as the store keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from autoq.models import DecisionGroup, ExcludedSlot, ModelMap, SlotKind, WeightSlot


def model_map_to_json(model_map: ModelMap) -> dict[str, Any]:
    """Plain data; `model_map_from_json` gives the map back."""
    return {
        "architecture": model_map.architecture,
        "slots": [asdict(slot) for slot in model_map.slots.values()],
        "groups": [asdict(group) for group in model_map.groups],
        "excluded": [asdict(excluded) for excluded in model_map.excluded],
        "blocks": list(model_map.blocks),
    }


def model_map_from_json(data: Mapping[str, Any]) -> ModelMap:
    """The map that `model_map_to_json` was given."""
    slots = [WeightSlot(**{**slot, "kind": SlotKind(slot["kind"])}) for slot in data["slots"]]
    return ModelMap(
        architecture=data["architecture"],
        slots={slot.name: slot for slot in slots},
        groups=tuple(_group_from_json(group) for group in data["groups"]),
        excluded=tuple(ExcludedSlot(**excluded) for excluded in data["excluded"]),
        blocks=tuple(data["blocks"]),
    )


def _group_from_json(data: Mapping[str, Any]) -> DecisionGroup:
    return DecisionGroup(
        name=data["name"],
        slots=tuple(data["slots"]),
        reason=data["reason"],
        fusion_sets=tuple(tuple(names) for names in data["fusion_sets"]),
        input_sets=tuple(tuple(names) for names in data["input_sets"]),
    )
