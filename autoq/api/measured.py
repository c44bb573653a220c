"""What a study's stored measurements say: plans beside each other, and the noise under them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from autoq.evaluators import NOISE_FLOOR, compare
from autoq.studies import MeasurementRecord, PlanRecord, listing

if TYPE_CHECKING:
    from autoq.api.study_tables import StudyTables

KL_DIVERGENCE = "kl_divergence"

PER_SEQUENCE = "per_sequence"
"""Key in a measurement's details: the metric on each sequence, for paired comparison."""

OTHER_DATA = "data"
"""Key in a measurement's details: where the tokens come from, if not from the study's own."""

REFINED_FROM = listing.REFINED_FROM
"""Key in a refined plan's details: the id of its start."""

REFINEMENT = listing.REFINEMENT
"""Key in a plan's details: the Optuna study that found it."""

VALIDATION = listing.VALIDATION
"""How labels of plans begin that were made to judge the prediction; nobody asked for them."""


def is_asked_for(plan: PlanRecord) -> bool:
    """Whether a plan is a user's, and not one of `Study.validate` or of a measured front."""
    return listing.is_asked_for(plan.label, plan.details)


def noise_floor_on(study: StudyTables, data_sha256: str | None) -> MeasurementRecord | None:
    """The noise floor that was measured on these tokens."""
    return _noise_floor(study.store.measurements(study.id), data_sha256)


def measured_summary(study: StudyTables, plan: PlanRecord) -> dict[str, Any]:
    """The measured part of `Study.summary`: "measured", "noise_floor" and "measurements".

    Only measurements on the study's own held-out data: on other data, plans do not compare.
    """
    records = [
        entry for entry in study.store.measurements(study.id) if OTHER_DATA not in entry.details
    ]
    own = _latest_divergence(records, plan)
    floor = _noise_floor(records, own.data_sha256) if own is not None else None
    return {
        "measured": {entry.metric: entry.value for entry in records if entry.plan_id == plan.id},
        "noise_floor": None if floor is None else with_interval(floor),
        "measurements": _measurements(study, records, own, floor),
    }


def with_interval(record: MeasurementRecord) -> dict[str, float | None]:
    """A measured number as plain data."""
    low, high = record.interval or (None, None)
    return {"value": record.value, "low": low, "high": high}


def _measurements(
    study: StudyTables,
    records: Sequence[MeasurementRecord],
    own: MeasurementRecord | None,
    floor: MeasurementRecord | None,
) -> list[dict[str, Any]]:
    """Per measured plan: its prediction, its metrics with intervals, and how this plan compares."""
    plans = {plan.id: plan for plan in study.plans() if is_asked_for(plan)}
    rows: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.plan_id not in plans:
            continue
        plan = plans[record.plan_id]
        row = rows.setdefault(
            plan.id,
            {
                "label": plan.label,
                "effective_bits": plan.effective_bits,
                "predicted_loss": plan.predicted_loss,
                "tokens": record.tokens,
                "metrics": {},
                "this_plan": None,
            },
        )
        row["tokens"] = record.tokens
        row["metrics"][record.metric] = with_interval(record)
        if record.metric == KL_DIVERGENCE:
            row["this_plan"] = _comparison(own, record, floor)
    return list(rows.values())


def _comparison(
    own: MeasurementRecord | None, other: MeasurementRecord, floor: MeasurementRecord | None
) -> dict[str, Any] | None:
    """How the plan of `own` compares; None with itself or where the sequences were others."""
    if own is None or own.plan_id == other.plan_id or own.data_sha256 != other.data_sha256:
        return None
    values, others = (record.details.get(PER_SEQUENCE) for record in (own, other))
    if not values or not others:
        return None
    found = compare(values, others, floor.value or 0.0 if floor is not None else 0.0)
    return {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "verdict": found.verdict,
    }


def _latest_divergence(
    records: Iterable[MeasurementRecord], plan: PlanRecord
) -> MeasurementRecord | None:
    found = [
        record for record in records if record.plan_id == plan.id and record.metric == KL_DIVERGENCE
    ]
    return found[-1] if found else None


def _noise_floor(
    records: Iterable[MeasurementRecord], data_sha256: str | None
) -> MeasurementRecord | None:
    for record in records:
        is_floor = record.plan_id is None and record.label == NOISE_FLOOR
        if is_floor and record.metric == KL_DIVERGENCE and record.data_sha256 == data_sha256:
            return record
    return None
