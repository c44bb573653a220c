"""What a study's validation says of its plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoq.evaluators import PredictionCalibration
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study_tables import StudyTables


def validation_summary(study: StudyTables, plan: PlanRecord) -> dict[str, Any]:
    """The validated part of `Study.summary`: "validation" and "predicted_calibrated"."""
    found = study.validation
    return {
        "validation": found,
        "predicted_calibrated": None
        if found is None
        else calibrated_prediction(found, plan.predicted_loss),
    }


def calibrated_prediction(
    validation: Mapping[str, Any], predicted: float | None
) -> dict[str, float] | None:
    """What a plan of this predicted loss will be measured at, by the validation's line."""
    if validation["calibration"] is None or not predicted or not predicted > 0.0:
        return None
    found = PredictionCalibration.from_json(validation["calibration"]).apply(predicted)
    return {"value": found.value, "low": found.low, "high": found.high}
