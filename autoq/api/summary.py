"""One plan of a study as plain data: what programs read and what tables and reports show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from autoq.api.cache_plans import cache_summary
from autoq.api.measured import REFINED_FROM, measured_summary
from autoq.api.validated import validation_summary
from autoq.formats import NONE, FormatName
from autoq.search import CostTable, SensitivityTable
from autoq.studies import ExportStatus, PlanRecord
from autoq.studies.listing import budgets_of

if TYPE_CHECKING:
    from autoq.api.study_tables import StudyTables


def summarise(study: StudyTables, plan: PlanRecord) -> dict[str, Any]:
    """Everything about `plan`; the keys are documented in the README."""
    return {
        "study": study.name,
        "model": study.record.model_path,
        "architecture": study.record.architecture,
        "model_fingerprint": study.record.model_fingerprint,
        "budget": plan.budget_bits,
        "budgets": plan_budgets(plan),
        "takes": plan_takes(plan),
        "latency": plan.details.get("latency"),
        "target": study.target,
        "refined_from": refined_from(study, plan),
        "assignment": _assignment_by_module(study, plan),
        "groups": group_rows(study, plan.assignment),
        "kv_cache": cache_summary(study, plan),
        "excluded": [
            {"name": entry.name, "reason": entry.reason, "weights": entry.weights}
            for entry in study.model_map.excluded
        ],
        "effective_bits": plan.effective_bits,
        "peer_effective_bits": plan.peer_effective_bits,
        "stored_bits_per_weight": plan.stored_bits_per_weight,
        "stored_bytes": plan.stored_bytes,
        "predicted_loss": plan.predicted_loss,
        "predicted_loss_interval": list(plan.predicted_loss_interval),
        "bound": plan.bound,
        "gap": plan.gap,
        "least": plan.details.get("least"),
        "unit": study.sensitivity.unit,
        "estimator": study.sensitivity.estimator,
        **measured_summary(study, plan),
        **validation_summary(study, plan),
        "timings_s": _timings(study),
        "peak_rss_bytes": study.peak_rss_bytes(),
        "export": _latest_export(study, plan),
        "configuration": study.record.configuration,
        "versions": study.record.versions,
    }


def refined_from(study: StudyTables, plan: PlanRecord) -> str | None:
    """Label of the plan that refinement made this one from; None for all others."""
    start = plan.details.get(REFINED_FROM)
    return None if start is None else study.store.plan(start).label


def plan_budgets(plan: PlanRecord) -> dict[str, float]:
    """Resource -> limit that the plan was solved for; "kl_divergence" for a limit on quality."""
    return budgets_of(plan.details)


def plan_takes(plan: PlanRecord) -> dict[str, float]:
    """Resource -> what the plan takes; plans of old versions know their effective bits only."""
    return {"effective_bits": plan.effective_bits, **plan.takes}


def _assignment_by_module(study: StudyTables, plan: PlanRecord) -> dict[str, str]:
    return {
        slot: plan.assignment[group.name]
        for group in study.model_map.groups
        for slot in group.slots
    }


def group_rows(study: StudyTables, assignment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every decision group of the study: its scores, and what it takes in its assigned format."""
    table, costs = study.sensitivity, study.costs()
    scores, errors = table.scores(), table.standard_errors()
    rows = []
    for row, group in enumerate(study.model_map.groups):
        fmt = FormatName(assignment[group.name])
        rows.append(
            {
                "name": group.name,
                "slots": list(group.slots),
                "reason": group.reason,
                "format": fmt,
                "weights": int(costs.weights[row]),
                "effective_bits": _bits_per_weight(costs, row, fmt),
                "scores": _by_format(table, scores[row]),
                "standard_errors": _by_format(table, errors[row]),
                "predicted_loss": _score(table, scores[row], fmt),
            }
        )
    return rows


def _bits_per_weight(costs: CostTable, row: int, fmt: FormatName) -> float:
    bits = costs.effective_bits[row, costs.formats.index(fmt)]
    return float(bits / costs.weights[row])


def _by_format(table: SensitivityTable, values: Any) -> dict[str, float | None]:
    pairs = zip(table.formats, values, strict=True)
    return {fmt: float(value) if np.isfinite(value) else None for fmt, value in pairs}


def _score(table: SensitivityTable, scores: Any, fmt: FormatName) -> float:
    return 0.0 if fmt == NONE else float(scores[table.formats.index(fmt)])


def _timings(study: StudyTables) -> dict[str, float]:
    return {
        record.name: record.seconds
        for record in study.store.stages(study.id)
        if record.seconds is not None
    }


def _latest_export(study: StudyTables, plan: PlanRecord) -> dict[str, Any] | None:
    exports = [
        record
        for record in study.store.exports(study.id)
        if record.plan_id == plan.id and record.status is ExportStatus.COMPLETE
    ]
    if not exports:
        return None
    latest = exports[-1]
    return {
        "path": latest.path,
        "container": latest.container,
        "stored_bytes": latest.bytes_written,
        "verification": latest.verification,
        "files": [
            {"path": file.path, "bytes": file.size_bytes, "sha256": file.sha256}
            for file in latest.files
        ],
    }
