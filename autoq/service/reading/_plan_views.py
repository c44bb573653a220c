"""Plans, frontiers and tables as the service shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.api.budgets import Budgets
from autoq.api.measured import OTHER_DATA, REFINED_FROM
from autoq.api.study_tables import StudyTables
from autoq.formats import NONE
from autoq.report.layers import layer_position
from autoq.report.numbers import finite
from autoq.search import Plan
from autoq.studies import MeasurementRecord, PlanRecord
from autoq.studies.listing import budgets_of
from autoq.wire import (
    Frontier,
    FrontierPoint,
    PlanReply,
    Sensitivities,
    SensitivityGroup,
)


def stored_plan(
    plan: PlanRecord,
    unit: str,
    measurements: Iterable[MeasurementRecord] = (),
    labels: Mapping[int, str] | None = None,
    *,
    assignment: bool = True,
) -> PlanReply:
    """A plan of the store.

    Args:
        measurements: of the study; those of other data than its own do not count.
        labels: plan -> label, of plans that refinements began with.
        assignment: whether it is shown.
    """
    measured = {
        entry.metric: entry.value
        for entry in measurements
        if entry.plan_id == plan.id and OTHER_DATA not in entry.details
    }
    return PlanReply(
        id=plan.id,
        label=plan.label,
        budgets=budgets_of(plan.details),
        effective_bits=plan.effective_bits,
        peer_effective_bits=plan.peer_effective_bits,
        stored_bits_per_weight=plan.stored_bits_per_weight,
        stored_bytes=plan.stored_bytes,
        takes={"effective_bits": plan.effective_bits, **plan.takes},
        predicted_loss=plan.predicted_loss,
        predicted_loss_interval=plan.predicted_loss_interval,
        unit=unit,
        bound=plan.bound,
        gap=plan.gap,
        assignment=plan.assignment if assignment else {},
        measured=measured or None,
        refined_from=(labels or {}).get(plan.details.get(REFINED_FROM, -1)),
        created=plan.created,
    )


def solved_plan(plan: Plan, label: str, budgets: Budgets, unit: str, seconds: float) -> PlanReply:
    """A plan that was only computed."""
    low, high = plan.predicted_loss_interval
    limits = {budget.resource.value: budget.limit for budget in budgets.limits}
    if budgets.max_kl is not None:
        limits["kl_divergence"] = budgets.max_kl
    return PlanReply(
        id=None,
        label=label,
        budgets=limits,
        effective_bits=plan.effective_bits,
        peer_effective_bits=plan.peer_effective_bits,
        stored_bits_per_weight=plan.stored_bits_per_weight,
        stored_bytes=plan.stored_bytes,
        takes={resource.value: value for resource, value in plan.takes.items()},
        predicted_loss=finite(plan.predicted_loss),
        predicted_loss_interval=(finite(low), finite(high)),
        unit=unit,
        bound=finite(plan.bound),
        gap=finite(plan.gap),
        assignment={str(group): str(fmt) for group, fmt in plan.assignment.items()},
        solve_seconds=seconds,
    )


def frontier_view(
    study: str, unit: str, reachable: tuple[float, float], plans: Sequence[Plan]
) -> Frontier:
    """The plans of a frontier, without their assignments."""
    return Frontier(
        study=study,
        unit=unit,
        budget_floor=reachable[0],
        budget_ceiling=reachable[1],
        points=tuple(_point(plan) for plan in plans),
    )


def _point(plan: Plan) -> FrontierPoint:
    low, high = plan.predicted_loss_interval
    return FrontierPoint(
        effective_bits=plan.effective_bits,
        stored_bytes=plan.stored_bytes,
        predicted_loss=finite(plan.predicted_loss),
        predicted_loss_interval=(finite(low), finite(high)),
        gap=finite(plan.gap),
        budget=plan.budget_bits,
        peer_effective_bits=plan.peer_effective_bits,
        stored_bits_per_weight=plan.stored_bits_per_weight,
        bound=finite(plan.bound),
        takes={resource.value: value for resource, value in plan.takes.items()},
    )


def sensitivities_view(study: StudyTables) -> Sensitivities:
    """The table of a study, most bits last, as it was scored; what cannot be taken is null."""
    table, costs = study.sensitivity, study.costs()
    formats = tuple(name for name in table.formats if name != NONE)
    columns = [costs.formats.index(name) for name in formats]
    scores = table.scores()
    usable = costs.allowed[:, columns] & np.isfinite(scores)
    bits = costs.effective_bits[:, columns] / costs.weights[:, None]
    blocks = {block: place for place, block in enumerate(study.model_map.blocks)}
    return Sensitivities(
        study=study.name,
        unit=table.unit,
        formats=formats,
        groups=tuple(
            _group(group.name, len(group.slots), int(weights), blocks)
            for group, weights in zip(study.model_map.groups, costs.weights, strict=True)
        ),
        scores=_cells(scores, usable),
        standard_errors=_cells(table.standard_errors(), usable),
        effective_bits=_cells(bits, usable),
    )


def _group(name: str, slots: int, weights: int, blocks: Mapping[str, int]) -> SensitivityGroup:
    position = layer_position(name)
    block = f"{position.stack}.{position.block}" if position.stack else str(position.block)
    return SensitivityGroup(
        name=name, slots=slots, weights=weights, layer=blocks.get(block), kind=position.type
    )


def _cells(values: NDArray[Any], usable: NDArray[np.bool_]) -> tuple[tuple[float | None, ...], ...]:
    shown = usable & np.isfinite(values)
    pairs = zip(values.tolist(), shown.tolist(), strict=True)
    return tuple(
        tuple(value if is_shown else None for value, is_shown in zip(row, row_shown, strict=True))
        for row, row_shown in pairs
    )
