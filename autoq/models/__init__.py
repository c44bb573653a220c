"""Loading models, finding what can be quantised in them, and forming decision groups."""

from autoq.models._types import (
    Assignment,
    DecisionGroup,
    ExcludedSlot,
    GroupName,
    ModelMap,
    SlotKind,
    SlotName,
    WeightSlot,
)

__all__ = [
    "Assignment",
    "DecisionGroup",
    "ExcludedSlot",
    "GroupName",
    "ModelMap",
    "SlotKind",
    "SlotName",
    "WeightSlot",
]
