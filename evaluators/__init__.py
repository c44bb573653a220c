"""Turning a quantised model into named numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoq.lazy import names_from

if TYPE_CHECKING:
    from autoq.evaluators.comparison import Comparison, compare
    from autoq.evaluators.estimate import NOISE_FLOOR, Estimate
    from autoq.evaluators.fidelity import Fidelity, measure_fidelity, sequence_divergences
    from autoq.evaluators.metrics import known_metrics, measure_metrics
    from autoq.evaluators.noise import rounded_again, rounding_noise
    from autoq.evaluators.objective import (
        Constraint,
        Objective,
        canonical_name,
        parse_constraint,
        parse_objective,
    )
    from autoq.evaluators.prediction import (
        PredictionCalibration,
        PredictionQuality,
        calibrate_prediction,
        calibrated_coverage,
        prediction_quality,
    )
    from autoq.evaluators.protocol import EVALUATORS, Evaluator, Metric, Need, Reference, Subject
    from autoq.evaluators.reference import ReferenceOutputs

__all__ = [
    "EVALUATORS",
    "NOISE_FLOOR",
    "Comparison",
    "Constraint",
    "Estimate",
    "Evaluator",
    "Fidelity",
    "Metric",
    "Need",
    "Objective",
    "PredictionCalibration",
    "PredictionQuality",
    "Reference",
    "ReferenceOutputs",
    "Subject",
    "calibrate_prediction",
    "calibrated_coverage",
    "canonical_name",
    "compare",
    "known_metrics",
    "measure_fidelity",
    "measure_metrics",
    "parse_constraint",
    "parse_objective",
    "prediction_quality",
    "rounded_again",
    "rounding_noise",
    "sequence_divergences",
]


__getattr__ = names_from(
    __name__,
    {
        "autoq.evaluators.comparison": ("Comparison", "compare"),
        "autoq.evaluators.estimate": ("NOISE_FLOOR", "Estimate"),
        "autoq.evaluators.fidelity": (
            "Fidelity",
            "measure_fidelity",
            "sequence_divergences",
        ),
        # All evaluators are registered once their metrics are known.
        "autoq.evaluators.metrics": ("EVALUATORS", "known_metrics", "measure_metrics"),
        "autoq.evaluators.noise": ("rounded_again", "rounding_noise"),
        "autoq.evaluators.objective": (
            "Constraint",
            "Objective",
            "canonical_name",
            "parse_constraint",
            "parse_objective",
        ),
        "autoq.evaluators.prediction": (
            "PredictionCalibration",
            "PredictionQuality",
            "calibrate_prediction",
            "calibrated_coverage",
            "prediction_quality",
        ),
        "autoq.evaluators.protocol": (
            "Evaluator",
            "Metric",
            "Need",
            "Reference",
            "Subject",
        ),
        "autoq.evaluators.reference": ("ReferenceOutputs",),
    },
)
