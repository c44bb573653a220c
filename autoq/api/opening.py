"""Finding studies in a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoq.api.budgets import BYTES_PER_GB, MILLISECONDS_PER_SECOND
from autoq.api.measured import is_asked_for
from autoq.api.study import Study
from autoq.api.summary import plan_budgets
from autoq.errors import UnknownNameError
from autoq.search import Resource
from autoq.studies import PlanRecord, StudyStore, StudySummary

DEFAULT_STORE = "sqlite:///autoq.db"

BITS = Resource.EFFECTIVE_BITS.value

UNIFORM = "uniform "
"""How labels of plans begin that give every group one format."""

_UNITS = {
    Resource.STORED_BYTES.value: (BYTES_PER_GB, "GB"),
    Resource.ACTIVE_BITS.value: (1.0, "active bits"),
    Resource.LATENCY.value: (1 / MILLISECONDS_PER_SECOND, "ms"),
    "kl_divergence": (1.0, "KL"),
}
"""Other budgets: how much of the resource's own unit the shown one is, and its name."""


def open_study(
    name: str | None = None,
    store: str | StudyStore = DEFAULT_STORE,
    *,
    trust_remote_code: bool = False,
) -> Study:
    """A study by name, number or unique beginning of its name; None is the newest.

    Args:
        trust_remote_code: run Python code that the model's folder brings, when the model has to be
            loaded; what the store says of it does not count.
    Raises:
        UnknownNameError: there is no such study; the message lists near misses.
    """
    opened = StudyStore.open(store) if isinstance(store, str) else store
    if name is None:
        studies = opened.list_studies()
        if not studies:
            raise UnknownNameError(
                "the store has no study yet; make one with `autoq search MODEL --bits B`"
            )
        name = max(studies, key=lambda study: study.updated).name
    return Study(opened, opened.find(name), trust_remote_code=trust_remote_code)


def list_studies(store: str | StudyStore = DEFAULT_STORE) -> list[dict[str, Any]]:
    """One entry per study: name, model, status, times, budgets that were asked for, exports.

    The status is "interrupted" where the process that worked on the study ended before its work.
    "budgets" are those in effective bits, "other_budgets" those in other units, as text.
    """
    opened = StudyStore.open(store) if isinstance(store, str) else store
    return [_entry(study, opened.plans(study.id)) for study in opened.list_studies()]


def _entry(study: StudySummary, plans: Sequence[PlanRecord]) -> dict[str, Any]:
    asked = [_asked_budgets(plan) for plan in plans if is_asked_for(plan)]
    return {
        "name": study.name,
        "model": study.model_path,
        "status": "interrupted" if study.is_interrupted else study.status.value,
        "created": study.created,
        "updated": study.updated,
        "budgets": sorted({limits[BITS] for limits in asked if BITS in limits}),
        "other_budgets": [
            f"{limit / _UNITS[name][0]:g} {_UNITS[name][1]}"
            for name, limit in sorted({pair for limits in asked for pair in limits.items()})
            if name in _UNITS
        ],
        "exports": study.exports,
    }


def _asked_budgets(plan: PlanRecord) -> dict[str, float]:
    """What a plan was asked to keep; nothing for one that was made to compare with."""
    if plan.label.startswith(UNIFORM):
        return {}
    # Plans of before there were budgets of other kinds have no details.
    return plan_budgets(plan) if plan.details else {BITS: plan.budget_bits}
