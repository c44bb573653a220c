"""Plain descriptions of what can be quantised in a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType, TypeAlias

from autoq.formats import FormatName

SlotName = NewType("SlotName", str)
GroupName = NewType("GroupName", str)

Assignment: TypeAlias = Mapping[GroupName, FormatName]
"""Decision group -> format."""


class SlotKind(StrEnum):
    """Where the matrix lies."""

    LINEAR = "linear"  # torch.nn.Linear.weight, [out, in]
    CONV1D = "conv1d"  # transformers' GPT-2 Conv1D.weight, stored [in, out]
    EXPERT = "expert"  # one expert's slice of a fused 3-D parameter, [out, in]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSlot:
    """One quantisable weight matrix, seen as [out_features, in_features]."""

    name: SlotName  # module path; for experts "<module path>.<expert index>.<parameter>"
    module: str  # path of the module that owns the parameter
    parameter: str  # attribute name in that module: "weight", "gate_up_proj", "down_proj"
    kind: SlotKind
    out_features: int
    in_features: int
    expert: int | None = None

    @property
    def weights(self) -> int:
        """How many weights the matrix has."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionGroup:
    """Weights that must take the same format; the unit that search decides on.

    `fusion_sets` names slots that engines fuse into one matrix (q/k/v, gate/up): they share the
    second-level weight scale, the activation scale and the AWQ scale, bit for bit.
    `input_sets` names slots that share only the activation scale (the experts of a layer).
    """

    name: GroupName
    slots: tuple[SlotName, ...]
    reason: str
    fusion_sets: tuple[tuple[SlotName, ...], ...] = ()
    input_sets: tuple[tuple[SlotName, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExcludedSlot:
    """A linear-like weight that search leaves alone, and why."""

    name: SlotName
    reason: str
    weights: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMap:
    """Everything discovery found: what can be quantised, in which groups, and what is left out."""

    architecture: str
    slots: Mapping[SlotName, WeightSlot]
    groups: tuple[DecisionGroup, ...]
    excluded: tuple[ExcludedSlot, ...]
    blocks: tuple[str, ...]  # paths of the repeated layers, in order

    def group_of(self) -> dict[SlotName, GroupName]:
        """Slot name -> name of its group."""
        return {slot: group.name for group in self.groups for slot in group.slots}
