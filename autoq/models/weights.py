"""Looking at a model's weights: as matrices, for broken values, and as a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.models._types import SlotKind, SlotName, WeightSlot

# Facts about the writer and its machine; they change nothing in the model.
_UNRELATED_SETTINGS = frozenset({"_name_or_path", "transformers_version"})


def slot_weight(model: nn.Module, slot: WeightSlot) -> Tensor:
    """The slot's matrix [out_features, in_features]: a view, so writing to it changes the model.

    Raises:
        ModelError: the model has no such parameter, or it has another shape.
    """
    try:
        matrix: Tensor = getattr(model.get_submodule(slot.module), slot.parameter).detach()
        if slot.kind is SlotKind.EXPERT:
            matrix = matrix[slot.expert]
    except (AttributeError, IndexError) as error:
        raise ModelError(
            f"the model has no weight {slot.name}: {error}; discover it anew"
        ) from None
    if slot.kind is SlotKind.CONV1D:
        matrix = matrix.t()
    expected = (slot.out_features, slot.in_features)
    if tuple(matrix.shape) != expected:
        raise ModelError(
            f"{slot.name} must have shape {expected}, got {tuple(matrix.shape)}; discover it anew"
        )
    return matrix


def check_finite(
    model: nn.Module, slots: Mapping[SlotName, WeightSlot] | Iterable[WeightSlot]
) -> None:
    """Refuse NaN and infinity in the slots' weights and in every other parameter and buffer.

    Raises:
        ModelError: names the first tensor with such a value, and how many it has.
    """
    known = slots.values() if isinstance(slots, Mapping) else slots
    for name, values in _named_values(model, known):
        broken = int((~torch.isfinite(values)).sum())
        if broken:
            raise ModelError(
                f"weights must be finite, and {name} has {broken} NaN or infinite of "
                f"{values.numel()} values; restore the weights from a good copy"
            )


def fingerprint_of_module(model: nn.Module) -> str:
    """SHA-256 over configuration and state: equal for equal models, whatever folder they are from.

    It differs from `model_fingerprint` of the folder the model was loaded from.
    """
    digest = hashlib.sha256(_configuration(model).encode())
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
        digest.update(_raw_bytes(values).data)
    return digest.hexdigest()


def _named_values(model: nn.Module, slots: Iterable[WeightSlot]) -> Iterator[tuple[str, Tensor]]:
    seen: set[str] = set()
    for slot in slots:
        seen.add(f"{slot.module}.{slot.parameter}")
        yield slot.name, slot_weight(model, slot)
    for name, values in model.state_dict().items():
        if name not in seen and values.is_floating_point():
            yield name, values


def _configuration(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    settings: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    related = {key: value for key, value in settings.items() if key not in _UNRELATED_SETTINGS}
    return json.dumps([type(model).__name__, related], sort_keys=True, default=str)


def _raw_bytes(values: Tensor) -> NDArray[np.uint8]:
    flat = values.detach().cpu().contiguous().reshape(-1)
    return np.asarray(flat.view(torch.uint8).numpy(), dtype=np.uint8)
