"""What each decision group costs in each format, in exact integer bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoq.errors import InputError
from autoq.formats import FORMATS, NONE, FormatName, QuantFormat
from autoq.models import Assignment, DecisionGroup, GroupName, ModelMap, SlotName, WeightSlot
from autoq.models.grouping import is_expert
from autoq.search._checks import bits_between, check_between, check_usable
from autoq.search._resources import check_reachable
from autoq.search._types import Budget, CostTable, Resource


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSizes:
    """What a checkpoint container writes, tensor by tensor; file headers are not counted."""

    cells: Mapping[GroupName, Mapping[FormatName, int]]  # bits of each group in each format
    fixed_bytes: int  # of every tensor that is not searched


def build_cost_table(model_map: ModelMap, formats: Sequence[FormatName]) -> CostTable:
    """The costs of every group of `model_map` in each of `formats` and in `none`.

    Args:
        model_map: the groups and the shapes of their weights.
        formats: names of registered formats; repeats are dropped and `none` is always the last
            column, named or not.
    Raises:
        UnknownNameError: a name is no registered format; the message lists near misses.
    """
    columns = [FORMATS[name] for name in _with_none_last(formats)]
    members = [[model_map.slots[name] for name in group.slots] for group in model_map.groups]
    shape = (len(members), len(columns))
    weights = [sum(slot.weights for slot in slots) for slots in members]
    effective = [[_effective_bits(slots, column) for column in columns] for slots in members]
    stored = [[_stored_bits(slots, column) for column in columns] for slots in members]
    peer = [[column.peer_bits * count for column in columns] for count in weights]
    allowed = [[_refusal(slots, column) is None for column in columns] for slots in members]
    return CostTable(
        groups=tuple(group.name for group in model_map.groups),
        formats=tuple(column.name for column in columns),
        weights=np.array(weights, dtype=np.int64),
        effective_bits=np.array(effective, dtype=np.int64).reshape(shape),
        stored_bits=np.array(stored, dtype=np.int64).reshape(shape),
        peer_bits=np.array(peer, dtype=np.float64).reshape(shape),
        allowed=np.array(allowed, dtype=np.bool_).reshape(shape),
    )


def with_stored_sizes(costs: CostTable, sizes: StoredSizes) -> CostTable:
    """`costs` with stored bits as a container writes them, and the bytes of all other tensors.

    Without it stored bits are those of the format's definition, in which every tensor scale is
    32 bits wide and `none` takes 16 bits, and the other tensors are not counted.

    Args:
        sizes: cells that it lacks stay as they are.
    """
    stored = costs.stored_bits.copy()
    for row, group in enumerate(costs.groups):
        for name, bits in sizes.cells.get(group, {}).items():
            if name in costs.formats:
                stored[row, costs.formats.index(name)] = bits
    fixed = {**costs.fixed, Resource.STORED_BYTES: float(sizes.fixed_bytes)}
    return replace(costs, stored_bits=stored, fixed=fixed)


def check_budgets(costs: CostTable, budgets: Iterable[Budget]) -> None:
    """Refuse budgets that no scores could make feasible, each by itself, before any are measured.

    Raises:
        BudgetInfeasibleError: effective bits are below the floor or above the ceiling.
        ResourceInfeasibleError: another budget is below its floor.
        InputError: there is no group, one may take no format, or a budget limits what the table has
            no costs of.
    """
    check_usable(costs, costs.allowed)
    for budget in budgets:
        if budget.resource is Resource.EFFECTIVE_BITS:
            check_between(budget.limit, *bits_between(costs, costs.allowed))
        else:
            check_reachable(costs, budget, costs.allowed)


def token_shares(
    model_map: ModelMap, rows_seen: Mapping[SlotName, int], tokens: int
) -> dict[SlotName, float]:
    """How many of the tokens each slot sees: measured for experts, all of them for the others.

    Args:
        rows_seen: of each expert's slot, the rows of its inputs in calibration.
        tokens: that calibration ran on.
    """
    return {
        name: rows_seen[name] / tokens if is_expert(slot) else 1.0
        for name, slot in model_map.slots.items()
    }


def with_active_bits(
    costs: CostTable, model_map: ModelMap, shares: Mapping[SlotName, float]
) -> CostTable:
    """`costs` with mean effective bits per weight that a token touches.

    A slot counts as much as it is used: the value is the sum of share * bits over all searched
    slots, divided by the sum of share * weights. Without mixtures of experts it is the mean
    effective bits.

    Args:
        shares: of each slot, from `token_shares`.
    Raises:
        InputError: no token was seen by any slot.
    """
    groups = [_slots(model_map, group) for group in model_map.groups]
    touched = sum(shares[slot.name] * slot.weights for slots in groups for slot in slots)
    if not touched:
        raise InputError("active bits need slots that tokens reach, got none; calibrate on more")
    table = [
        [
            sum(shares[slot.name] * _effective_bits([slot], FORMATS[name]) for slot in slots)
            / touched
            for name in costs.formats
        ]
        for slots in groups
    ]
    return _with_additional(costs, Resource.ACTIVE_BITS, np.array(table, dtype=np.float64))


def with_latency(costs: CostTable, seconds: NDArray[np.float64]) -> CostTable:
    """`costs` with the time of each cell, [groups, formats] from `latency_seconds`."""
    return _with_additional(costs, Resource.LATENCY, seconds)


def _with_additional(costs: CostTable, resource: Resource, table: NDArray[np.float64]) -> CostTable:
    return replace(costs, additional={**costs.additional, resource: table})


def refusals(
    model_map: ModelMap, formats: Sequence[FormatName]
) -> dict[tuple[GroupName, FormatName], str]:
    """Why a group cannot take a format, for each pair that its shapes forbid.

    The reason names the first slot of the group that the format refuses.

    Raises:
        UnknownNameError: a name is no registered format; the message lists near misses.
    """
    columns = [FORMATS[name] for name in _with_none_last(formats)]
    found = {
        (group.name, column.name): _refusal(_slots(model_map, group), column)
        for group in model_map.groups
        for column in columns
    }
    return {cell: reason for cell, reason in found.items() if reason is not None}


def effective_bits(costs: CostTable, assignment: Assignment) -> float:
    """Mean bits per weight over all groups, codes and block scales: what budgets count.

    Raises:
        InputError: the assignment misses a group, or names one or a format the table lacks.
    """
    return _total(costs.effective_bits, costs, assignment) / _weights(costs)


def stored_bits_per_weight(costs: CostTable, assignment: Assignment) -> float:
    """Mean bits per weight over all groups, everything that is written for them.

    Raises:
        InputError: as `effective_bits`.
    """
    return _total(costs.stored_bits, costs, assignment) / _weights(costs)


def peer_effective_bits(costs: CostTable, assignment: Assignment) -> float:
    """Mean bits per weight as ModelOpt's auto_quantize counts them, over the same groups.

    Raises:
        InputError: as `effective_bits`.
    """
    rows, columns = _cells(costs, assignment)
    return float(costs.peer_bits[rows, columns].sum()) / _weights(costs)


def stored_bytes(costs: CostTable, assignment: Assignment) -> int:
    """Bytes written for the weights of all groups; what is not searched is not counted.

    Raises:
        InputError: as `effective_bits`.
    """
    return -(-_total(costs.stored_bits, costs, assignment) // 8)


def assigned_columns(costs: CostTable, assignment: Assignment) -> list[int]:
    """The column of `costs` that each group takes, in the order of `costs.groups`.

    Raises:
        InputError: as `effective_bits`.
    """
    known = set(costs.groups)
    unknown = [name for name in assignment if name not in known]
    if unknown:
        raise InputError(
            f"an assignment may name only groups of the search, got {unknown[0]!r}; "
            f"take the names from the group table ({len(costs.groups)} groups)"
        )
    index = {name: column for column, name in enumerate(costs.formats)}
    columns = []
    for group in costs.groups:
        name = assignment.get(group)
        if name is None:
            raise InputError(
                f"an assignment must give every group a format, got none for {group!r}; "
                "name one of " + ", ".join(costs.formats)
            )
        if name not in index:
            raise InputError(
                f"an assignment may use only formats of the search, got {name!r} for {group!r}; "
                "name one of " + ", ".join(costs.formats)
            )
        columns.append(index[name])
    return columns


def _with_none_last(formats: Sequence[FormatName]) -> list[FormatName]:
    return [name for name in dict.fromkeys(formats) if name != NONE] + [NONE]


def _slots(model_map: ModelMap, group: DecisionGroup) -> list[WeightSlot]:
    return [model_map.slots[name] for name in group.slots]


def _effective_bits(slots: Sequence[WeightSlot], column: QuantFormat) -> int:
    return sum(
        column.storage_bits(slot.out_features, slot.in_features).effective_bits for slot in slots
    )


def _stored_bits(slots: Sequence[WeightSlot], column: QuantFormat) -> int:
    return sum(
        column.storage_bits(slot.out_features, slot.in_features).stored_bits for slot in slots
    )


def _refusal(slots: Sequence[WeightSlot], column: QuantFormat) -> str | None:
    for slot in slots:
        reason = column.refusal(slot.out_features, slot.in_features)
        if reason is not None:
            return f"{slot.name}: {reason}"
    return None


def _cells(costs: CostTable, assignment: Assignment) -> tuple[NDArray[np.int64], list[int]]:
    return np.arange(len(costs.groups)), assigned_columns(costs, assignment)


def _total(bits: NDArray[np.int64], costs: CostTable, assignment: Assignment) -> int:
    rows, columns = _cells(costs, assignment)
    return int(bits[rows, columns].sum())


def _weights(costs: CostTable) -> int:
    return int(costs.weights.sum())
