"""Forming decision groups: which weights must take the same format, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from autoq.models._types import DecisionGroup, GroupName, SlotKind, SlotName, WeightSlot
from autoq.models.families import (
    CROSS_ATTENTION_REASON,
    FUSED_SIBLINGS,
    FusedSiblings,
    is_cross_attention,
)

if TYPE_CHECKING:
    from torch import Tensor

_ALONE_REASON = "decided alone"
_EXPERTS_REASON = "engines run all experts of a layer in one format"
_TIED_REASON = "these modules share one tensor"

# Families that keep their experts as separate modules: "<mixture>.experts.<index>.<projection>".
_EXPERT_PATH = re.compile(r"^(?P<experts>.*\.experts)\.(?P<index>[^.]*\d+)\.(?P<projection>.+)$")


def form_groups(members: Sequence[tuple[WeightSlot, Tensor]]) -> list[DecisionGroup]:
    """Group slots that must be decided together.

    Args:
        members: slots in order of depth, each with the parameter it lies in.
    Returns:
        Groups that cover every slot once, ordered by their first slot.
    """
    slots = [slot for slot, _ in members]
    experts, others = _split_experts(slots)
    groups = [_expert_group(name, of_layer) for name, of_layer in experts.items()]
    groups += _sibling_groups(others)
    grouped = {name for group in groups for name in group.slots}
    groups += [_single_group(slot) for slot in slots if slot.name not in grouped]
    return _in_order(_merge_tied(groups, members), slots)


def is_expert(slot: WeightSlot) -> bool:
    """Whether the slot belongs to one expert of a mixture, which sees some of the tokens only."""
    return slot.kind is SlotKind.EXPERT or _EXPERT_PATH.match(slot.module) is not None


def _single_group(slot: WeightSlot) -> DecisionGroup:
    return DecisionGroup(name=GroupName(slot.name), slots=(slot.name,), reason=_ALONE_REASON)


def _split_experts(
    slots: Iterable[WeightSlot],
) -> tuple[dict[str, list[WeightSlot]], list[WeightSlot]]:
    """Slots of experts by the path of their layer's experts, and all other slots."""
    experts: dict[str, list[WeightSlot]] = {}
    others: list[WeightSlot] = []
    for slot in slots:
        match = _EXPERT_PATH.match(slot.module)
        if slot.kind is SlotKind.EXPERT:
            experts.setdefault(slot.module, []).append(slot)
        elif match is not None:
            experts.setdefault(match["experts"], []).append(slot)
        else:
            others.append(slot)
    return experts, others


def _expert_group(name: str, slots: Sequence[WeightSlot]) -> DecisionGroup:
    return DecisionGroup(
        name=GroupName(name),
        slots=tuple(slot.name for slot in slots),
        reason=_EXPERTS_REASON,
        fusion_sets=tuple(_names(found) for found, _ in _siblings(slots)),
        input_sets=_expert_input_sets(slots),
    )


def _expert_input_sets(slots: Sequence[WeightSlot]) -> tuple[tuple[SlotName, ...], ...]:
    """The projections that read the layer's input, and those that read the experts' insides."""
    by_side: dict[bool, list[SlotName]] = {}
    for slot in slots:
        by_side.setdefault(_reads_hidden_state(slot), []).append(slot.name)
    return tuple(tuple(names) for names in by_side.values() if len(names) > 1)


def _reads_hidden_state(slot: WeightSlot) -> bool:
    projection = slot.name.rpartition(".")[2]
    return projection not in {"down_proj", "w2", "wo", "fc2"}


def _sibling_groups(slots: Sequence[WeightSlot]) -> list[DecisionGroup]:
    groups = []
    for found, reason in _siblings(slots):
        parent, _, first = found[0].name.rpartition(".")
        rest = [slot.name.rpartition(".")[2] for slot in found[1:]]
        name = ".".join(filter(None, [parent, "+".join([first, *rest])]))
        names = _names(found)
        groups.append(
            DecisionGroup(name=GroupName(name), slots=names, reason=reason, fusion_sets=(names,))
        )
    return groups


def _siblings(slots: Sequence[WeightSlot]) -> list[tuple[list[WeightSlot], str]]:
    """Slots that engines fuse into one matrix, with the reason."""
    by_parent: dict[str, dict[str, WeightSlot]] = {}
    for slot in slots:
        if slot.kind is not SlotKind.EXPERT:
            parent, _, name = slot.module.rpartition(".")
            by_parent.setdefault(parent, {})[name] = slot
    found = []
    for parent, children in by_parent.items():
        for rule in FUSED_SIBLINGS:
            names, reason = _rule_for(rule, parent)
            present = [children[name] for name in names if name in children]
            if len(present) > 1 and len({slot.in_features for slot in present}) == 1:
                found.append((present, reason))
    return found


def _rule_for(rule: FusedSiblings, parent: str) -> tuple[tuple[str, ...], str]:
    if rule.cross_attention_names is not None and is_cross_attention(parent):
        return rule.cross_attention_names, CROSS_ATTENTION_REASON
    return rule.names, rule.reason


def _names(slots: Iterable[WeightSlot]) -> tuple[SlotName, ...]:
    return tuple(slot.name for slot in slots)


def _merge_tied(
    groups: Sequence[DecisionGroup], members: Sequence[tuple[WeightSlot, Tensor]]
) -> list[DecisionGroup]:
    """Join groups whose slots are one and the same matrix."""
    merged = {slot: group for group in groups for slot in group.slots}
    first_owner: dict[tuple[int, int | None], SlotName] = {}
    for slot, parameter in members:
        owner = first_owner.setdefault((id(parameter), slot.expert), slot.name)
        mine, theirs = merged[slot.name], merged[owner]
        if mine is not theirs:
            joined = _joined(theirs, mine)
            merged.update(dict.fromkeys(joined.slots, joined))
    return list({id(group): group for group in merged.values()}.values())


def _joined(first: DecisionGroup, second: DecisionGroup) -> DecisionGroup:
    reasons = [r for r in (first.reason, second.reason) if r not in (_ALONE_REASON, _TIED_REASON)]
    return DecisionGroup(
        name=first.name,
        slots=first.slots + second.slots,
        reason="; ".join(dict.fromkeys([*reasons, _TIED_REASON])),
        fusion_sets=first.fusion_sets + second.fusion_sets,
        input_sets=first.input_sets + second.input_sets,
    )


def _in_order(groups: Iterable[DecisionGroup], slots: Sequence[WeightSlot]) -> list[DecisionGroup]:
    position = {slot.name: index for index, slot in enumerate(slots)}
    return sorted(groups, key=lambda group: min(position[name] for name in group.slots))
