"""All studies of a store at a glance; loads neither models nor search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoq.studies.records import StudySummary
from autoq.studies.repository import StudyStore

BITS = "effective_bits"

UNITS = {
    "stored_bytes": (1e9, "GB"),
    "active_bits": (1.0, "active bits"),
    "latency_seconds": (1e-3, "ms"),
    "kl_divergence": (1.0, "KL"),
}
"""Other budgets: how much of the resource's own unit the shown one is, and its name."""

UNIFORM = "uniform "
"""How labels of plans begin that give every group one format."""

VALIDATION = "validation"
"""How labels of plans begin that were made to judge the prediction; nobody asked for them."""

REFINED_FROM = "refined_from"
"""Key in a refined plan's details: the id of its start."""

REFINEMENT = "refinement"
"""Key in a plan's details: the Optuna study that found it."""


def is_asked_for(label: str, details: Mapping[str, Any]) -> bool:
    """Whether a plan is a user's, and not one of a validation or of a measured front."""
    of_a_front = REFINEMENT in details and REFINED_FROM not in details
    return not label.startswith(f"{VALIDATION} ") and not of_a_front


def budgets_of(details: Mapping[str, Any]) -> dict[str, float]:
    """Resource -> limit that a plan was solved for; "kl_divergence" for a limit on quality."""
    solved = {entry["resource"]: entry["limit"] for entry in details.get("budgets", ())}
    budgets = dict(details.get("asked", solved))
    if "max_kl" in details:
        budgets["kl_divergence"] = details["max_kl"]
    return budgets


def list_entries(store: StudyStore, newest: int | None = None) -> list[dict[str, Any]]:
    """One entry per study: name, model, status, times, budgets that were asked for, exports.

    The status is "interrupted" where the process that worked on the study ended before its work.
    "budgets" are those in effective bits, "other_budgets" those in other units, as text.

    Args:
        newest: only so many studies, at most some thousands, those that were worked on last.
    """
    studies = store.list_studies(in_detail=False, newest=newest)
    return entries_of(store, studies, all_of_them=newest is None)


def entries_of(
    store: StudyStore, studies: Sequence[StudySummary], *, all_of_them: bool = False
) -> list[dict[str, Any]]:
    """As `list_entries`, of studies that were looked up before.

    Args:
        all_of_them: whether the store has no others; else they are at most some thousands.
    """
    listed = None if all_of_them else [study.id for study in studies]
    asked: dict[int, list[dict[str, float]]] = {}
    for study_id, label, budget_bits, details in store.plan_wishes(listed):
        if is_asked_for(label, details) and not label.startswith(UNIFORM):
            # Plans of before there were budgets of other kinds have no details.
            limits = budgets_of(details) if details else {BITS: budget_bits}
            asked.setdefault(study_id, []).append(limits)
    return [_entry(study, asked.get(study.id, [])) for study in studies]


def _entry(study: StudySummary, asked: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "name": study.name,
        "model": study.model_path,
        "status": "interrupted" if study.is_interrupted else study.status.value,
        "created": study.created,
        "updated": study.updated,
        "budgets": sorted({limits[BITS] for limits in asked if BITS in limits}),
        "other_budgets": [
            f"{limit / UNITS[name][0]:g} {UNITS[name][1]}"
            for name, limit in sorted({pair for limits in asked for pair in limits.items()})
            if name in UNITS
        ],
        "exports": study.exports,
    }
