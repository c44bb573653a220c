"""The vocabulary of number formats: what exists, what it costs in bits, and where it loads."""

from autoq.formats._builtin import FORMATS, portable_formats
from autoq.formats._calibration import (
    Calibration,
    CalibrationAlgorithm,
    CalibrationMethod,
    CalibrationRecipe,
    CalibrationSteps,
    FeedbackOptions,
    InputScaling,
)
from autoq.formats._calibration_names import (
    ALGORITHMS,
    known_calibrations,
    parse_calibration,
)
from autoq.formats._container import Container
from autoq.formats._format import (
    LOW_RANK_ELEMENT_BITS,
    NONE,
    ActivationScheme,
    FormatName,
    QuantFormat,
    StorageBits,
    WeightElement,
    WeightScaling,
)
from autoq.formats._places import ENGINES, HARDWARE, Engine, Hardware, Support, Verdict
from autoq.formats._targets import (
    Target,
    all_supports,
    containers_for,
    feasible_formats,
    offered_formats,
    parse_target,
    reasons,
    support,
)

__all__ = [
    "ALGORITHMS",
    "ENGINES",
    "FORMATS",
    "HARDWARE",
    "LOW_RANK_ELEMENT_BITS",
    "NONE",
    "ActivationScheme",
    "Calibration",
    "CalibrationAlgorithm",
    "CalibrationMethod",
    "CalibrationRecipe",
    "CalibrationSteps",
    "Container",
    "Engine",
    "FeedbackOptions",
    "FormatName",
    "Hardware",
    "InputScaling",
    "QuantFormat",
    "StorageBits",
    "Support",
    "Target",
    "Verdict",
    "WeightElement",
    "WeightScaling",
    "all_supports",
    "containers_for",
    "feasible_formats",
    "known_calibrations",
    "offered_formats",
    "parse_calibration",
    "parse_target",
    "portable_formats",
    "reasons",
    "support",
]
