"""Turning a quantised model into named numbers."""

from autoq.evaluators.comparison import Comparison, compare
from autoq.evaluators.fidelity import Estimate, Fidelity, measure_fidelity, sequence_divergences
from autoq.evaluators.metrics import known_metrics, measure_metrics
from autoq.evaluators.noise import NOISE_FLOOR, rounded_again, rounding_noise
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
